// Package cacheworker is the cache process of one node.
//
// It owns the cache directory and serves every mount of the node: FUSE requests, and the
// domain socket of each volume. It mounts nothing and needs no privilege: the broker makes
// the mounts and shares their descriptors, so that either process may die. What a worker
// knows of a mount is in the mount's memfd, what it caches is in its directory, and what it
// tells the master can be told again; nothing else outlives it.
package cacheworker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/cachestore"
	"github.com/larderfs/larder/cacheworker/dataset"
	"github.com/larderfs/larder/cacheworker/domainsocket"
	"github.com/larderfs/larder/cacheworker/fill"
	"github.com/larderfs/larder/cacheworker/fusefs"
	"github.com/larderfs/larder/cacheworker/metadata"
	"github.com/larderfs/larder/cacheworker/source"
	"github.com/larderfs/larder/cacheworker/telemetry"
	"github.com/larderfs/larder/cacheworker/tiers"
	"github.com/larderfs/larder/master/client"
)

// Config of a worker.
type Config struct {
	Node string // name of the node, for the master

	Tiers         []Tier // at least one
	MinFreeBytes  int64  // of each one's file system
	MinFreeInodes int64

	MemoryBytes int64 // of this process; 0 means nine tenths of its cgroup's limit, if that has one

	BrokerSocket  string // path
	ControlSocket string // path of its own gRPC socket
	MetricsListen string // "host:port" or "unix:///path"; "" for none
	Profiles      string // of pprof, likewise; on this machine only
	Master        string // "unix:///path" or "host:port", several with commas between; "" for none
	Listen        string // "host:port", where masters ask what is cached; "" for none
	Advertise     string // IP address for that, if Listen names none; "" for the one towards the master

	FileRoot     string // below it are file:// sources; "" for none
	FileRootPath string // how to open FileRoot, if not by its name

	CredentialRoot string              // below it are the files that mounts name for their credentials; "" allows none
	Getenv         func(string) string // where mounts name variables for their credentials; nil allows none

	Standby  bool   // wait for the end of the worker that has the tiers, however long, instead of asking for them
	Instance string // tells it from other workers that get the same tiers; "" for none

	Tracer   *telemetry.Tracer // nil traces nothing
	Features Features
	Alone    *Alone // nil serves mounts
	Version  string
	Log      *slog.Logger
}

// Tier is a cache directory.
type Tier struct {
	Dir           string // existing; owned by this process
	ViewDir       string // Dir through a read-only mount; "" gives no descriptor away
	Kind          tiers.Kind
	CapacityBytes int64 // 0 means nine tenths of its file system
}

// Features that the kernel has and that shall not be used.
type Features struct {
	NoPassthrough bool
	NoResend      bool
	NoSplice      bool
}

// Validate reports all mistakes at once.
func (c Config) Validate() error {
	var errs []error
	paths := []struct{ name, path string }{{"control socket", c.ControlSocket}}
	for _, t := range c.Tiers {
		paths = append(paths, struct{ name, path string }{"tier", t.Dir})
		if t.ViewDir != "" {
			paths = append(paths, struct{ name, path string }{"view", t.ViewDir})
		}
		if t.CapacityBytes == 0 && t.Kind == tiers.Memory {
			errs = append(errs, fmt.Errorf("tier %s: in memory it needs a capacity", t.Dir))
		}
		if t.CapacityBytes < 0 {
			errs = append(errs, fmt.Errorf("tier %s: its capacity is negative", t.Dir))
		}
	}
	if len(c.Tiers) == 0 {
		errs = append(errs, errors.New("tier: at least one is needed"))
	}
	if c.Alone == nil {
		paths = append(paths, struct{ name, path string }{"broker socket", c.BrokerSocket})
	} else {
		errs = append(errs, c.Alone.validate())
	}
	for _, f := range paths {
		if !filepath.IsAbs(f.path) {
			errs = append(errs, fmt.Errorf("%s: %q is not an absolute path", f.name, f.path))
		}
	}
	for _, f := range []struct{ name, path string }{{"file root", c.FileRoot}, {"credential root", c.CredentialRoot}} {
		if f.path != "" && !filepath.IsAbs(f.path) {
			errs = append(errs, fmt.Errorf("%s: %q is not an absolute path", f.name, f.path))
		}
	}
	if c.Listen != "" {
		if _, _, err := net.SplitHostPort(c.Listen); err != nil {
			errs = append(errs, fmt.Errorf("listen %q: want host:port", c.Listen))
		}
	}
	if _, err := netip.ParseAddr(c.Advertise); c.Advertise != "" && err != nil {
		errs = append(errs, fmt.Errorf("advertise %q: want an IP address", c.Advertise))
	}
	if c.MemoryBytes < 0 || c.MemoryBytes > 0 && c.MemoryBytes < minMemory {
		errs = append(errs, fmt.Errorf("memory: %d bytes are not enough: want at least 64MiB", c.MemoryBytes))
	}
	if err := telemetry.CheckLocal(c.Profiles); c.Profiles != "" && err != nil {
		errs = append(errs, fmt.Errorf("pprof: %w", err))
	}
	if c.MinFreeBytes < 0 || c.MinFreeInodes < 0 {
		errs = append(errs, errors.New("tier: what is kept free is not negative"))
	}
	return errors.Join(errs...)
}

const minMemory = 64 << 20

// Worker is the process's parts, from its start to its end.
type Worker struct {
	sidecar
	lingering
	cfg      Config
	log      *slog.Logger
	started  time.Time
	requests source.Counter
	counters fusefs.Counters
	sockets  domainsocket.Counters
	accounts *accounts

	store    *tiers.Cache
	metadata *metadata.Cache
	fills    *fill.Fills
	sources  *sources
	mounts   *mounts

	namespace *mountTable
	expired   atomic.Int64 // bytes that were freed because their mount's ttl had ended
	network   network
	users     *users
	handover
}

// New checks the configuration.
func New(cfg Config) (*Worker, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return &Worker{cfg: cfg, log: cfg.Log, started: time.Now(), accounts: newAccounts(maxAccounts), users: newUsers(), handover: newHandover()}, nil
}

// Run serves until ctx ends. It leaves the mounts to the broker: their readers wait for the
// next worker.
//
// When the next worker is ready already it returns at once, with everything still going on: the process
// has to end then. Its requests are answered until that moment, and only its end takes its threads
// from /dev/fuse.
func (w *Worker) Run(ctx context.Context) error {
	done := make(chan error, 1)
	go func() {
		rctx, stop := context.WithCancel(context.WithoutCancel(ctx))
		defer stop()
		defer context.AfterFunc(ctx, func() {
			if w.stage() == brokerwire.Giving {
				w.end(nil)
			} else {
				stop()
			}
		})()
		done <- w.run(rctx)
	}()
	select {
	case err := <-done:
		return err
	case err := <-w.over:
		return err
	}
}

func (w *Worker) run(ctx context.Context) (err error) {
	mem, err := newMemory(w.cfg.MemoryBytes, w.cfg.inMemory(), "/sys/fs/cgroup", "/proc/self/cgroup")
	if err != nil {
		return fmt.Errorf("memory limit: %w", err)
	}
	locks, err := tiers.Lock(ctx, w.tierConfig(ctx))
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return err
	}
	if w.cfg.Standby {
		w.started = time.Now()
	}
	defer mem.startQuietly()()
	if w.store, err = locks.Open(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.store.Close()) }()
	opened := time.Now()
	budget := mem.fills()
	budget.Log = w.log
	w.fills = fill.New(budget, w.store)
	defer func() { err = errors.Join(err, w.fills.Close()) }()
	w.metadata = metadata.New(metadata.Config{MaxEntries: mem.names(), OnDenied: w.fills.Revoke, OnHead: w.fills.Grant, Log: w.log})
	w.sources = &sources{cfg: w.cfg, nodeKey: w.store.NodeKey(), observer: &w.requests,
		resolver: resolver{root: w.cfg.CredentialRoot, getenv: w.cfg.Getenv}}
	w.namespace = w.newMountTable()
	w.mounts = &mounts{w: w, held: map[string]*held{}, fed: map[string]*held{}}
	w.serving.Store(w.mounts)
	w.store.OnEvict(w.mounts.evicted)

	control, err := brokerwire.ListenStream(w.cfg.ControlSocket, 0o660)
	if err != nil {
		return err
	}
	if w.network, err = w.openNetwork(); err != nil {
		return errors.Join(err, control.Close())
	}
	g, ctx := errgroup.WithContext(ctx)
	w.beside(ctx, g, w.serveMetrics, w.serveProfiles, w.reportToMaster, w.serveNetwork, w.workForMaster, w.followMounts, w.expire)
	if w.cfg.Alone != nil {
		g.Go(func() error { return w.serveAlone(ctx) })
	} else {
		g.Go(func() error { return w.mounts.Run(ctx) })
	}
	g.Go(func() error { return serveControl(ctx, control, w) })
	g.Go(func() error { return w.followCredentials(ctx) })
	w.log.Info("worker started", "uuid", w.store.UUID(), "tier", w.cfg.Tiers[0].Dir, "tiers", len(w.cfg.Tiers), "openTier", opened.Sub(w.started), "parts", time.Since(opened),
		"cpu", cpuTime())
	return g.Wait()
}

// tierConfig is what to open: in reserve only when no other worker has it.
func (w *Worker) tierConfig(ctx context.Context) tiers.Config {
	c := tiers.Config{Standby: w.cfg.Standby, AskOwner: func() { w.askElder(ctx) }, Log: w.log}
	for _, t := range w.cfg.Tiers {
		c.Tiers = append(c.Tiers, tiers.Tier{Kind: t.Kind, Store: cachestore.Config{
			Dir: t.Dir, ViewDir: t.ViewDir, CapacityBytes: t.CapacityBytes,
			MinFreeBytes: w.cfg.MinFreeBytes, MinFreeInodes: w.cfg.MinFreeInodes, Log: w.log,
		}})
	}
	return c
}

// inMemory is what the tiers in memory may take.
func (c Config) inMemory() (bytes int64) {
	for _, t := range c.Tiers {
		if t.Kind == tiers.Memory {
			bytes += t.CapacityBytes
		}
	}
	return bytes
}

// hasViews reports whether some descriptors can be given away.
func (c Config) hasViews() bool {
	return slices.ContainsFunc(c.Tiers, func(t Tier) bool { return t.ViewDir != "" })
}

// cpuTime is what this process has used since it was started.
func cpuTime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &t); err != nil {
		return 0
	}
	return time.Duration(t.Nano())
}

// deps are of the dataset of a volume that is counted by m.
func (w *Worker) deps(m *meter) dataset.Deps {
	return dataset.Deps{Sources: w.sources, Metadata: w.metadata, Fills: w.fills, Store: w.store, Usage: m.usage}
}

func (w *Worker) reportToMaster(ctx context.Context) error {
	if w.cfg.Master == "" {
		return nil
	}
	c, err := client.New(client.Config{Target: w.cfg.Master, Changed: w.users.changed, Tracer: w.cfg.Tracer, Log: w.log})
	if err != nil {
		return err
	}
	defer c.Close()
	return c.Run(ctx, w.report, 0)
}

// report is what the master is told.
func (w *Worker) report() client.Report {
	return client.Report{
		Registration: client.Registration{
			UUID: w.store.UUID().String(), Node: w.cfg.Node, Version: w.cfg.Version, CapacityBytes: w.store.Stats().CapacityBytes,
			Addresses: w.network.addresses(), Key: w.network.key, Volumes: w.users.of(w.mounts.published()),
		},
		Beat: client.Beat{Stats: w.counts()},
	}
}

func (w *Worker) counts() client.Stats {
	s, f := w.store.Stats(), w.fills.Stats()
	return client.Stats{
		CachedBytes: s.CachedBytes, Objects: int64(s.Objects), CompleteObjects: int64(s.CompleteObjects),
		ReadRequests: w.counters.Reads.Load(), ReadBytes: w.counters.ReadBytes.Load(),
		FetchedBytes: uint64(w.requests.Bytes.Load()), HitChunks: uint64(f.HitChunks), MissChunks: uint64(f.MissChunks),
		EvictedBytes: uint64(s.EvictedBytes), Mounts: int64(len(w.mounts.all())), Started: w.started.UTC(),
	}
}

// below is a path relative to root.
func below(root, path string) (rel string, ok bool) {
	if path == root {
		return "", true
	}
	return strings.CutPrefix(path, strings.TrimSuffix(root, "/")+"/")
}
