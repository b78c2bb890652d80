package cachestore_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/larderfs/larder/cacheworker/cachestore"
	"github.com/larderfs/larder/cacheworker/fill"
	"github.com/larderfs/larder/cacheworker/fill/memsource"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

const (
	faultsWanted = 200
	readBound    = 20 * time.Second // of one read: far above what any takes, on the slowest machine
)

// lines counts what an operator would read.
type lines struct {
	slog.Handler
	warnings, errors atomic.Int64
}

func (l *lines) Handle(ctx context.Context, r slog.Record) error {
	switch r.Level {
	case slog.LevelError:
		l.errors.Add(1)
	case slog.LevelWarn:
		l.warnings.Add(1)
	}
	return l.Handler.Handle(ctx, r)
}

// TestReadsGoOnWhileTheDiskFails: every operation on cache files and on the index fails now and then, for a while each
// of them always, while readers compare each byte. Nothing is leaked, little is logged, and the tier is whole again
// afterwards.
func TestReadsGoOnWhileTheDiskFails(t *testing.T) {
	var ill atomic.Int32 // percent of the operations that fail
	r := rand.New(rand.NewPCG(rand.Uint64(), 1))
	var mu sync.Mutex
	var worst string // fails always
	log := &lines{Handler: slog.NewTextHandler(t.Output(), nil)}
	cfg := cachestore.Config{Dir: t.TempDir(), CapacityBytes: 24 << 20, BootID: "boot", Log: slog.New(log)}
	faults := cachestore.SetFaults(&cfg, func(op string) error {
		mu.Lock()
		defer mu.Unlock()
		if ill.Load() == 0 || op != worst && r.IntN(100) >= int(ill.Load()) {
			return nil
		}
		return []error{syscall.EIO, syscall.ENOSPC}[r.IntN(2)]
	})
	before := descriptors(t)
	cache, err := cachestore.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	fills := fill.New(fill.Config{Log: slog.New(log), RecentBytes: 2 << 20}, cache)
	store := &memsource.Store{}
	var objects []object.Object
	var contents [][]byte
	for n := range 16 {
		b := bytes.Repeat([]byte(fmt.Sprintf("%7d\n", n)), (n*n*2000+9)/8+1)
		for i := 0; i < len(b); i += 8 { // each place is another
			copy(b[i:], fmt.Sprintf("%07d", (i/8+n*31)%10000000))
		}
		contents = append(contents, b)
		objects = append(objects, store.Put(fmt.Sprint("o", n), b))
		objects[n].Store = store.Source("p").Store()
	}

	var wg sync.WaitGroup
	var reads atomic.Int64
	stop := make(chan struct{})
	for w := range uint64(4) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(w, 3))
			for {
				select {
				case <-stop:
					return
				default:
					readOne(t, r, fills.Open, store, objects, contents)
					reads.Add(1)
				}
			}
		})
	}
	for _, op := range []string{"none", "write", "read", "create", "index", "open", "unlink", "rename", "write back", "statfs"} {
		mu.Lock()
		worst = op
		mu.Unlock()
		ill.Store(3)
		count, done := faults.Count(), reads.Load()
		cachestore.Eventually(t, "faults and reads with a bad "+op, func() bool {
			return faults.Count() >= count+faultsWanted/10 && reads.Load() >= done+20
		})
		ill.Store(0)
		cachestore.Eventually(t, "the tier is back after a bad "+op, func() bool { return storesAgain(cache, op) })
	}
	close(stop)
	wg.Wait()
	st := cache.Stats()
	t.Logf("%d faults during %d reads: %d refused writes, %d bad chunks, %d warnings and %d errors logged", faults.Count(), reads.Load(),
		st.PutErrors, st.BadChunks, log.warnings.Load(), log.errors.Load())
	if n := log.warnings.Load() + log.errors.Load(); n > 4 {
		t.Errorf("%d lines logged", n)
	}
	for n := range objects { // whole files can be had of each
		rd := fills.Open(objects[n], store.Source("p"))
		if err := rd.Complete(t.Context()); err != nil {
			t.Errorf("object %d: %v", n, err)
		}
		rd.Close()
	}
	if err := fills.Close(); err != nil {
		t.Error(err)
	}
	cachestore.Eventually(t, "nothing is held", func() bool {
		st := cache.Stats()
		return st.UnlinkedBytes == 0 && st.LeasedObjects == 0
	})
	cachestore.CheckInvariants(t, cache)
	if err := cache.Close(); err != nil {
		t.Error(err)
	}
	if after := descriptors(t); after > before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

// readOne reads a piece of an object and compares it.
func readOne(t *testing.T, r *rand.Rand, open func(object.Object, source.Source) *fill.Reader, store *memsource.Store, objects []object.Object, contents [][]byte) {
	n := r.IntN(len(objects))
	want := contents[n]
	off := r.IntN(len(want))
	p := make([]byte, min(len(want)-off, 1+r.IntN(400<<10)))
	rd := open(objects[n], store.Source("p"))
	defer rd.Close()
	ctx, cancel := context.WithTimeout(t.Context(), readBound)
	defer cancel()
	got, err := rd.ReadAt(ctx, p, int64(off))
	if err != nil || got != len(p) || !bytes.Equal(p, want[off:off+len(p)]) {
		t.Errorf("object %d: %d of %d bytes at %d: %v; wrong bytes: %v", n, got, len(p), off, err, !bytes.Equal(p[:got], want[off:off+got]))
	}
}

// storesAgain reports whether a chunk can be put.
func storesAgain(s *cachestore.Store, name string) bool {
	f, err := s.Open(object.Object{Store: "s3://host/probe", Key: name, Version: "1", Size: 1})
	if err != nil {
		return false
	}
	defer f.Close()
	return f.Put(0, []byte("x")) == nil
}

func descriptors(t *testing.T) (n int) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.HasPrefix(to, "/") {
			n++
		}
	}
	return n
}
