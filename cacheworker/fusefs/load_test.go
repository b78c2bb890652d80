package fusefs

import (
	"fmt"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
)

// known writes the log of a worker whose kernel holds n nodes: a folder for each 1000, one file in a
// hundred passed through.
func known(t testing.TB, n int) *os.File {
	t.Helper()
	log := newLog(t)
	tab := newTable(log, testStore, "set/")
	now := time.Now()
	var dir *node
	for i := range n {
		if i%1000 == 0 {
			dir = tab.folder(tab.nodes.get(dataID), fmt.Sprintf("part=%05d", i/1000))
			tab.referenced(dir)
			continue
		}
		obj := object.Object{Version: fmt.Sprintf("%032x", i), Size: 1 << 20, ModTime: now}
		want := cached
		if i%100 == 1 {
			want = passthrough
		}
		f := tab.incarnation(dir, obj, fmt.Sprintf("part-%05d-of-%05d.parquet", i%1000, n), want, now, nil)
		tab.referenced(f)
		if want == passthrough {
			tab.setBacking(f, int32(i))
			tab.setOpens(f, 1)
		}
	}
	return log
}

// BenchmarkLoad1MNodes is what a worker reads before its first answer when the kernel knows a million
// nodes. The processor's time is told beside the clock's, which others share.
func BenchmarkLoad1MNodes(b *testing.B) {
	const nodes = 1_000_000
	log := known(b, nodes)
	st, err := log.Stat()
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(st.Size()-brokerwire.StateLog)/nodes, "log-B/node")
	var cpu time.Duration
	for b.Loop() {
		b.StopTimer()
		heap, before := heapBytes(), cpuTime(b)
		b.StartTimer()
		t := newTable(log, testStore, "set/")
		if err := t.load(); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		cpu += cpuTime(b) - before
		b.ReportMetric(float64(heapBytes()-heap)/nodes, "heap-B/node")
		if t.nodes.len() < nodes || t.names.len() < nodes {
			b.Fatalf("%d nodes, %d names", t.nodes.len(), t.names.len())
		}
		b.StartTimer()
	}
	b.ReportMetric(float64(cpu.Milliseconds())/float64(b.N), "cpu-ms/op")
}

func heapBytes() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func cpuTime(t testing.TB) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// TestNamesOfOneHashAreKeptApart, which chance does not show.
func TestNamesOfOneHashAreKeptApart(t *testing.T) {
	dir := &node{id: dataID}
	a, b, again := &node{id: 16, parent: dir, name: "a"}, &node{id: 17, parent: dir, name: "b"}, &node{id: 18, parent: dir, name: "a"}
	m := newNameMap()
	h := m.hash(dir.id, "a")
	m.byHash[h] = b // as if b had it, too
	if was := m.set(a); was != nil || m.get(dir, "a") != a {
		t.Errorf("a led to %v, and leads to %v", was, m.get(dir, "a"))
	}
	if was := m.set(again); was != a || m.get(dir, "a") != again || again.sameHash != b || a.sameHash != nil {
		t.Errorf("a led to %v; in a row: %v", was, again)
	}
	m.remove(a) // its name leads elsewhere
	if m.get(dir, "a") != again {
		t.Error("a is forgotten")
	}
	m.remove(again)
	if m.get(dir, "a") != nil || m.byHash[h] != b {
		t.Error("a is there, or b is not")
	}
}
