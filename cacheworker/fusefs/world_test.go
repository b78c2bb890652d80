package fusefs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/cachestore"
	"github.com/larderfs/larder/cacheworker/dataset"
	"github.com/larderfs/larder/cacheworker/fill"
	"github.com/larderfs/larder/cacheworker/fill/memsource"
	"github.com/larderfs/larder/cacheworker/metadata"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
	"github.com/larderfs/larder/cacheworker/tiers"
	"github.com/larderfs/larder/driver/broker"
	"github.com/larderfs/larder/master/record"
	"github.com/larderfs/larder/sanity/leak"
)

const uuid = "11111111-2222-3333-4444-555555555555"

var allFeatures = Features{Passthrough: true, Resend: true, Splice: true}

// testWorker is the worker's side of mounts: a cache, and a link to the broker.
type testWorker struct {
	log      *slog.Logger
	store    *tiers.Cache
	fills    *fill.Fills
	meta     *metadata.Cache
	src      source.Source // of every volume
	features Features
	counters Counters
	lockOff  bool // Config.allowWrites

	logRequests bool                // Config.logRequests
	broker      func(Broker) Broker // what the mounts are given; nil is the worker itself
	compact     int64               // bytes of the log of nodes at which it is compacted; 0 is as usual

	peer    *brokerwire.Peer
	stop    context.CancelFunc
	ended   chan struct{}  // closed when the link has
	serving sync.WaitGroup // Serve

	mu        sync.Mutex         // guards the fields below
	adopted   map[string]*Served // and not served
	served    map[string]*Served
	listeners []*os.File
	mounts    []record.Mount // what volumes of a path show
}

// connect opens the cache and becomes the broker's worker.
func (w *testWorker) connect(socket string, of ...tiers.Tier) (err error) {
	for i := range of {
		of[i].Store.Log = w.log
	}
	if w.store, err = tiers.Open(context.Background(), tiers.Config{Tiers: of, Log: w.log}); err != nil {
		return err
	}
	w.fills = fill.New(fill.Config{Log: w.log, Pardoned: -1}, w.store)
	w.meta = metadata.New(metadata.Config{OnDenied: w.fills.Revoke, OnHead: w.store.Grant, Log: w.log})
	w.adopted, w.served = map[string]*Served{}, map[string]*Served{}
	w.store.OnEvict(func(id object.ID) {
		for _, s := range w.all() {
			s.Evicted(id)
		}
	})
	conn, err := brokerwire.Dial(context.Background(), socket)
	if err != nil {
		return err
	}
	w.peer = brokerwire.NewPeer(conn, w.handle)
	ctx, stop := context.WithCancel(context.Background())
	w.stop, w.ended = stop, make(chan struct{})
	go func() { defer close(w.ended); w.peer.Run(ctx) }()
	_, _, err = w.peer.Call(ctx, brokerwire.Message{Verb: brokerwire.Hello, Version: brokerwire.Version, Oldest: brokerwire.Oldest, Role: brokerwire.RoleWorker, UUID: uuid})
	return err
}

// close ends the worker in the order of a process that ends.
func (w *testWorker) close() error {
	if w.stop != nil {
		w.stop()
		<-w.ended
	}
	for _, s := range w.all() {
		s.Detach()
	}
	ended := make(chan struct{})
	go func() { defer close(ended); w.serving.Wait() }()
	select {
	case <-ended:
	case <-time.After(patience):
		leak.Abort(os.TempDir())
		<-ended
	}
	w.mu.Lock()
	brokerwire.CloseFiles(w.listeners)
	w.mu.Unlock()
	return errors.Join(w.fills.Close(), w.store.Close())
}

func (w *testWorker) all() (all []*Served) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.served {
		all = append(all, s)
	}
	return all
}

func (w *testWorker) mount(id string) *Served {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.served[id]
}

// S3 and File implement dataset.Sources.
func (w *testWorker) S3(string, brokerwire.Volume, bool) (source.Source, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.src, nil
}

func (w *testWorker) File(path string) (source.Source, string, error) {
	src, err := w.S3("", brokerwire.Volume{}, false)
	return src, strings.TrimPrefix(path, "/"), err
}

func (w *testWorker) Credential(string, brokerwire.Volume) (brokerwire.Credentials, error) {
	return brokerwire.Credentials{}, nil
}

func (w *testWorker) handle(ctx context.Context, m brokerwire.Message, files []*os.File) (brokerwire.Message, []*os.File, error) {
	var err error
	switch m.Verb {
	case brokerwire.Adopt:
		err = w.adopt(m, files)
	case brokerwire.Serve:
		err = w.serve(m.Mount)
	case brokerwire.Listen:
		w.mu.Lock()
		w.listeners = append(w.listeners, files...)
		w.mu.Unlock()
		clear(files)
	case brokerwire.Drop:
		w.mu.Lock()
		s := w.served[m.Mount]
		if s == nil {
			s = w.adopted[m.Mount]
		}
		delete(w.served, m.Mount)
		delete(w.adopted, m.Mount)
		brokerwire.CloseFiles(w.listeners) // a socket keeps the file system that it is bound in
		w.listeners = nil
		w.mu.Unlock()
		if s != nil {
			s.End()
		}
	default:
		err = fmt.Errorf("verb %q: %w", m.Verb, object.ErrInvalid)
	}
	return brokerwire.Message{}, nil, err
}

func (w *testWorker) dataset(v brokerwire.Volume) *dataset.Dataset {
	deps := dataset.Deps{Sources: w, Metadata: w.meta, Fills: w.fills, Store: w.store}
	if v.Path != "" {
		w.mu.Lock()
		mounts := w.mounts
		w.mu.Unlock()
		return dataset.OpenPath(v, mounts, deps)
	}
	d, err := dataset.Open(v, deps)
	if err != nil {
		panic(err) // of a volume that a test wrote
	}
	return d
}

func (w *testWorker) adopt(m brokerwire.Message, files []*os.File) error {
	st, err := brokerwire.ReadState(files[1])
	if err != nil {
		return err
	}
	d := w.dataset(st.Volume)
	var b Broker = w
	if w.broker != nil {
		b = w.broker(w)
	}
	s, err := Adopt(Config{Volume: st.Volume, Dataset: d, Broker: b, Features: w.features, Counters: &w.counters, Log: w.log,
		logRequests: w.logRequests, allowWrites: w.lockOff}, files[0], files[1], files[2], m.Fresh, uuid)
	files[2] = nil
	if err != nil {
		return err
	}
	files[0], files[1] = nil, nil
	if w.compact > 0 {
		s.table.limit = brokerwire.StateLog + w.compact
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.adopted[m.Mount] = s
	if len(files) == 4 {
		w.listeners = append(w.listeners, files[3])
		files[3] = nil
	}
	return nil
}

func (w *testWorker) serve(id string) error {
	w.mu.Lock()
	s := w.adopted[id]
	delete(w.adopted, id)
	w.mu.Unlock()
	if s == nil {
		return fmt.Errorf("volume %q is not adopted: %w", id, object.ErrNotFound)
	}
	if err := s.CatchUp(); err != nil {
		return err
	}
	w.mu.Lock()
	w.served[id] = s
	w.mu.Unlock()
	w.serving.Go(s.Serve)
	return nil
}

func (w *testWorker) Register(ctx context.Context, volume string, node uint64, f *os.File) (int32, error) {
	r, _, err := w.peer.Call(ctx, brokerwire.Message{Verb: brokerwire.Register, Mount: volume, Node: node}, f)
	return r.Backing, err
}

func (w *testWorker) Unregister(ctx context.Context, volume string, backing int32) error {
	_, _, err := w.peer.Call(ctx, brokerwire.Message{Verb: brokerwire.Unregister, Mount: volume, Backing: backing})
	return err
}

func (w *testWorker) Replace(ctx context.Context, volume string, memfd *os.File) error {
	_, _, err := w.peer.Call(ctx, brokerwire.Message{Verb: brokerwire.Replace, Mount: volume}, memfd)
	return err
}

// options of a world; the zero value will do.
type options struct {
	volume   brokerwire.Volume // Freshness: below 0 is 0, 0 is an hour
	capacity int64
	memory   int64 // capacity of a faster tier on a tmpfs; 0 for none

	features *Features
	lockOff  bool
	broker   func(Broker) Broker
	compact  int64
	noWorker bool          // children will be the worker
	log      *slog.Logger  // also of each request
	source   source.Source // instead of the store in memory
	mounts   []record.Mount
}

// world is a broker, a worker in this process, and a volume that is mounted at path.
type world struct {
	*testWorker
	t      *testing.T
	dir    string
	path   string           // of the mount
	memory string           // a tier on a tmpfs; "" for none
	mem    *memsource.Store // the under store
	client *brokerwire.Client
}

func newWorld(t *testing.T, o options) *world {
	t.Helper()
	dir := t.TempDir()
	for d := dir; strings.HasPrefix(d, os.TempDir()); d = filepath.Dir(d) { // others than root come here too
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	w := &world{t: t, dir: dir, path: filepath.Join(dir, "mnt"), mem: &memsource.Store{Piece: 256 << 10}}
	for _, d := range []string{w.tier(), w.view()} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if o.memory > 0 {
		var err error
		if w.memory, err = os.MkdirTemp("/dev/shm", "larder-test-"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(w.memory) })
	}
	w.startBroker()
	if o.noWorker {
		return w
	}
	w.testWorker = &testWorker{log: testLog(t), src: w.mem.Source("p"), features: allFeatures, lockOff: o.lockOff,
		broker: o.broker, compact: o.compact, mounts: o.mounts}
	if o.features != nil {
		w.features = *o.features
	}
	if o.source != nil {
		w.src = o.source
	}
	if o.log != nil {
		w.log, w.logRequests = o.log, true
	}
	t.Cleanup(func() {
		w.unmount()
		if err := w.testWorker.close(); err != nil {
			t.Error(err)
		}
	})
	of := []tiers.Tier{{Store: w.cache(o.capacity)}}
	if o.memory > 0 {
		of = append(of, tiers.Tier{Kind: tiers.Memory, Store: cachestore.Config{Dir: w.memory, ViewDir: w.view() + "-memory", CapacityBytes: o.memory}})
	}
	if err := w.connect(w.socket(), of...); err != nil {
		t.Fatal(err)
	}
	w.mountVolume(o.volume)
	return w
}

// unmount takes the volume and its binds away, so that those who serve it end.
func (w *world) unmount() {
	w.t.Helper()
	for _, m := range leak.Mounts(w.dir) {
		if m.Type == broker.FSType && m.Point != w.path {
			if err := unix.Unmount(m.Point, unix.MNT_DETACH); err != nil {
				w.t.Error(err)
			}
		}
	}
	if err := w.client.Unmount(context.Background(), w.path); err != nil {
		w.t.Error(err)
	}
}

func (w *world) tier() string   { return filepath.Join(w.dir, "tier") }
func (w *world) view() string   { return filepath.Join(w.dir, "view") }
func (w *world) socket() string { return filepath.Join(w.dir, "broker.sock") }

func (w *world) cache(capacity int64) cachestore.Config {
	return cachestore.Config{Dir: w.tier(), ViewDir: w.view(), CapacityBytes: capacity}
}

// data is a path in the dataset.
func (w *world) data(name string) string { return filepath.Join(w.path, "data", name) }

func (w *world) startBroker() {
	w.t.Helper()
	dirs, views := []string{w.tier()}, []string{w.view()}
	if w.memory != "" {
		dirs, views = append(dirs, w.memory), append(views, w.view()+"-memory")
	}
	b, err := broker.New(broker.Config{Name: w.dir, Socket: w.socket(), TierDirs: dirs, ViewDirs: views,
		UnmountAtExit: true, Log: testLog(w.t)})
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	w.client = brokerwire.NewClient(w.socket())
	w.t.Cleanup(func() {
		w.client.Close()
		stop()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
		for _, v := range views {
			if err := broker.RemoveView(v); err != nil {
				w.t.Error(err)
			}
		}
	})
	eventually(w.t, "the broker listens", func() bool {
		_, err := w.client.Mounts(w.t.Context())
		return err == nil
	})
}

func (w *world) mountVolume(v brokerwire.Volume) {
	w.t.Helper()
	def := func(s *string, d string) {
		if *s == "" {
			*s = d
		}
	}
	def(&v.ID, "v")
	if v.Path == "" {
		def(&v.Source, "file:///set")
	}
	def((*string)(&v.Complete), string(brokerwire.CompleteNever))
	switch {
	case v.Freshness == 0:
		v.Freshness = time.Hour
	case v.Freshness < 0:
		v.Freshness = 0
	}
	if v.FileMode == 0 {
		v.FileMode, v.DirMode = 0o444, 0o555
	}
	if err := w.client.Mount(w.t.Context(), v, w.path); err != nil {
		w.t.Fatal(err)
	}
}

// put writes a file into the dataset.
func (w *world) put(name string, data []byte) object.Object { return w.mem.Put("set/"+name, data) }

// served is the volume's mount.
func (w *world) served() *Served { return w.mount("v") }

// node is what a path in the dataset leads to now; nil where the kernel never asked.
func (w *world) node(name string) *node {
	t := w.served().table
	t.mu.RLock()
	defer t.mu.RUnlock()
	n := t.nodes.get(dataID)
	for part := range strings.SplitSeq(name, "/") {
		if n = t.names.get(n, part); n == nil {
			return nil
		}
	}
	return n
}

// backing is the id of a node's backing file, 0 for none.
func (w *world) backing(n *node) int32 {
	t := w.served().table
	t.mu.RLock()
	defer t.mu.RUnlock()
	return n.file.backing
}

// complete reads a file so that it is complete in the cache.
func (w *world) complete(u *user, name string) {
	w.t.Helper()
	fd := u.open(w.data(name)) // so that the kernel forgets it not, which others may ask it for
	defer u.close(fd)
	u.sum(w.data(name))
	n := w.node(name)
	id := w.served().table.objectOf(n).ID()
	eventually(w.t, name+" is complete", func() bool { return w.store.Peek(id).Complete })
}

// bytesOf makes content that differs in every place and from file to file.
func bytesOf(seed uint64, size int) []byte {
	b := make([]byte, size)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)})
	r.Read(b)
	return b
}

// eventually asks again until a deadline, where nothing tells.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it never came that %s", what)
		}
	}
}

// testLog logs into the test until that has ended.
func testLog(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(&logWriter{t: t}, &slog.HandlerOptions{Level: slog.LevelWarn}))
}

type logWriter struct{ t *testing.T }

func (l *logWriter) Write(b []byte) (int, error) {
	if l.t.Context().Err() == nil { // not in cleanups, where who is late may be later than the test
		l.t.Log(strings.TrimSpace(string(b)))
	}
	return len(b), nil
}
