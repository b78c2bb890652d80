package fusefs

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
)

// Cold and warm readers of one file at once, through eviction and completion: no EIO, ever.
// The cache has room for a part of the files, so that they are evicted all the time; each is
// completed as soon as it is opened, so that it becomes passed through while others read it.
func TestNoEIOThroughEvictionAndCompletion(t *testing.T) {
	w := newWorld(t, options{capacity: 40 << 20, volume: brokerwire.Volume{Freshness: 50 * time.Millisecond, Complete: brokerwire.CompleteAlways}})
	var ids []object.ID
	for i := range 24 {
		size := 1<<20 + i*200_000 + i
		ids = append(ids, w.put(fmt.Sprintf("%d-%d", i, size), bytesOf(uint64(i), size)).ID())
	}
	const lasting = 20 * time.Second
	var users sync.WaitGroup
	for i := range 3 {
		u := newUser(t, 65534*(i%2))
		users.Go(func() {
			a := u.do(call{Op: "torture", Path: w.data("."), Len: 3, Off: int64(lasting)})
			t.Logf("user %d: %d reads", i, a.N)
			for _, bad := range a.Names {
				t.Errorf("user %d: %s", i, bad)
			}
			if a.N < 100 {
				t.Errorf("user %d read %d times", i, a.N)
			}
		})
	}
	stop, evicting := make(chan struct{}), make(chan struct{})
	go func() { // also what is open
		defer close(evicting)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				w.store.Evict(ids[rand.IntN(len(ids))])
			case <-stop:
				return
			}
		}
	}()
	users.Wait()
	close(stop)
	<-evicting
	s := w.store.Stats()
	f := w.fills.Stats()
	t.Logf("%d evictions, %d completed, %d READs, %d opens of a stale node", s.Evictions, f.Completed, w.counters.Reads.Load(), w.counters.Stale.Load())
	if s.Evictions < 50 || w.counters.Stale.Load() == 0 || f.Completed < 3 {
		t.Error("the test did not come to what it tests")
	}
}

// torture reads files named SEED-SIZE in a folder at random for some time, in some threads, and tells what was wrong.
func (c call) torture() (a answer, err error) {
	es, err := os.ReadDir(c.Path)
	if err != nil {
		return a, err
	}
	want := map[string][]byte{}
	var names []string
	for _, e := range es {
		var seed uint64
		var size int
		if _, err := fmt.Sscanf(e.Name(), "%d-%d", &seed, &size); err != nil {
			return a, err
		}
		names = append(names, e.Name())
		want[e.Name()] = bytesOf(seed, size)
	}
	end := time.Now().Add(time.Duration(c.Off))
	var mu sync.Mutex
	var threads sync.WaitGroup
	for range c.Len {
		threads.Go(func() {
			debug.SetPanicOnFault(true)
			held := map[string]int{} // open for longer
			for time.Now().Before(end) {
				name := names[int(float64(len(names))*rand.Float64()*rand.Float64())] // some more often
				n, err := tortureOne(filepath.Join(c.Path, name), want[name], held)
				mu.Lock()
				a.N += int64(n)
				if err != nil && len(a.Names) < 20 {
					a.Names = append(a.Names, fmt.Sprintf("%s: %v", name, err))
				}
				mu.Unlock()
			}
			for _, fd := range held {
				unix.Close(fd)
			}
		})
	}
	threads.Wait()
	return a, nil
}

func tortureOne(path string, want []byte, held map[string]int) (reads int, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("a mapped page: %v", r)
		}
	}()
	if rand.IntN(8) == 0 {
		return 1, tortureDirect(path, want)
	}
	fd, ok := held[path]
	if !ok {
		if fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return 0, fmt.Errorf("open: %w", err)
		}
	}
	if len(held) < 6 {
		held[path] = fd
	} else {
		delete(held, path)
		defer unix.Close(fd)
	}
	switch rand.IntN(4) {
	case 0: // all of it
		b := make([]byte, len(want)+1)
		n, err := preadFull(fd, b, 0)
		if err != nil || !bytes.Equal(b[:n], want) {
			return 1, fmt.Errorf("whole read of %d bytes: %d, %w", len(want), n, err)
		}
		return 1, nil
	case 1:
		m, err := unix.Mmap(fd, 0, len(want), unix.PROT_READ, []int{mapShared, mapPrivate}[rand.IntN(2)])
		if err != nil {
			return 0, fmt.Errorf("mmap: %w", err)
		}
		defer unix.Munmap(m)
		for range 8 {
			off := rand.IntN(len(want))
			n := min(rand.IntN(40_000), len(want)-off)
			if !bytes.Equal(m[off:off+n], want[off:off+n]) {
				return reads, fmt.Errorf("%d mapped bytes at %d are wrong", n, off)
			}
			reads++
		}
	default:
		for range 1 + rand.IntN(6) {
			off := rand.IntN(len(want))
			b := make([]byte, rand.IntN(200_000))
			n, err := preadFull(fd, b, int64(off))
			if right := want[off:min(off+len(b), len(want))]; err != nil || !bytes.Equal(b[:n], right) {
				return reads, fmt.Errorf("%d bytes at %d: %d, %w", len(right), off, n, err)
			}
			reads++
		}
	}
	return reads, nil
}

// tortureDirect reads with O_DIRECT, aligned, as a file that is passed through wants it.
func tortureDirect(path string, want []byte) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_DIRECT, 0)
	if err != nil {
		return fmt.Errorf("open directly: %w", err)
	}
	defer unix.Close(fd)
	b, err := unix.Mmap(-1, 0, 256<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return err
	}
	defer unix.Munmap(b)
	off := rand.IntN(len(want)) &^ 4095
	n, err := unix.Pread(fd, b, int64(off))
	if right := want[off:min(off+len(b), len(want))]; err != nil || !bytes.Equal(b[:n], right) {
		return fmt.Errorf("%d bytes at %d directly: %d, %w", len(right), off, n, err)
	}
	return nil
}
