package fusefs

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
	"github.com/larderfs/larder/cacheworker/source/s3"
	"github.com/larderfs/larder/sanity/s3test"
)

var storeFaults = flag.Int("store-faults", 300, "how many faults TestStoreFaultsDuringReads injects")

// TestStoreFaultsDuringReads reads and lists through the mount while a third of the store's answers, and of the
// names that are resolved, are faults. Every byte is compared. What a reader gets is right, or an errno of
// SEMANTICS.md, and it gets it in time; when all is over no descriptor is left, and everything reads.
func TestStoreFaultsDuringReads(t *testing.T) {
	const (
		files    = 60
		readers  = 32
		timeout  = 150 * time.Millisecond
		patience = 3 * time.Second
		bound    = 10 * patience // of one open, read and close: a HEAD or LIST per folder, HEAD, GET, and all once more by the kernel
	)
	srv := s3test.Start(t)
	want := map[string][]byte{}
	var objects []object.ID
	for i := range files {
		name := fmt.Sprintf("d%d/f%03d", i%4, i)
		want[name] = bytesOf(uint64(i), []int{1, 4096, 70_000, 400_000, 1<<20 + 5}[i%5])
		if _, err := srv.Put("set/"+name, want[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := srv.Age(time.Hour); err != nil {
		t.Fatal(err)
	}
	dns := newResolver()
	counter := &source.Counter{}
	src, err := s3.New(s3.Config{
		Bucket: srv.Bucket, Endpoint: srv.Endpoint, Region: srv.Region, PathStyle: true, NodeKey: []byte("n"),
		Credentials:    s3.Credentials{AccessKeyID: srv.AccessKey, SecretAccessKey: srv.SecretKey},
		RequestTimeout: timeout, IdleTimeout: timeout, Patience: patience, Backoff: time.Millisecond,
		Transport: dns.tr, Observer: counter,
		Guard: source.NewGuard(source.GuardConfig{Pause: 5 * time.Millisecond, MaxPause: 50 * time.Millisecond, Hold: time.Second, RetriesPerS: 500}),
	})
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, options{source: src, volume: brokerwire.Volume{Source: "s3://" + srv.Bucket + "/set", Freshness: -1}, features: &Features{Resend: true}})
	names := slices.Sorted(maps.Keys(want))
	for _, name := range names {
		obj, err := src.Head(t.Context(), "set/"+name)
		if err != nil {
			t.Fatal(err)
		}
		objects = append(objects, obj.ID())
	}
	u := newUser(t, 0)
	before := openFiles(t)

	storm := s3test.NewStorm(1, 0.3, s3test.AllFaults(timeout)...)
	injected := func() int { _, n := storm.Injected(); return n + int(dns.failed.Load()) }
	srv.SetHook(storm.Hook())
	share := 0.3
	dns.share.Store(&share)
	var mu sync.Mutex // guards the fields below
	errnos, calls, longest := map[syscall.Errno]int{}, 0, time.Duration(0)
	var wg sync.WaitGroup
	for r := range readers {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(r), 0))
			for injected() < *storeFaults && !t.Failed() {
				i := rnd.IntN(files)
				c := call{Op: "sum", Path: w.data(names[i])}
				if rnd.IntN(4) == 0 {
					c = call{Op: "readdir", Path: filepath.Dir(c.Path)}
				}
				start := time.Now()
				a := u.do(c)
				took := time.Since(start)
				mu.Lock()
				errnos[a.Errno]++
				calls++
				longest = max(longest, took)
				mu.Unlock()
				switch {
				case took > bound:
					t.Errorf("%s %s took %v", c.Op, c.Path, took)
				case a.Errno != 0 && a.Errno != syscall.EIO && a.Errno != syscall.ESTALE:
					t.Errorf("%s %s: %v", c.Op, c.Path, a.Errno)
				case a.Errno == 0 && c.Op == "sum" && a.Sum != sumOf(want[names[i]]):
					t.Errorf("%s: wrong bytes", c.Path)
				case a.Errno == 0 && c.Op == "readdir" && len(a.Names) != files/4:
					t.Errorf("%s: %q", c.Path, a.Names)
				}
				w.store.Evict(objects[i])
			}
		})
	}
	wg.Wait()
	byName, _ := storm.Injected()
	byName["name not resolved"] = int(dns.failed.Load())
	t.Logf("%d faults in %d requests: %v", injected(), counter.Lists.Load()+counter.Heads.Load()+counter.Gets.Load(), byName)
	t.Logf("%d calls, the longest %v, errnos %v", calls, longest, errnos)
	if n := calls - errnos[0]; n > calls/10 {
		t.Errorf("%d of %d calls failed", n, calls)
	}

	srv.SetHook(nil)
	dns.share.Store(nil)
	for _, name := range names {
		if got := u.sum(w.data(name)); got != sumOf(want[name]) {
			t.Errorf("afterwards: %s: wrong bytes", name)
		}
	}
	for _, id := range objects {
		w.store.Evict(id)
	}
	w.forget()
	eventually(t, "all files and connections are closed", func() bool {
		dns.tr.CloseIdleConnections()
		w.forget()
		return dns.open.Load() == 0 && openFiles(t) <= before
	})
	if s := w.fills.Stats(); s.InFlightBytes != 0 {
		t.Errorf("%d bytes are still in flight", s.InFlightBytes)
	}
}

// resolver is how names are resolved for a transport: not, now and then. It counts connections.
type resolver struct {
	tr     *http.Transport
	share  atomic.Pointer[float64] // of dials that fail; nil is none
	failed atomic.Int64
	open   atomic.Int64
}

func newResolver() *resolver {
	r := &resolver{tr: s3.NewTransport(s3.TransportConfig{})}
	dial := r.tr.DialContext
	r.tr.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if share := r.share.Load(); share != nil && rand.Float64() < *share {
			r.failed.Add(1)
			return nil, &net.OpError{Op: "dial", Net: network, Err: &net.DNSError{Err: "no such host", Name: addr, IsNotFound: true}}
		}
		c, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		r.open.Add(1)
		return &countedConn{Conn: c, closed: sync.OnceFunc(func() { r.open.Add(-1) })}, nil
	}
	return r
}

type countedConn struct {
	net.Conn
	closed func()
}

func (c *countedConn) Close() error {
	c.closed()
	return c.Conn.Close()
}

// openFiles is how many descriptors this process has that are no sockets: the store's other side is in it, too.
func openFiles(t *testing.T) (n int) {
	t.Helper()
	es, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range es {
		link, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if !strings.HasPrefix(link, "/proc/") && !strings.HasPrefix(link, "socket:") {
			n++
		}
	}
	return n
}
