package fusefs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/dataset"
	"github.com/larderfs/larder/cacheworker/object"
)

const testStore = object.Store("memory://test")

// testTable is that of a volume of a source.
func testTable(log *os.File) *table {
	t := newTable(log)
	t.setOrigins([]origin{{Origin: dataset.Origin{Store: testStore}}})
	return t
}

func newLog(t testing.TB) *os.File {
	t.Helper()
	f, err := brokerwire.NewState(brokerwire.State{Volume: brokerwire.Volume{ID: "v"}, Path: "/mnt"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func loaded(t testing.TB, log *os.File) *table {
	t.Helper()
	n := testTable(log)
	if err := n.load(); err != nil {
		t.Fatal(err)
	}
	n.sweep()
	return n
}

// image is what the next worker must know of a table: the nodes that the kernel may name, and
// where names lead.
func image(t *table) []string {
	var out []string
	needed := map[uint64]bool{}
	for n := range t.nodes.all() {
		for p := n; n.lookups > 0 || n.kind == socketKind; p = p.parent {
			needed[p.id] = true
			if p.id == rootID {
				break
			}
		}
	}
	for n := range t.nodes.all() {
		if !needed[n.id] || n.id < firstFree {
			continue
		}
		s := fmt.Sprintf("%d in %d %q key %q kind %d lookups %d", n.id, n.parent.id, n.name, n.key, n.kind, n.lookups)
		if t.names.get(n.parent, n.name) == n {
			s += " named"
		}
		if f := n.file; f != nil {
			s += fmt.Sprintf(" version %s size %d mtime %d mode %d backing %d opens %d stale %v from %+v", f.version, f.size, f.mtime, f.mode,
				f.backing, n.opens(), f.stale, t.origin(f.origin))
			if slices.Contains(t.backed[t.objectOf(n).ID()], n) {
				s += " backed"
			}
		}
		out = append(out, s)
	}
	slices.Sort(out)
	return out
}

// consistent checks what holds of every table.
func consistent(t testing.TB, tab *table) {
	t.Helper()
	kids := map[*node]int32{}
	count := 0
	for n := range tab.nodes.all() {
		id := n.id
		if tab.nodes.get(id) != n || tab.nodes.get(n.parent.id) != n.parent {
			t.Fatalf("node %d or its parent %d is not in the table", id, n.parent.id)
		}
		count++
		if id != rootID {
			kids[n.parent]++
		}
		if id >= tab.nextID {
			t.Fatalf("node %d will be made again", id)
		}
	}
	for n := range tab.nodes.all() {
		if n.kids != kids[n] {
			t.Fatalf("node %d has %d kids and counts %d", n.id, kids[n], n.kids)
		}
	}
	if count != tab.nodes.len() {
		t.Fatalf("%d nodes, counted as %d", count, tab.nodes.len())
	}
	for n := range tab.names.all() {
		if tab.nodes.get(n.id) != n || tab.names.get(n.parent, n.name) != n {
			t.Fatalf("name %q in %d leads to node %d", n.name, n.parent.id, n.id)
		}
	}
	for _, ns := range tab.backed {
		for _, n := range ns {
			if n.file.backing == 0 {
				t.Fatalf("node %d has no backing file", n.id)
			}
		}
	}
}

func same(t *testing.T, when string, got, want *table) {
	t.Helper()
	consistent(t, got)
	g, w := image(got), image(want)
	for i := range max(len(g), len(w)) {
		switch {
		case i >= len(g):
			t.Fatalf("%s: missing %s", when, w[i])
		case i >= len(w):
			t.Fatalf("%s: too many: %s", when, g[i])
		case g[i] != w[i]:
			t.Fatalf("%s:\n got %s\nwant %s", when, g[i], w[i])
		}
	}
	if got.nextID != want.nextID {
		t.Fatalf("%s: next id %d, want %d", when, got.nextID, want.nextID)
	}
}

// model does random operations on a table.
type model struct {
	*table
	r *rand.Rand
}

func (m *model) any(ok func(*node) bool) *node {
	var ns []*node
	for n := range m.nodes.all() {
		if ok(n) {
			ns = append(ns, n)
		}
	}
	if len(ns) == 0 {
		return nil
	}
	slices.SortFunc(ns, func(a, b *node) int { return int(a.id) - int(b.id) })
	return ns[m.r.IntN(len(ns))]
}

// someOrigin is one of a few, whose spec changes now and then: as of a volume that mounts are shown to.
func (m *model) someOrigin() uint16 {
	at := m.r.IntN(4)
	if at == 0 {
		return 0
	}
	o := dataset.Origin{Store: testStore, Prefix: fmt.Sprint("p", at, "/")}
	n, err := m.number(origin{o, fmt.Sprint("spec", m.r.IntN(20)/19)})
	if err != nil {
		panic(err)
	}
	return n
}

func (m *model) step() {
	m.mu.Lock()
	locked := true
	defer func() {
		if locked {
			m.mu.Unlock()
		}
	}()
	never := func(*file) bool { return false }
	folder := func(n *node) bool { return n.kind == dirKind }
	isFile := func(n *node) bool { return n.kind == fileKind }
	name := strings.Repeat(fmt.Sprint("n", m.r.IntN(12)), 1+m.r.IntN(3))
	switch m.r.IntN(12) {
	case 0, 1:
		m.referenced(m.folder(m.any(folder), name))
	case 2, 3, 4:
		p := m.any(folder)
		obj := object.Object{Store: testStore, Key: p.key + name, Version: fmt.Sprint("v", m.r.IntN(3)), Size: m.r.Int64N(3), ModTime: time.Unix(m.r.Int64N(9), 7)}
		n := m.incarnation(p, m.someOrigin(), obj, name, mode(m.r.IntN(2)), time.Time{}, never)
		if m.r.IntN(5) > 0 {
			m.referenced(n)
		}
	case 5:
		if n := m.any(isFile); n != nil {
			m.setBacking(n, m.r.Int32N(3))
		}
	case 6:
		if n := m.any(isFile); n != nil {
			m.setOpens(n, m.r.Int32N(4))
		}
	case 7:
		m.referenced(m.socket(fmt.Sprint("uuid", m.r.IntN(3))))
	case 8: // a position
		n := m.any(func(n *node) bool { return n.id >= firstFree })
		if n != nil {
			n.pins++
		}
	case 9:
		if n := m.any(func(n *node) bool { return n.pins > 0 }); n != nil {
			n.pins--
			m.drop(n)
		}
	default:
		n := m.any(func(n *node) bool { return n.id >= firstFree })
		m.mu.Unlock()
		locked = false
		if n != nil {
			if gone := m.forget(n.id, 1+m.r.Uint64N(n.lookups+1)); gone != nil && gone.file != nil && gone.file.backing != 0 {
				m.mu.Lock()
				m.setBacking(gone, 0) // as letGo does
				m.mu.Unlock()
			}
		}
	}
}

func newModel(t *testing.T) *model {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	t.Log("seed", seed)
	return &model{testTable(newLog(t)), rand.New(rand.NewPCG(seed, 1))}
}

func TestTheNextWorkerKnowsTheSameNodes(t *testing.T) {
	m := newModel(t)
	for range 30 {
		for range 50 {
			m.step()
		}
		consistent(t, m.table)
		same(t, "after a take-over", loaded(t, m.log), m.table)
	}
	// The next one goes on in the same log.
	for range 20 {
		m.table = loaded(t, m.log)
		for range 50 {
			m.step()
		}
		same(t, "after many", loaded(t, m.log), m.table)
	}
	if len(image(m.table)) == 0 {
		t.Error("nothing was tested")
	}
}

// A worker that is to take over reads on while the one before it still writes, however often, and
// whatever is half written when it looks.
func TestTheNextWorkerReadsOnWhileThisOneWrites(t *testing.T) {
	m := newModel(t)
	next := testTable(m.log)
	for range 300 {
		for range m.r.IntN(20) {
			m.step()
		}
		torn := nodeRecord(nil, &node{id: m.nextID, parent: m.nodes.get(dataID), name: "torn", kind: dirKind})
		if _, err := m.log.WriteAt(torn[:m.r.IntN(len(torn))], m.end); err != nil {
			t.Fatal(err)
		}
		if err := next.load(); err != nil {
			t.Fatal(err)
		}
		if next.end != m.end {
			t.Fatalf("it has read up to %d, written is %d", next.end, m.end)
		}
		same(t, "read on", next, m.table)
	}
	next.sweep()
	same(t, "swept", next, m.table)
	same(t, "read at once", loaded(t, m.log), next)
}

func TestATornRecordAndWhatIsBehindItAreIgnored(t *testing.T) {
	m := newModel(t)
	for range 200 {
		m.step()
	}
	want, end := loaded(t, m.log), m.end
	last := nodeRecord(nil, &node{id: m.nextID, parent: m.nodes.get(dataID), name: "torn", kind: dirKind})
	for cut := range len(last) { // any length of it was written, and rubbish of before is behind
		log := copyLog(t, m.log, end)
		if _, err := log.WriteAt(append(slices.Clone(last[:cut]), 0xff, 0xff, 3), end); err != nil {
			t.Fatal(err)
		}
		got := loaded(t, log)
		same(t, fmt.Sprint(cut, " bytes written"), got, want)
		if got.end != end {
			t.Fatalf("%d bytes written: it goes on at %d, want %d", cut, got.end, end)
		}
		got.folder(got.nodes.get(dataID), "next").lookups++ // goes on there
		got.append(countRecord(nil, recLookup, got.nextID-1, 1))
		same(t, "then", loaded(t, log), got)
	}
	for i := range 40 { // a bit that has changed
		log := copyLog(t, m.log, end)
		at := brokerwire.StateLog + rand.Int64N(end-brokerwire.StateLog)
		b := make([]byte, 1)
		if _, err := log.ReadAt(b, at); err != nil {
			t.Fatal(err)
		}
		b[0] ^= 1 << (i % 8)
		if _, err := log.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
		got := loaded(t, log)
		consistent(t, got)
		if got.end > at {
			t.Errorf("a record with a changed byte at %d was taken: the log ends at %d", at, got.end)
		}
	}
}

func copyLog(t *testing.T, log *os.File, end int64) *os.File {
	t.Helper()
	b := make([]byte, end)
	if _, err := log.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	f := newLog(t)
	if _, err := f.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return f
}

func TestCompactionKeepsEverything(t *testing.T) {
	m := newModel(t)
	for round := range 12 {
		for range 100 {
			m.step()
		}
		old, before := m.log, m.end
		fresh, err := m.startCompaction()
		if err != nil {
			t.Fatal(err)
		}
		same(t, "at once", loaded(t, fresh), m.table)
		for range 30 { // while the broker is asked
			m.step()
		}
		same(t, "the new log", loaded(t, fresh), m.table)
		same(t, "the old log", loaded(t, old), m.table)
		taken := round%3 > 0
		m.settle(taken)
		if (m.log == fresh) != taken {
			t.Fatal("the log is not the one the broker has")
		}
		if taken && m.end > before+3000 {
			t.Errorf("compacted from %d to %d bytes", before, m.end)
		}
		for range 30 {
			m.step()
		}
		same(t, "afterwards", loaded(t, m.log), m.table)
	}
}

func TestTheLogIsCompactedWhenItHasGrown(t *testing.T) {
	m := newModel(t)
	asked := 0
	m.grown = func() { asked++ }
	m.limit = m.end + 10_000
	grow := func(n int) {
		for range n {
			m.mu.Lock()
			m.referenced(m.nodes.get(dataID))
			m.mu.Unlock()
		}
	}
	grow(200)
	if asked != 0 {
		t.Errorf("asked after %d bytes", m.end-brokerwire.StateLog)
	}
	grow(1000)
	if asked != 1 {
		t.Errorf("asked %d times, want once", asked)
	}
	if _, err := m.startCompaction(); err != nil {
		t.Fatal(err)
	}
	grow(1000)
	m.settle(false) // the broker refused
	grow(10)
	if asked != 1 {
		t.Error("asked again at once after a refusal")
	}
	grow(3000)
	if asked != 2 {
		t.Errorf("asked %d times, want twice", asked)
	}
	if _, err := m.startCompaction(); err != nil {
		t.Fatal(err)
	}
	m.settle(true)
	if m.limit != brokerwire.StateLog+minCompact {
		t.Errorf("the next limit is %d", m.limit)
	}
}

// replacer is a broker that takes compacted logs, or not.
type replacer struct {
	Broker
	mu    sync.Mutex
	err   error
	calls int
	taken int
}

func (r *replacer) Replace(ctx context.Context, id string, f *os.File) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls++
	if r.err != nil {
		return r.err
	}
	err := r.Broker.Replace(ctx, id, f)
	if err == nil {
		r.taken++
	}
	return err
}

func TestCompactionUnderReaders(t *testing.T) {
	r := &replacer{err: errors.New("not now")}
	w := newWorld(t, options{compact: 20_000, broker: func(b Broker) Broker { r.Broker = b; return r }})
	want := putMany(w)
	var users sync.WaitGroup
	for i := range 3 {
		u := newUser(t, 0)
		users.Go(func() {
			for n := range 3 {
				if n == 1 {
					r.mu.Lock()
					r.err = nil
					r.mu.Unlock()
				}
				got := u.do(call{Op: "readdir", Path: w.data("big")})
				slices.Sort(got.Names)
				if got.Errno != 0 || !slices.Equal(got.Names, want) {
					t.Errorf("user %d: %d names, %v", i, len(got.Names), got.Errno)
				}
				u.stat(w.data("big/" + want[n]))
				w.forget()
			}
		})
	}
	users.Wait()
	r.mu.Lock()
	calls, taken := r.calls, r.taken
	r.mu.Unlock()
	if taken == 0 || calls == taken {
		t.Errorf("%d of %d compacted logs were taken; the test did not come to what it tests", taken, calls)
	}
	s := w.served()
	eventually(t, "no compaction is under way", func() bool {
		s.table.mu.RLock()
		defer s.table.mu.RUnlock()
		return !s.table.compacting
	})
	_, memfd, _ := s.Hold()
	if _, err := brokerwire.ReadState(memfd); err != nil {
		t.Error(err)
	}
	s.table.mu.RLock()
	defer s.table.mu.RUnlock()
	next := loaded(t, memfd)
	next.setOrigins(*s.table.origins.Load()) // the first is the volume's, and not in the log
	if got, live := image(next), image(s.table); !slices.Equal(got, live) {
		t.Errorf("the log has %d nodes, the table %d", len(got), len(live))
	}
}

func TestADetachedTableWritesNothing(t *testing.T) {
	m := newModel(t)
	for range 100 {
		m.step()
	}
	log, end := m.log, m.end
	h := fnv.New64()
	sum := func() uint64 {
		b := make([]byte, end+1000)
		log.ReadAt(b, 0)
		h.Reset()
		h.Write(b)
		return h.Sum64()
	}
	before := sum()
	m.detach()
	for range 100 {
		m.step()
	}
	if sum() != before {
		t.Error("the next worker's log was written to")
	}
}

func TestRecallFindsWhatWasDropped(t *testing.T) {
	tab := testTable(newLog(t))
	long := strings.Repeat("x", 255)
	f := tab.incarnation(tab.nodes.get(dataID), 0, object.Object{Version: "v"}, long, cached, time.Time{}, nil)
	d := tab.folder(tab.nodes.get(dataID), "d")
	tab.drop(f)
	tab.drop(d)
	if n := tab.recall(f.id); n == nil || n.name != long || n.kind != fileKind {
		t.Errorf("the file is %+v", n)
	}
	if n := tab.recall(d.id); n == nil || n.name != "d" || n.kind != dirKind {
		t.Errorf("the folder is %+v", n)
	}
	for _, id := range []uint64{0, dataID, tab.nextID, 1 << 63} {
		if n := tab.recall(id); n != nil {
			t.Errorf("node %d is %+v", id, n)
		}
	}
}

// FuzzReplay holds that any log makes a table that is consistent and can go on, whether its
// sums are right or not.
func FuzzReplay(f *testing.F) {
	root := &node{id: rootID}
	data := &node{id: dataID, parent: root}
	folder := &node{id: 20, parent: data, name: "folder", kind: dirKind}
	seed := nodeRecord(nil, folder)
	seed = nodeRecord(seed, &node{id: 21, parent: folder, name: "f", kind: fileKind, file: &file{version: "v", size: 9, mode: passthrough}})
	seed = countRecord(seed, recLookup, 21, 3)
	seed = countRecord(seed, recBacking, 21, 7)
	seed = countRecord(seed, recOpens, 21, 1)
	seed = countRecord(seed, recForget, 21, 3)
	seed = countRecord(seed, recNext, 99, 0)
	seed = nodeRecord(seed, &node{id: 22, parent: &node{id: domainID}, name: "uuid", kind: socketKind})
	f.Add(seed, false)
	f.Add(seed[:len(seed)-3], false)
	f.Add(bytes.Repeat([]byte{0xff}, 100), false)
	f.Add([]byte("N\x14\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x01\x01a"), true)
	log := newLog(f)
	f.Fuzz(func(t *testing.T, b []byte, sealed bool) {
		if sealed { // each line is a record: kind and body
			var records []byte
			for line := range bytes.SplitSeq(b, []byte("\n")) {
				if len(line) > 0 {
					start := len(records)
					records = append(records, 0, 0, 0, 0)
					records = append(records, line...)
					records = seal(records, start)
				}
			}
			b = records
		}
		b = binary.LittleEndian.AppendUint64(b, 0) // behind it is what an earlier input left
		if _, err := log.WriteAt(b, brokerwire.StateLog); err != nil {
			t.Fatal(err)
		}
		tab := loaded(t, log)
		consistent(t, tab)
		tab.mu.Lock()
		defer tab.mu.Unlock()
		n := tab.folder(tab.nodes.get(dataID), "new")
		tab.referenced(tab.incarnation(n, 0, object.Object{Version: "v"}, "f", cached, time.Time{}, func(*file) bool { return false }))
		tab.socket("another")
		consistent(t, tab)
	})
}
