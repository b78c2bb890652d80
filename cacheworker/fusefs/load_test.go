package fusefs

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
)

// know notes n nodes that a kernel holds: a folder for each 1000, one file in a hundred passed through.
func (t *table) know(n int) {
	now := time.Now()
	var dir *node
	for i := range n {
		if i%1000 == 0 {
			dir = t.folder(t.nodes.get(dataID), fmt.Sprintf("part=%05d", i/1000))
			t.referenced(dir)
			continue
		}
		obj := object.Object{Version: fmt.Sprintf("%032x", i), Size: 1 << 20, ModTime: now}
		want := cached
		if i%100 == 1 {
			want = passthrough
		}
		f := t.incarnation(dir, 0, obj, fmt.Sprintf("part-%05d-of-%05d.parquet", i%1000, n), want, now, nil)
		t.referenced(f)
		if want == passthrough {
			t.setBacking(f, int32(i))
			t.setOpens(f, 1)
		}
	}
}

// BenchmarkLoad1MNodes is what a worker reads before its first answer when the kernel knows a million
// nodes. The processor's time is told beside the clock's, which others share.
func BenchmarkLoad1MNodes(b *testing.B) {
	const nodes = 1_000_000
	log := newLog(b)
	testTable(log).know(nodes)
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
		t := testTable(log)
		if err := t.load(); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		cpu += cpuTime(b) - before
		b.ReportMetric(float64(heapBytes()-heap)/nodes, "heap-B/node")
		if t.nodes.len() < nodes {
			b.Fatalf("%d nodes", t.nodes.len())
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

var knownNodes = flag.Int("known-nodes", 20_000, "how many nodes a worker that takes over reads in TestManyKnownNodesAreTakenOver")

// A worker that is killed while the kernel knows many nodes is followed by one that knows them. What
// is printed is the answer's time from the SIGKILL on, the start of a process with it; with
// -known-nodes=1000000 that is the figure of a large node.
func TestManyKnownNodesAreTakenOver(t *testing.T) {
	w := newTakeover(t)
	first := w.startWorker()
	w.mountVolume(brokerwire.Volume{Source: "file:///"})
	fd := w.u.open(w.data("cold"), unix.O_DIRECT)
	first.stop() // it notes nothing more, and answers nothing
	blocked := w.u.ask(call{Op: "pread", FD: fd, Off: 1 << 20, Len: 4096})
	tab := testTable(w.memfd())
	if err := tab.load(); err != nil {
		t.Fatal(err)
	}
	tab.know(*knownNodes)

	killed := time.Now()
	first.kill()
	second := w.startWorker("GOGC=off") // as a worker has it at first
	a := await(t, blocked, "the blocked read")
	took := time.Since(killed)
	if a.Errno != 0 || !bytes.Equal(a.Data, w.want["cold"][1<<20:1<<20+4096]) {
		t.Errorf("the blocked read: %d bytes, %v", len(a.Data), a.Errno)
	}
	if n, err := strconv.Atoi(second.ask("nodes")); n < *knownNodes {
		t.Errorf("the second worker knows %d of %d nodes: %v", n, *knownNodes, err)
	}
	t.Logf("%d nodes: answered %v after the SIGKILL", *knownNodes, took)
	w.u.close(fd)
}

// stop returns when no thread of it runs.
func (p *process) stop() {
	p.t.Helper()
	if err := p.cmd.Process.Signal(unix.SIGSTOP); err != nil {
		p.t.Fatal(err)
	}
	if err := unix.Waitid(unix.P_PID, p.cmd.Process.Pid, nil, unix.WSTOPPED|unix.WNOWAIT, nil); err != nil {
		p.t.Fatal(err)
	}
}

// memfd is what the broker, which is in this process, holds of the mount.
func (w *world) memfd() *os.File {
	w.t.Helper()
	names, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		w.t.Fatal(err)
	}
	for _, name := range names {
		if link, _ := os.Readlink(name); !strings.Contains(link, "memfd:larder-mount") {
			continue
		}
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			continue
		}
		if st, err := brokerwire.ReadState(f); err == nil && strings.HasPrefix(st.Path, w.dir) {
			w.t.Cleanup(func() { f.Close() })
			return f
		}
		f.Close()
	}
	w.t.Fatal("the broker holds nothing")
	return nil
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
