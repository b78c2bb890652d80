package domainsocket

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
)

// folder serves real files of a directory, as the worker serves its cache.
type folder struct {
	dir        string
	incomplete atomic.Bool // no descriptors
	open       atomic.Int32
	slowReads  atomic.Int32 // of the file "slow"
	closed     chan string  // paths of files that the server closed

	mu       sync.Mutex
	versions map[string]string
	hold     chan struct{} // if set, Stat waits for it or its context
	holding  chan error    // if set, told when Stat waits (nil) and why it stopped
}

func newFolder(t testing.TB) *folder {
	return &folder{dir: t.TempDir(), closed: make(chan string, 1<<16), versions: map[string]string{}}
}

// write makes a file of n random bytes in the folder.
func (v *folder) write(t testing.TB, name string, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(n), byte(len(name))})
	r.Read(b)
	p := filepath.Join(v.dir, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return b
}

func (v *folder) replace(name, version string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.versions[name] = version
}

func (v *folder) version(name string) string {
	v.mu.Lock()
	defer v.mu.Unlock()
	if s := v.versions[name]; s != "" {
		return s
	}
	return "v1"
}

func sentinel(err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return object.ErrNotFound
	case err != nil:
		return fmt.Errorf("%w: %w", object.ErrInvalid, err)
	}
	return nil
}

func (v *folder) entry(p string) (Entry, error) {
	fi, err := os.Stat(filepath.Join(v.dir, p))
	if err != nil {
		return Entry{}, sentinel(err)
	}
	if fi.IsDir() {
		return Entry{Name: path.Base(p), Folder: true}, nil
	}
	return Entry{Name: path.Base(p), Size: fi.Size(), Version: v.version(p), ModTime: fi.ModTime(), CachedBytes: fi.Size()}, nil
}

func (v *folder) Stat(ctx context.Context, p string) (Entry, error) {
	v.mu.Lock()
	hold, holding := v.hold, v.holding
	v.mu.Unlock()
	if hold != nil {
		holding <- nil
		select {
		case <-hold:
		case <-ctx.Done():
			holding <- context.Cause(ctx)
			return Entry{}, context.Cause(ctx)
		}
	}
	switch p {
	case "secret":
		return Entry{}, fmt.Errorf("%w: no grant", object.ErrDenied)
	case "broken":
		return Entry{}, errors.New("something else")
	}
	return v.entry(p)
}

func (v *folder) List(_ context.Context, p, after string, n int) ([]Entry, bool, error) {
	des, err := os.ReadDir(filepath.Join(v.dir, p))
	if err != nil {
		return nil, false, sentinel(err)
	}
	var out []Entry
	for _, de := range des {
		if de.Name() <= after {
			continue
		}
		if len(out) == n {
			return out, true, nil
		}
		e, err := v.entry(path.Join(p, de.Name()))
		if err != nil {
			return nil, false, err
		}
		out = append(out, e)
	}
	return out, false, nil
}

func (v *folder) Open(_ context.Context, p string) (File, error) {
	e, err := v.entry(p)
	if err != nil {
		return nil, err
	}
	if e.Folder {
		return nil, fmt.Errorf("%w: a folder", object.ErrInvalid)
	}
	f, err := os.Open(filepath.Join(v.dir, p))
	if err != nil {
		return nil, err
	}
	v.open.Add(1)
	return &folderFile{v, p, e, f}, nil
}

func (v *folder) Status(context.Context) Status {
	return Status{VolumeID: "vol-1", Worker: "6ba7b810-9dad-11d1-80b4-00c04fd430c8", CachedBytes: 7, CapacityBytes: 70}
}

type folderFile struct {
	v *folder
	p string
	e Entry
	f *os.File
}

func (f *folderFile) Object() object.Object {
	return object.Object{Store: "file:///t", Key: f.p, Version: f.e.Version, Size: f.e.Size, ModTime: f.e.ModTime}
}

func (f *folderFile) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	if f.p == "slow" {
		f.v.slowReads.Add(1)
	}
	if f.v.version(f.p) != f.e.Version {
		return 0, object.ErrChanged
	}
	return f.f.ReadAt(p, off)
}

func (f *folderFile) Descriptor() (*os.File, error) {
	if f.v.incomplete.Load() {
		return nil, object.ErrIncomplete
	}
	return os.Open(filepath.Join(f.v.dir, f.p))
}

func (f *folderFile) Close() error {
	f.v.open.Add(-1)
	f.v.closed <- f.p
	return f.f.Close()
}

// released waits until the server has closed a file.
func (v *folder) released(t testing.TB) string {
	t.Helper()
	select {
	case p := <-v.closed:
		return p
	case <-time.After(30 * time.Second):
		t.Fatal("the lease was not given up")
		return ""
	}
}

// worker is a server that can be stopped and started on a socket that the test holds, as
// the broker does.
type worker struct {
	t    testing.TB
	cfg  Config
	path string
	held *net.UnixListener
	stop context.CancelFunc
	done chan error
}

func newWorker(t testing.TB, cfg Config) *worker {
	t.Helper()
	dir, err := os.MkdirTemp("", "ds")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &worker{t: t, cfg: cfg, path: filepath.Join(dir, "s")}
	w.held, err = net.ListenUnix("unix", &net.UnixAddr{Name: w.path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		w.halt()
		w.held.Close()
	})
	w.start()
	return w
}

func (w *worker) start() {
	w.t.Helper()
	f, err := w.held.File()
	if err != nil {
		w.t.Fatal(err)
	}
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	w.stop, w.done = stop, make(chan error, 1)
	go func() { w.done <- New(w.cfg).Serve(ctx, l.(*net.UnixListener)) }()
}

func (w *worker) halt() {
	if w.stop == nil {
		return
	}
	w.stop()
	if err := <-w.done; err != nil {
		w.t.Errorf("Serve: %v", err)
	}
	w.stop = nil
}

// descriptors of this process.
func descriptors(t testing.TB) []string {
	t.Helper()
	des, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, de := range des {
		to, err := os.Readlink("/proc/self/fd/" + de.Name())
		if err == nil && !strings.HasSuffix(to, "/fd") && !strings.Contains(to, "anon_inode") {
			out = append(out, to)
		}
	}
	slices.Sort(out)
	return out
}

// noLeak fails the test if it ends with other descriptors than it began with. To be
// called before anything else registers a clean-up.
func noLeak(t testing.TB) {
	t.Helper()
	before := descriptors(t)
	t.Cleanup(func() {
		if after := descriptors(t); len(after) != len(before) {
			t.Errorf("descriptors before: %q\nafter: %q", before, after)
		}
	})
}
