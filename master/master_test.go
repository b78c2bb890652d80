package master_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/larderfs/larder/master"
	"github.com/larderfs/larder/master/client"
	"github.com/larderfs/larder/master/record"
)

// running is a master in this process and a client of it.
type running struct {
	*client.Client
	master *master.Master
	cfg    master.Config
	log    *logBuffer
	cancel context.CancelFunc
	done   chan error
}

// stop ends the master and returns what Run returned.
func (r *running) stop(t testing.TB) {
	t.Helper()
	r.cancel()
	if err, ok := <-r.done; ok && err != nil {
		t.Errorf("run: %v", err)
	}
}

func start(t testing.TB, cfg master.Config) *running {
	t.Helper()
	if cfg.Dir == "" && len(cfg.EtcdEndpoints) == 0 {
		cfg.Dir = filepath.Join(t.TempDir(), "master")
	}
	if cfg.Listen == "" {
		cfg.Listen = "unix://" + filepath.Join(t.TempDir(), "master.sock")
	}
	r := &running{cfg: cfg, log: &logBuffer{}, done: make(chan error, 1)}
	cfg.Log = slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	m, err := master.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.master = m
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	go func() { r.done <- m.Run(ctx); close(r.done) }()
	t.Cleanup(func() { r.stop(t) })
	select {
	case <-m.Ready():
	case err := <-r.done:
		t.Fatalf("run: %v", err)
	}
	r.Client = dial(t, m.Addr())
	return r
}

func dial(t testing.TB, target string) *client.Client {
	t.Helper()
	c, err := client.New(client.Config{Target: target})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// eventually polls for what another process or a lease does on its own time.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// register keeps workers registered until the test ends or stop is called.
func register(t *testing.T, c *client.Client, regs ...client.Registration) (stop func()) {
	t.Helper()
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	stop = func() { cancel(); wg.Wait() }
	t.Cleanup(stop)
	for _, reg := range regs {
		wg.Go(func() {
			if err := c.Run(ctx, func() client.Report { return client.Report{Registration: reg} }, 50*time.Millisecond); err != nil {
				t.Errorf("run: %v", err)
			}
		})
	}
	eventually(t, "workers registered", func() bool {
		ws, err := c.Workers(t.Context())
		nodes := map[string]bool{}
		for _, w := range ws {
			nodes[w.Node] = true
		}
		for _, reg := range regs {
			if !nodes[reg.Node] {
				return false
			}
		}
		return err == nil
	})
	return stop
}

func worker(node string, capacity int64, ps ...client.Published) client.Registration {
	return client.Registration{UUID: uuid.NewString(), Node: node, Version: "v1", CapacityBytes: capacity, Volumes: ps}
}

func params(kv ...string) map[string]string {
	m := map[string]string{}
	for i := 0; i < len(kv); i += 2 {
		m[kv[i]] = kv[i+1]
	}
	return m
}

func TestCreateVolumeIsIdempotentByName(t *testing.T) {
	m := start(t, master.Config{})
	ctx := t.Context()
	register(t, m.Client, worker("n1", 1000), worker("n2", 1000))
	spec := client.VolumeSpec{Name: "pvc-1", Parameters: params("source", "s3://b/p"), CapacityBytes: 100}
	want, err := m.CreateVolume(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	if want.ID != record.VolumeID("pvc-1") || want.Name != "pvc-1" || want.CapacityBytes != 100 || want.Created.IsZero() {
		t.Errorf("created %+v", want)
	}
	bound := client.VolumeSpec{Name: "pvc-2", CapacityBytes: 100, Nodes: []string{"n1"}}
	if v, err := m.CreateVolume(ctx, bound); err != nil || v.Node != "n1" {
		t.Fatalf("bound to %q, %v", v.Node, err)
	}
	for _, c := range []struct {
		what string
		from client.VolumeSpec
		edit func(*client.VolumeSpec)
		err  error
	}{
		{"same", spec, func(s *client.VolumeSpec) {}, nil},
		{"smaller request", spec, func(s *client.VolumeSpec) { s.CapacityBytes = 50 }, nil},
		{"larger request", spec, func(s *client.VolumeSpec) { s.CapacityBytes = 101 }, client.ErrExists},
		{"lower limit", spec, func(s *client.VolumeSpec) { s.CapacityBytes, s.LimitBytes = 10, 99 }, client.ErrExists},
		{"other parameter", spec, func(s *client.VolumeSpec) { s.Parameters = params("source", "s3://b/q") }, client.ErrExists},
		{"more parameters", spec, func(s *client.VolumeSpec) { s.Parameters = params("source", "s3://b/p", "x", "y") }, client.ErrExists},
		{"bound now", spec, func(s *client.VolumeSpec) { s.Nodes = []string{"n1"} }, client.ErrExists},
		{"bound alike", bound, func(s *client.VolumeSpec) { s.Nodes = []string{"n2", "n1"} }, nil},
		{"bound elsewhere", bound, func(s *client.VolumeSpec) { s.Nodes = []string{"n2"} }, client.ErrExists},
		{"not bound now", bound, func(s *client.VolumeSpec) { s.Nodes = nil }, client.ErrExists},
		{"no name", spec, func(s *client.VolumeSpec) { s.Name = "" }, client.ErrInvalid},
		{"limit below request", spec, func(s *client.VolumeSpec) { s.LimitBytes = 1 }, client.ErrInvalid},
	} {
		s := c.from
		c.edit(&s)
		if _, err := m.CreateVolume(ctx, s); !errors.Is(err, c.err) {
			t.Errorf("%s: %v; want %v", c.what, err, c.err)
		}
	}
	got, err := m.Volume(ctx, want.ID)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
	for range 2 {
		if err := m.DeleteVolume(ctx, want.ID); err != nil {
			t.Error(err)
		}
	}
	if _, err := m.Volume(ctx, want.ID); !errors.Is(err, client.ErrNotFound) {
		t.Errorf("deleted volume: %v", err)
	}
	for _, id := range []string{"", "../../x", "no such id", strings.Repeat("x", 5000)} {
		if _, err := m.Volume(ctx, id); !errors.Is(err, client.ErrNotFound) {
			t.Errorf("volume %.20q: %v", id, err)
		}
		if err := m.DeleteVolume(ctx, id); err != nil {
			t.Errorf("delete %.20q: %v", id, err)
		}
	}
}

func TestConcurrentCreatesOfOneNameMakeOneVolume(t *testing.T) {
	m := start(t, master.Config{})
	register(t, m.Client, worker("n1", 1000), worker("n2", 1000))
	var wg sync.WaitGroup
	got := make([]client.Volume, 16)
	for i := range got {
		wg.Go(func() {
			nodes := []string{"n1", "n2"}
			if i%2 == 1 {
				slices.Reverse(nodes)
			}
			var err error
			if got[i], err = m.CreateVolume(t.Context(), client.VolumeSpec{Name: "one", CapacityBytes: 700, Nodes: nodes}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, v := range got {
		if !reflect.DeepEqual(v, got[0]) {
			t.Errorf("%+v and %+v", v, got[0])
		}
	}
	if c, err := m.Capacity(t.Context(), ""); err != nil || c != (client.Capacity{CapacityBytes: 2000, ReservedBytes: 700, AvailableBytes: 1300, LargestBytes: 1000}) {
		t.Errorf("capacity %+v, %v", c, err)
	}
}

func TestReservationsNeverExceedANodesCapacity(t *testing.T) {
	m := start(t, master.Config{})
	ctx := t.Context()
	register(t, m.Client, worker("n1", 10), worker("n2", 10))
	var wg sync.WaitGroup
	var mu sync.Mutex
	made := map[string]client.Volume{}
	for i := range 15 {
		wg.Go(func() {
			v, err := m.CreateVolume(ctx, client.VolumeSpec{Name: fmt.Sprint("v", i), CapacityBytes: 2, Nodes: []string{"gone", "n1", "n2"}})
			if errors.Is(err, client.ErrExhausted) {
				return
			}
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			made[v.ID] = v
		})
	}
	wg.Wait()
	if len(made) != 10 {
		t.Errorf("%d volumes; want 10", len(made))
	}
	full := client.Capacity{CapacityBytes: 10, ReservedBytes: 10}
	for _, node := range []string{"n1", "n2"} {
		if c, err := m.Capacity(ctx, node); err != nil || c != full {
			t.Errorf("capacity of %s: %+v, %v", node, c, err)
		}
	}
	for id := range made {
		for range 2 {
			if err := m.DeleteVolume(ctx, id); err != nil {
				t.Error(err)
			}
		}
	}
	empty := client.Capacity{CapacityBytes: 20, AvailableBytes: 20, LargestBytes: 10}
	if c, err := m.Capacity(ctx, ""); err != nil || c != empty {
		t.Errorf("capacity: %+v, %v", c, err)
	}
	if _, err := m.Capacity(ctx, "gone"); !errors.Is(err, client.ErrNotFound) {
		t.Errorf("capacity of a node without a worker: %v", err)
	}
	if _, err := m.CreateVolume(ctx, client.VolumeSpec{Name: "x", Nodes: []string{"gone"}}); !errors.Is(err, client.ErrUnavailable) {
		t.Errorf("volume on a node without a worker: %v", err)
	}
}

func TestAPageTokenOutlivesTheVolumesAroundIt(t *testing.T) {
	m := start(t, master.Config{})
	ctx := t.Context()
	var ids []string
	for i := range 7 {
		v, err := m.CreateVolume(ctx, client.VolumeSpec{Name: fmt.Sprint("v", i)})
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, v.ID)
	}
	slices.Sort(ids)
	if got := pages(t, m.Client, 3, nil); !slices.Equal(got, ids) {
		t.Errorf("pages of 3: %v; want %v", got, ids)
	}
	if got := pages(t, m.Client, 7, nil); !slices.Equal(got, ids) {
		t.Errorf("one page: %v; want %v", got, ids)
	}
	lastGone := func(last string) { // the token is behind a volume that is deleted now
		if err := m.DeleteVolume(ctx, last); err != nil {
			t.Error(err)
		}
	}
	if got := pages(t, m.Client, 2, lastGone); !slices.Equal(got, ids) {
		t.Errorf("pages while deleting: %v; want %v", got, ids)
	}
	for _, token := range []string{"invalid-token", "5", record.Token("") + "x", record.Token("a/b")} {
		if _, _, err := m.Volumes(ctx, 2, token); !errors.Is(err, client.ErrBadToken) {
			t.Errorf("token %q: %v", token, err)
		}
	}
}

func pages(t *testing.T, c *client.Client, max int, between func(last string)) (ids []string) {
	t.Helper()
	for token := ""; ; {
		vs, next, err := c.Volumes(t.Context(), max, token)
		if err != nil || len(vs) > max {
			t.Fatalf("%d volumes, %v", len(vs), err)
		}
		for _, v := range vs {
			ids = append(ids, v.ID)
		}
		if token = next; token == "" {
			return ids
		}
		if between != nil {
			between(ids[len(ids)-1])
		}
	}
}

func TestAnEmptyMasterIsToldEverythingByItsWorkers(t *testing.T) {
	sock := "unix://" + filepath.Join(t.TempDir(), "s")
	first := start(t, master.Config{Listen: sock})
	ctx := t.Context()
	register(t, first.Client, worker("n0", 1000))
	stop := register(t, first.Client, worker("n1", 1000))
	shared, err := first.CreateVolume(ctx, client.VolumeSpec{Name: "shared", Parameters: params("source", "s3://b/p"), CapacityBytes: 5})
	if err != nil {
		t.Fatal(err)
	}
	bound, err := first.CreateVolume(ctx, client.VolumeSpec{Name: "bound", CapacityBytes: 300, Nodes: []string{"n1"}})
	if err != nil {
		t.Fatal(err)
	}
	anon := client.Volume{ID: record.VolumeID("anon"), Parameters: params("source", "s3://b/q")} // the node knows no name
	inline := client.Volume{ID: "csi-0123", Parameters: params("source", "s3://b/r")}
	stop() // or two workers would take the node from each other for ever
	register(t, first.Client, worker("n1", 1000,
		client.Published{Volume: shared}, client.Published{Volume: bound}, client.Published{Volume: anon}, client.Published{Volume: inline, Inline: true}))

	first.stop(t)
	second := start(t, master.Config{Listen: sock}) // another folder: it knows nothing
	eventually(t, "both workers back", func() bool {
		ws, err := second.Workers(ctx)
		return err == nil && len(ws) == 2 && len(ws[1].Volumes) == 4
	})
	vs, _, err := second.Volumes(ctx, 0, "")
	if err != nil || len(vs) != 3 {
		t.Fatalf("volumes %+v, %v", vs, err)
	}
	for _, want := range []client.Volume{shared, bound} {
		want.PublishedNodes = []string{"n1"}
		if got, err := second.Volume(ctx, want.ID); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, %v; want %+v", got, err, want)
		}
	}
	if c, err := second.Capacity(ctx, "n1"); err != nil || c.ReservedBytes != 300 {
		t.Errorf("capacity %+v, %v", c, err)
	}
	got, err := second.CreateVolume(ctx, client.VolumeSpec{Name: "anon", Parameters: anon.Parameters, CapacityBytes: 7})
	if err != nil || got.ID != anon.ID || got.Name != "anon" || got.CapacityBytes != 7 {
		t.Errorf("adopted %+v, %v", got, err)
	}
	if _, err := second.CreateVolume(ctx, client.VolumeSpec{Name: "anon", CapacityBytes: 7}); !errors.Is(err, client.ErrExists) {
		t.Errorf("adopted by another: %v", err)
	}
}

func TestADeletedVolumeIsNotBroughtBackByANodeThatShowsIt(t *testing.T) {
	m := start(t, master.Config{})
	ctx := t.Context()
	spec := client.VolumeSpec{Name: "v"}
	v, err := m.CreateVolume(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.DeleteVolume(ctx, v.ID); err != nil {
		t.Fatal(err)
	}
	unseen := client.Volume{ID: record.VolumeID("unseen")} // deleted before the master ever heard of it
	if err := m.DeleteVolume(ctx, unseen.ID); err != nil {
		t.Fatal(err)
	}
	register(t, m.Client, worker("n1", 1, client.Published{Volume: v}, client.Published{Volume: unseen}))
	if vs, _, err := m.Volumes(ctx, 0, ""); err != nil || len(vs) != 0 {
		t.Errorf("volumes %+v, %v", vs, err)
	}
	if _, err := m.CreateVolume(ctx, spec); err != nil {
		t.Fatalf("made again: %v", err)
	}
	if got, err := m.Volume(ctx, v.ID); err != nil || !slices.Equal(got.PublishedNodes, []string{"n1"}) {
		t.Errorf("made again: %+v, %v", got, err)
	}
}

func TestAWorkerIsGoneWhenItsLeaseEnds(t *testing.T) {
	m := start(t, master.Config{WorkerLease: time.Second})
	reg := worker("n1", 10)
	ctx, die := context.WithCancel(t.Context())
	done := make(chan error, 1)
	report := client.Report{Registration: reg, Beat: client.Beat{
		Stats: client.Stats{CachedBytes: 5, ReadRequests: 7}, Holdings: []client.Holding{{VolumeID: "v", CachedBytes: 5, Objects: 1}}}}
	go func() { done <- m.Run(ctx, func() client.Report { return report }, 20*time.Millisecond) }()
	began := time.Now()
	eventually(t, "kept by heartbeats for longer than its lease", func() bool {
		ws, err := m.Workers(t.Context())
		return err == nil && len(ws) == 1 && reflect.DeepEqual(ws[0].Beat, report.Beat) && ws[0].Seen.After(began.Add(2500*time.Millisecond))
	})
	if n := strings.Count(m.log.String(), "worker registered"); n != 1 {
		t.Errorf("registered %d times", n)
	}
	die()
	if err := <-done; err != nil {
		t.Errorf("run: %v", err)
	}
	eventually(t, "gone", func() bool {
		ws, err := m.Workers(t.Context())
		return err == nil && len(ws) == 0
	})
	eventually(t, "its loss logged", func() bool { return strings.Contains(m.log.String(), "worker lost") })
}

func TestTheLastWorkerToRegisterIsTheNodes(t *testing.T) {
	m := start(t, master.Config{})
	stop := register(t, m.Client, worker("n1", 10))
	stop()
	second := worker("n1", 20) // the cache directory was wiped: another uuid
	register(t, m.Client, second)
	eventually(t, "replaced", func() bool {
		ws, err := m.Workers(t.Context())
		return err == nil && len(ws) == 1 && ws[0].UUID == second.UUID && ws[0].CapacityBytes == 20
	})
	if !strings.Contains(m.log.String(), "another worker took over the node") {
		t.Error("not logged")
	}
}

func TestMountsAreKeptByPath(t *testing.T) {
	m := start(t, master.Config{})
	ctx := t.Context()
	want := []client.Mount{{Path: "/a", URI: "s3://bkt/p", Options: params("region", "x")}, {Path: "/a/b", URI: "s3://ccc"}}
	for _, mt := range []client.Mount{want[1], {Path: "/a", URI: "s3://old"}, want[0]} {
		if err := m.PutMount(ctx, mt); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := m.Mounts(ctx); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("mounts %+v, %v", got, err)
	}
	for _, bad := range []client.Mount{{Path: "a", URI: "s3://b"}, {Path: "/a/../b", URI: "s3://b"}, {Path: "/a/", URI: "s3://b"}, {Path: "/x\x00", URI: "s3://b"}, {Path: "/x", URI: "b"}} {
		if err := m.PutMount(ctx, bad); !errors.Is(err, client.ErrInvalid) {
			t.Errorf("mount %+v: %v", bad, err)
		}
	}
	for range 2 {
		if err := m.DeleteMount(ctx, "/a"); err != nil {
			t.Error(err)
		}
	}
	if got, err := m.Mounts(ctx); err != nil || !reflect.DeepEqual(got, want[1:]) {
		t.Errorf("mounts %+v, %v", got, err)
	}
}

func TestNoSecretReachesTheStoreOrTheLog(t *testing.T) {
	const canary = "CANARY-wJalrXUtnFEMI"
	m := start(t, master.Config{})
	ctx := t.Context()
	bad := []map[string]string{
		params("AWS_ACCESS_KEY_ID", canary), params("AWS_SECRET_ACCESS_KEY", canary), params("aws_session_token", canary),
		params("mySecret", canary), params("csi.storage.k8s.io/serviceAccount.tokens", canary), params("Password", canary),
		params("source", "s3://id:"+canary+"@host/bucket"),
	}
	refused := func(what string, p map[string]string, err error) {
		t.Helper()
		if !errors.Is(err, client.ErrInvalid) || strings.Contains(err.Error(), canary) {
			t.Errorf("%s with %v: %v", what, p, err)
		}
	}
	for _, p := range bad {
		_, err := m.CreateVolume(ctx, client.VolumeSpec{Name: "v", Parameters: p})
		refused("volume", p, err)
		refused("mount", p, m.PutMount(ctx, client.Mount{Path: "/m", URI: "s3://b", Options: p}))
	}
	for _, uri := range []string{"s3://id:" + canary + "@b", "s3://b?secret=" + canary, "://" + canary, "s3://b#" + canary, "s3://%zz" + canary} {
		refused("mount", nil, m.PutMount(ctx, client.Mount{Path: "/m", URI: uri}))
	}
	done := make(chan error, 1)
	var said logBuffer
	c, err := client.New(client.Config{Target: m.master.Addr(), Log: slog.New(slog.NewTextHandler(&said, nil))})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		r := client.Report{Registration: worker("n1", 1, client.Published{Volume: client.Volume{ID: "v", Parameters: bad[0]}})}
		done <- c.Run(ctx, func() client.Report { return r }, 0)
	}()
	eventually(t, "registration refused", func() bool { return strings.Contains(said.String(), "looks like a credential") })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if v, err := m.CreateVolume(t.Context(), client.VolumeSpec{Name: "good", Parameters: params("source", "s3://findable/p")}); err != nil {
		t.Errorf("%+v, %v", v, err)
	}
	m.stop(t)
	found := filesWith(t, m.cfg.Dir, canary)
	if len(found) > 0 || strings.Contains(m.log.String(), canary) || strings.Contains(said.String(), canary) {
		t.Errorf("canary in %v or the log", found)
	}
	if len(filesWith(t, m.cfg.Dir, "s3://findable/p")) == 0 {
		t.Error("the search finds nothing at all")
	}
}

func filesWith(t *testing.T, dir, text string) (found []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if bytes.Contains(b, []byte(text)) {
			found = append(found, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestMetricsAndHealthAreServedOverAUnixSocket(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "metrics.sock")
	m := start(t, master.Config{MetricsListen: "unix://" + sock, Version: "v9"})
	if _, err := m.CreateVolume(t.Context(), client.VolumeSpec{Name: "v"}); err != nil {
		t.Fatal(err)
	}
	hc := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", sock)
	}}}
	get := func(path string) (int, string) {
		resp, err := hc.Get("http://master" + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var b bytes.Buffer
		if _, err := b.ReadFrom(resp.Body); err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, b.String()
	}
	for _, probe := range []string{"/healthz", "/readyz"} {
		if code, body := get(probe); code != 200 {
			t.Errorf("%s: %d %s", probe, code, body)
		}
	}
	code, body := get("/metrics")
	for _, want := range []string{"larder_master_volumes 1\n", "larder_master_workers 0\n", "larder_master_store_up 1\n",
		`larder_master_call_seconds_count{code="OK",method="CreateVolume"} 1`, "etcd_disk_wal_fsync_duration_seconds", "go_goroutines"} {
		if code != 200 || !strings.Contains(body, want) {
			t.Errorf("metrics: %d, without %q", code, want)
		}
	}
	s, err := m.Status(t.Context())
	if err != nil || s.Version != "v9" || s.PID != os.Getpid() || !s.Embedded || s.Volumes != 1 || s.StoreBytes == 0 || s.StoreRevision == 0 || s.Started.IsZero() {
		t.Errorf("status %+v, %v", s, err)
	}
	m.stop(t)
	if _, err := os.Lstat(sock); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("socket left behind: %v", err)
	}
}

func TestPathsMayBeLongerThanASocketsAndDeadSocketsAreReplaced(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 120))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "sock")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "dead"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	if err := os.Rename(dead.Addr().String(), sock); err != nil {
		t.Fatal(err)
	}
	m := start(t, master.Config{Dir: filepath.Join(dir, "state"), Listen: "unix://" + sock, ListenMode: 0o660})
	if _, err := m.Client.Status(t.Context()); err != nil {
		t.Error(err)
	}
	if fi, err := os.Lstat(sock); err != nil || fi.Mode().Perm() != 0o660 {
		t.Errorf("socket: %v, %v", fi, err)
	}
	second, err := master.New(master.Config{Dir: filepath.Join(dir, "other"), Listen: "unix://" + sock})
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("second on the socket: %v", err)
	}
	if _, err := m.Client.Status(t.Context()); err != nil {
		t.Errorf("after the second: %v", err)
	}
}

func TestADirectoryHasOneMaster(t *testing.T) {
	m := start(t, master.Config{})
	second, err := master.New(master.Config{Dir: m.cfg.Dir, Listen: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "in use by another master") {
		t.Errorf("second: %v", err)
	}
}

func TestConfigNamesAllMistakes(t *testing.T) {
	_, err := master.New(master.Config{Dir: "relative", Listen: "unix://relative", MetricsListen: "nonsense",
		EtcdCertFile: "x", EtcdPrefix: "p", WorkerLease: time.Millisecond})
	for _, want := range []string{"dir relative", `listen "unix://relative"`, `metrics listen "nonsense"`, "certificate and key", "certificates: set with", "prefix", "lease 1ms"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in %v", want, err)
		}
	}
	if _, err := master.New(master.Config{}); err == nil {
		t.Error("the zero configuration is good")
	}
}

func TestCloseOrderLetsCallsInFlightEnd(t *testing.T) {
	m := start(t, master.Config{Listen: "127.0.0.1:0"})
	var wg sync.WaitGroup
	stopping := make(chan struct{})
	for i := range 8 {
		wg.Go(func() {
			for n := 0; ; n++ {
				_, err := m.CreateVolume(t.Context(), client.VolumeSpec{Name: fmt.Sprint(i, "-", n)})
				if n == 2 && i == 0 {
					close(stopping)
				}
				if err == nil {
					continue
				}
				if !errors.Is(err, client.ErrUnavailable) {
					t.Errorf("%v; want unavailable", err)
				}
				return
			}
		})
	}
	<-stopping
	m.stop(t)
	wg.Wait()
	if log := m.log.String(); strings.Contains(log, "level=ERROR") {
		t.Errorf("log: %s", log)
	}
}

func BenchmarkFreshMasterUntilReady(b *testing.B) {
	for b.Loop() {
		start(b, master.Config{}).stop(b)
	}
}

func BenchmarkRestartWith1000VolumesUntilReady(b *testing.B) {
	m := start(b, master.Config{})
	for i := range 1000 {
		if _, err := m.CreateVolume(b.Context(), client.VolumeSpec{Name: fmt.Sprint(i), Parameters: params("source", "s3://bucket/prefix")}); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		m.stop(b)
		m = start(b, m.cfg)
	}
}

func BenchmarkCreateVolumeUntilDurable(b *testing.B) {
	m := start(b, master.Config{})
	for i := 0; b.Loop(); i++ {
		if _, err := m.CreateVolume(b.Context(), client.VolumeSpec{Name: fmt.Sprint(i)}); err != nil {
			b.Fatal(err)
		}
	}
}
