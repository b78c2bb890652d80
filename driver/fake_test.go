package driver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/master/client"
	"github.com/larderfs/larder/master/namespace"
	"github.com/larderfs/larder/master/record"
	"github.com/larderfs/larder/sanity/leak"
)

func TestMain(m *testing.M) { os.Exit(leak.Run(m)) }

// fakeBroker makes real mounts: a tmpfs with data/ and domain/ for each volume, and real
// binds of it.
type fakeBroker struct {
	mu     sync.Mutex
	mounts map[string]brokerwire.Mount
	creds  map[string]brokerwire.Credentials
	calls  []string // verbs, in order

	secrets map[string]brokerwire.Secrets

	before func(ctx context.Context, verb string) error // makes a call fail, before it did anything
	after  func(verb string) error                      // or when it has done all
}

func newFakeBroker() *fakeBroker {
	return &fakeBroker{mounts: map[string]brokerwire.Mount{}, creds: map[string]brokerwire.Credentials{},
		secrets: map[string]brokerwire.Secrets{}}
}

func (b *fakeBroker) call(ctx context.Context, verb string, do func() error) error {
	b.mu.Lock()
	before := b.before
	b.mu.Unlock()
	if before != nil {
		if err := before(ctx, verb); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls = append(b.calls, verb)
	err := do()
	if err == nil && b.after != nil {
		err = b.after(verb)
	}
	return err
}

func (b *fakeBroker) Mount(ctx context.Context, v brokerwire.Volume, path string) error {
	return b.call(ctx, "mount", func() error {
		if m, ok := b.mounts[v.ID]; ok && m.Path == path {
			return nil
		} else if ok {
			return brokerwire.ErrExists
		}
		if err := unix.Mount("fake", path, "tmpfs", 0, "size=64k"); err != nil {
			return err
		}
		b.creds[v.ID], b.secrets[v.ID] = v.Credentials, v.Secrets
		names := v.Secrets.Names()
		v.Credentials, v.Secrets = brokerwire.Credentials{}, brokerwire.Secrets{}
		b.mounts[v.ID] = brokerwire.Mount{VolumeID: v.ID, Path: path, Volume: v, Since: time.Now(), Served: true, Secrets: names}
		return errors.Join(os.Mkdir(filepath.Join(path, "data"), 0o755), os.Mkdir(filepath.Join(path, "domain"), 0o755),
			os.WriteFile(filepath.Join(path, "data/file"), []byte(v.ID), 0o444))
	})
}

func (b *fakeBroker) Refresh(ctx context.Context, v brokerwire.Volume) error {
	return b.call(ctx, "refresh", func() error {
		m, ok := b.mounts[v.ID]
		if !ok {
			return object.ErrNotFound
		}
		b.creds[v.ID] = v.Credentials
		v.Credentials, m.Volume.ServiceAccount = brokerwire.Credentials{}, v.ServiceAccount
		b.mounts[v.ID] = m
		if v != m.Volume {
			return errors.New("refresh of more than credentials")
		}
		return nil
	})
}

func (b *fakeBroker) RefreshMounts(ctx context.Context, v brokerwire.Volume) error {
	return b.call(ctx, "refresh mounts", func() error {
		m, ok := b.mounts[v.ID]
		if !ok {
			return object.ErrNotFound
		}
		b.secrets[v.ID], m.Secrets = v.Secrets, v.Secrets.Names()
		m.Volume.Tenant = v.Tenant
		b.mounts[v.ID] = m
		v.Secrets = brokerwire.Secrets{}
		if v != m.Volume {
			return errors.New("refresh of more than mounts")
		}
		return nil
	})
}

func (b *fakeBroker) Bind(ctx context.Context, id, subdir, target string, readOnly bool) error {
	return b.call(ctx, "bind", func() error {
		m, ok := b.mounts[id]
		if !ok {
			return object.ErrNotFound
		}
		if err := unix.Mount(filepath.Join(m.Path, subdir), target, "", unix.MS_BIND, ""); err != nil {
			return err
		}
		if !readOnly {
			return nil
		}
		return unix.Mount("", target, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
	})
}

func (b *fakeBroker) Unmount(ctx context.Context, path string) error {
	return b.call(ctx, "unmount", func() error {
		if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && err != unix.EINVAL && err != unix.ENOENT {
			return err
		}
		for id, m := range b.mounts {
			if m.Path == path {
				delete(b.mounts, id)
			}
		}
		return nil
	})
}

func (b *fakeBroker) Mounts(ctx context.Context) (ms []brokerwire.Mount, err error) {
	err = b.call(ctx, "mounts", func() error {
		for _, m := range b.mounts {
			ms = append(ms, m)
		}
		return nil
	})
	return ms, err
}

// script sets the faults; nil for none.
func (b *fakeBroker) script(before func(ctx context.Context, verb string) error, after func(verb string) error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.before, b.after = before, after
}

// forget is the death of both holders: what is mounted stays in the kernel, and nobody knows.
func (b *fakeBroker) forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mounts = map[string]brokerwire.Mount{}
}

func (b *fakeBroker) count(verb string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for _, c := range b.calls {
		if c == verb {
			n++
		}
	}
	return n
}

func (b *fakeBroker) credentials(id string) brokerwire.Credentials {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.creds[id]
}

func (b *fakeBroker) update(id string, change func(*brokerwire.Mount)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	m := b.mounts[id]
	change(&m)
	b.mounts[id] = m
}

func TestTheFakeBrokerMountsForReal(t *testing.T) {
	b, dir := newFakeBroker(), t.TempDir()
	stage, target := filepath.Join(dir, "stage"), filepath.Join(dir, "target")
	t.Cleanup(func() { leak.Unmount(dir) })
	if err := errors.Join(os.Mkdir(stage, 0o755), os.Mkdir(target, 0o755),
		b.Mount(t.Context(), brokerwire.Volume{ID: "v"}, stage), b.Mount(t.Context(), brokerwire.Volume{ID: "v"}, stage),
		b.Bind(t.Context(), "v", "data", target, true)); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(target, "file")); string(got) != "v" {
		t.Errorf("read %q, %v", got, err)
	}
	if err := os.WriteFile(filepath.Join(target, "new"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("write: %v", err)
	}
	if len(leak.Mounts(dir)) != 2 {
		t.Errorf("mounts: %v", leak.Mounts(dir))
	}
	if err := errors.Join(b.Unmount(t.Context(), target), b.Unmount(t.Context(), stage), b.Unmount(t.Context(), stage)); err != nil || len(leak.Mounts(dir)) != 0 {
		t.Errorf("unmount: %v, %v left", err, leak.Mounts(dir))
	}
	if err := b.Bind(t.Context(), "v", "", target, true); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("bind of what is not mounted: %v", err)
	}
}

// fakeStats says of every volume the same.
type fakeStats struct {
	stats    VolumeStats
	troubles map[string]string
	err      error
	users    []map[string][]Pod // told

	mu    sync.Mutex     // guards table
	table []client.Mount // as the worker knows it
}

// Mounted answers as the worker does.
func (s *fakeStats) Mounted(_ context.Context, path string, who Who) (m Mounted, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := namespace.At(s.table, path)
	if !ok {
		return m, &refusal{namespace.Nothing(path), object.ErrNotFound}
	}
	w := namespace.Who{Inline: who.Inline, Namespace: who.Namespace}
	if why := v.Refused(w); why != "" && !who.Undecided {
		return m, &refusal{why, object.ErrDenied}
	}
	for _, p := range v.Parts {
		if strings.HasPrefix(p.Mount.Credential, "secret:") && p.Mount.Allows(w.Inline, w.Namespace) {
			if m.Secrets = append(m.Secrets, p.Mount.Credential); p.At == "" {
				m.OwnSecret = p.Mount.Credential
			}
		}
	}
	return m, nil
}

func (s *fakeStats) Troubles(context.Context) (map[string]string, error) { return s.troubles, nil }

func (s *fakeStats) VolumeStats(context.Context, string) (VolumeStats, error) { return s.stats, s.err }

func (s *fakeStats) TellUsers(_ context.Context, of map[string][]Pod) error {
	s.users = append(s.users, of)
	return s.err
}

// fakeVolumes is a master in memory.
type fakeVolumes struct {
	mu      sync.Mutex
	volumes map[string]client.Volume
	workers []client.Worker
	mounts  []client.Mount
	err     error // of every call
}

func newFakeVolumes(nodes ...string) *fakeVolumes {
	f := &fakeVolumes{volumes: map[string]client.Volume{}}
	for _, n := range nodes {
		f.workers = append(f.workers, client.Worker{Registration: client.Registration{Node: n, CapacityBytes: 100 << 30}})
	}
	return f
}

func (f *fakeVolumes) CreateVolume(_ context.Context, spec client.VolumeSpec) (client.Volume, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := errors.Join(f.err, spec.Validate()); err != nil {
		return client.Volume{}, err
	}
	id := record.VolumeID(spec.Name)
	if v, ok := f.volumes[id]; ok {
		if spec.Matches(v) {
			return v, nil
		}
		return client.Volume{}, client.ErrExists
	}
	v := client.Volume{ID: id, Name: spec.Name, Parameters: spec.Parameters, CapacityBytes: spec.CapacityBytes}
	for _, n := range spec.Nodes {
		for i, w := range f.workers {
			if w.Node == n && v.Node == "" && w.CapacityBytes-w.ReservedBytes >= spec.CapacityBytes {
				v.Node = n
				f.workers[i].ReservedBytes += spec.CapacityBytes
			}
		}
	}
	if len(spec.Nodes) > 0 && v.Node == "" {
		return client.Volume{}, client.ErrExhausted
	}
	f.volumes[id] = v
	return v, nil
}

func (f *fakeVolumes) DeleteVolume(_ context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !record.ValidID(id) {
		return client.ErrInvalid
	}
	delete(f.volumes, id)
	return f.err
}

func (f *fakeVolumes) Volume(_ context.Context, id string) (client.Volume, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v, ok := f.volumes[id]
	if !ok {
		return v, client.ErrNotFound
	}
	return v, f.err
}

func (f *fakeVolumes) Volumes(_ context.Context, most int, token string) (vs []client.Volume, next string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	after := ""
	if token != "" {
		if after, err = record.ParseToken(token); err != nil {
			return nil, "", err
		}
	}
	var ids []string
	for id := range f.volumes {
		if id > after {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	if most > 0 && len(ids) > most {
		ids = ids[:most]
		next = record.Token(ids[most-1])
	}
	for _, id := range ids {
		vs = append(vs, f.volumes[id])
	}
	return vs, next, f.err
}

func (f *fakeVolumes) Capacity(_ context.Context, node string) (c client.Capacity, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	known := node == ""
	for _, w := range f.workers {
		if node == "" || w.Node == node {
			known = true
			c.CapacityBytes += w.CapacityBytes
			c.AvailableBytes += w.CapacityBytes - w.ReservedBytes
			c.LargestBytes = max(c.LargestBytes, w.CapacityBytes-w.ReservedBytes)
		}
	}
	if !known {
		return c, client.ErrNotFound
	}
	return c, f.err
}

func (f *fakeVolumes) Mounts(context.Context) ([]client.Mount, error) { return f.mounts, f.err }

func (f *fakeVolumes) Workers(context.Context) ([]client.Worker, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.workers), f.err
}

// bench is a running server over the fakes.
type bench struct {
	csi.IdentityClient
	csi.ControllerClient
	csi.NodeClient
	dir     string // of everything; gone after the test, which fails if something is mounted in it
	socket  string
	broker  *fakeBroker
	volumes *fakeVolumes
	stats   *fakeStats
	ready   error
	log     *logBuffer
	secrets map[string]map[string]string // of the cluster, by namespace/name
	server  *Server
}

// logBuffer keeps what was logged.
type logBuffer struct {
	mu   sync.Mutex
	text []byte
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, p...)
	return len(p), nil
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.text)
}

func start(t *testing.T) *bench {
	t.Helper()
	b := &bench{dir: t.TempDir(), broker: newFakeBroker(), volumes: newFakeVolumes("node-a"), log: &logBuffer{},
		stats: &fakeStats{stats: VolumeStats{CachedBytes: 5, TotalBytes: 10, Healthy: true}}}
	t.Cleanup(func() {
		if left := leak.Mounts(b.dir); len(left) > 0 {
			t.Errorf("left mounted: %v", left)
			leak.Unmount(b.dir)
		}
	})
	b.socket = filepath.Join(b.dir, "csi.sock")
	s, err := New(Config{
		Endpoint: "unix://" + b.socket, Version: "test", Controller: true, Node: true, NodeID: "node-a",
		RunDir: filepath.Join(b.dir, "run"), FileRoot: "/srv", InlineEndpoints: []string{"http://listed:9000"},
		DriverCredentials: []string{"sales=s3://bkt/prefix", "sales=s3://bkt/elsewhere,endpoint=http://listed:9000"}, STSEndpoints: []string{"https://sts.listed"},
		Ready: func(context.Context) error { return b.ready },
		Secrets: func(_ context.Context, namespace, name string) (map[string]string, error) {
			s, ok := b.secrets[namespace+"/"+name]
			if !ok {
				return nil, fmt.Errorf("there is no such Secret: %w", object.ErrNotFound)
			}
			return s, nil
		},
		Log: slog.New(slog.NewTextHandler(b.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}, b.volumes, b.broker, b.stats)
	if err != nil {
		t.Fatal(err)
	}
	b.server = s
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	conn := dial(t, b.socket)
	t.Cleanup(func() {
		conn.Close()
		stop()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	b.IdentityClient, b.ControllerClient, b.NodeClient = csi.NewIdentityClient(conn), csi.NewControllerClient(conn), csi.NewNodeClient(conn)
	return b
}

func dial(t *testing.T, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 5 * time.Millisecond, MaxDelay: 5 * time.Millisecond}}),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

// mountsOf counts what is mounted below a path of the bench.
func (b *bench) mountsOf(name string) int { return len(leak.Mounts(b.path(name))) }

func capability(mode csi.VolumeCapability_AccessMode_Mode, group ...string) *csi.VolumeCapability {
	m := &csi.VolumeCapability_MountVolume{}
	if len(group) > 0 {
		m.VolumeMountGroup = group[0]
	}
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: m},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
	}
}

var reader = capability(csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY)

// deadFUSE mounts a FUSE file system that nobody serves: every access to it fails or hangs.
func deadFUSE(t *testing.T, path string) {
	t.Helper()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	data := fmt.Sprintf("fd=%s,rootmode=40000,user_id=0,group_id=0", strconv.Itoa(fd))
	if err := unix.Mount("dead", path, "fuse.larder", 0, data); err != nil {
		t.Fatal(err)
	}
}
