package policy

import (
	"bytes"
	"container/list"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var rewrite = flag.Bool("rewrite", false, "write the golden scripts' answers anew")

// TestScripts runs testdata/*.script. A block of commands, a line "----", the answers, an
// empty line. "capacity N" starts anew.
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.script")
	if err != nil || len(files) == 0 {
		t.Fatal("no scripts", err)
	}
	for _, name := range files {
		t.Run(filepath.Base(name), func(t *testing.T) {
			want, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			got := runScript(t, string(want))
			if *rewrite {
				if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got != string(want) {
				t.Errorf("the script now reads (-rewrite writes it):\n%s", got)
			}
		})
	}
}

func runScript(t *testing.T, text string) string {
	var out bytes.Buffer
	var m *model
	for block := range strings.SplitSeq(strings.TrimRight(text, "\n"), "\n\n") {
		commands, _, _ := strings.Cut(block, "\n----")
		if out.Len() > 0 {
			out.WriteString("\n")
		}
		out.WriteString(commands + "\n----\n")
		for line := range strings.SplitSeq(commands, "\n") {
			f := strings.Fields(line)
			if len(f) == 0 || f[0][0] == '#' {
				continue
			}
			if f[0] == "capacity" {
				m = newModel(number(t, f[1]))
				continue
			}
			m.run(t, &out, f)
		}
	}
	return out.String()
}

func number(t *testing.T, s string) int64 {
	var n int64
	if _, err := fmt.Sscan(s, &n); err != nil {
		t.Fatalf("number %q: %v", s, err)
	}
	return n
}

// model is a cache around the policy, as small as can be.
type model struct {
	capacity int64
	c        *Cache[string]
	nodes    map[string]*Node[string]
	leased   map[string]bool
}

func newModel(capacity int64) *model {
	return &model{capacity: capacity, c: single[string](capacity, false), nodes: map[string]*Node[string]{}, leased: map[string]bool{}}
}

func (m *model) run(t *testing.T, out *bytes.Buffer, f []string) {
	switch f[0] {
	case "get": // get key… bytes: hits what is there, else makes room and inserts
		for _, key := range f[1 : len(f)-1] {
			hit, evicted := m.get(key, number(t, f[len(f)-1]))
			fmt.Fprintf(out, "%s %s", key, map[bool]string{true: "hit", false: "miss"}[hit])
			if len(evicted) > 0 {
				fmt.Fprintf(out, ", evicts %s", strings.Join(evicted, " "))
			}
			out.WriteString("\n")
		}
	case "grow":
		m.c.Grow(m.nodes[f[1]], number(t, f[2]))
	case "restore":
		for _, key := range f[1 : len(f)-1] {
			n := &Node[string]{Key: key}
			m.nodes[key] = n
			m.c.Restore(n, number(t, f[len(f)-1]))
		}
	case "tail":
		for _, key := range f[1 : len(f)-1] {
			n := &Node[string]{Key: key}
			m.nodes[key] = n
			m.c.InsertTail(n, number(t, f[len(f)-1]))
		}
	case "tails":
		fmt.Fprintf(out, "tails %s\n", show(&m.c.tails))
	case "remove":
		m.c.Remove(m.nodes[f[1]])
		delete(m.nodes, f[1])
	case "spare", "keep", "return":
		do := map[string]func(*Node[string]){"spare": m.c.Spare, "keep": m.c.Keep, "return": m.c.Return}[f[0]]
		for _, key := range f[1:] {
			do(m.nodes[key])
		}
	case "credit":
		m.c.Credit(m.nodes[f[1]], uint8(number(t, f[2])))
	case "admits":
		fmt.Fprintf(out, "asked %s times: %v\n", f[1], m.c.Admits(uint8(number(t, f[1]))))
	case "lease":
		for _, key := range f[1:] {
			m.leased[key] = true
		}
	case "release":
		for _, key := range f[1:] {
			delete(m.leased, key)
		}
	case "evict":
		if key, ok := m.evict(); ok {
			fmt.Fprintln(out, "evicts", key)
		} else {
			fmt.Fprintln(out, "nobody can go")
		}
	case "show":
		fmt.Fprintf(out, "small %s\nmain  %s\nghosts %s\n", show(&m.c.small), show(&m.c.main), m.c.ghosts.show())
	case "aside":
		fmt.Fprintf(out, "spare %s\nkept  %s\n", show(&m.c.spare), show(&m.c.kept))
	case "compare":
		compare(t, out, f[1:])
	default:
		t.Fatalf("unknown command %q", f)
	}
	m.check(t)
}

func (m *model) get(key string, bytes int64) (hit bool, evicted []string) {
	if n := m.nodes[key]; n != nil {
		m.c.Hit(n)
		return true, nil
	}
	for m.c.Bytes()+bytes > m.capacity {
		key, ok := m.evict()
		if !ok {
			return false, append(evicted, "nobody: read through")
		}
		evicted = append(evicted, key)
	}
	n := &Node[string]{Key: key}
	m.nodes[key] = n
	m.c.Insert(n, bytes)
	return false, evicted
}

func (m *model) evict() (string, bool) {
	n := m.c.Evict(func(n *Node[string]) bool { return m.leased[n.Key] })
	if n == nil {
		return "", false
	}
	delete(m.nodes, n.Key)
	return n.Key, true
}

// check compares the cache's counts with its rings.
func (m *model) check(t *testing.T) {
	t.Helper()
	total := 0
	for _, q := range []*queue[string]{&m.c.small, &m.c.main, &m.c.spare, &m.c.kept, &m.c.tails} {
		var bytes int64
		n := 0
		each(q, func(node *Node[string]) {
			n++
			bytes += node.bytes
			if node.queue != q || node.next.prev != node || m.nodes[node.Key] != node {
				t.Fatalf("node %s is out of order", node.Key)
			}
		})
		if n != q.len || bytes != q.bytes {
			t.Fatalf("queue counts %d nodes of %d bytes, has %d of %d", q.len, q.bytes, n, bytes)
		}
		total += n
	}
	if total != len(m.nodes) || len(m.c.ghosts.at) > len(m.c.ghosts.ring) {
		t.Fatalf("%d nodes in queues, %d in all; %d ghosts in a ring of %d", total, len(m.nodes), len(m.c.ghosts.at), len(m.c.ghosts.ring))
	}
}

func each(q *queue[string], f func(*Node[string])) {
	for n, i := q.head, 0; i < q.len; n, i = n.next, i+1 {
		f(n)
	}
}

// show lists a queue, oldest first, as key:bytes and a + for each hit.
func show(q *queue[string]) string {
	var parts []string
	each(q, func(n *Node[string]) {
		parts = append(parts, fmt.Sprintf("%s:%d%s", n.Key, n.bytes, strings.Repeat("+", int(n.hits.n))))
	})
	return fmt.Sprintf("%d bytes [%s]", q.bytes, strings.Join(parts, " "))
}

func (g *ghosts[K]) show() string {
	var keys []string
	for _, e := range g.ring {
		if g.at[e.key].seq == e.seq {
			keys = append(keys, fmt.Sprint(e.key))
		}
	}
	return "[" + strings.Join(keys, " ") + "]"
}

// compare plays one trace to this policy and to LRU: objects=N of popularity zipf (exponent in
// hundredths), gets=N; before every get, with probability scan percent, one object that is asked
// for only once; every scan-every gets, scan-objects of them in a row.
func compare(t *testing.T, out *bytes.Buffer, args []string) {
	p := map[string]int64{}
	for _, a := range args {
		k, v, _ := strings.Cut(a, "=")
		p[k] = number(t, v)
	}
	trace := makeTrace(p)
	ours := newModel(p["capacity"])
	hits, bytes := play(trace, func(k string, n int64) bool { hit, _ := ours.get(k, n); return hit })
	ours.check(t)
	lruHits, lruBytes := play(trace, newLRU(p["capacity"]).get)
	fmt.Fprintf(out, "ours:    %4.1f %% of gets hit, %4.1f %% of bytes\n", hits, bytes)
	fmt.Fprintf(out, "lru:     %4.1f %% of gets hit, %4.1f %% of bytes\n", lruHits, lruBytes)
}

type request struct {
	key   string
	bytes int64
	scan  bool
}

func makeTrace(p map[string]int64) (trace []request) {
	r := rand.New(rand.NewPCG(1, 2))
	sum, cumulative := 0.0, make([]float64, p["objects"])
	for i := range cumulative {
		sum += math.Pow(float64(i+1), -float64(p["zipf"])/100)
		cumulative[i] = sum
	}
	for i := range p["gets"] {
		for r.Int64N(100) < p["scan"] {
			trace = append(trace, request{fmt.Sprint("once", len(trace)), 10, true})
		}
		if p["scan-every"] > 0 && i%p["scan-every"] == p["scan-every"]-1 {
			for k := range p["scan-objects"] {
				trace = append(trace, request{fmt.Sprint("scan", i, "-", k), 10, true})
			}
		}
		k, _ := slices.BinarySearch(cumulative, r.Float64()*sum)
		trace = append(trace, request{fmt.Sprint("hot", k), int64(5 + k%11), false})
	}
	return trace
}

// play gives the share of gets and bytes that hit, of those that are no part of a scan.
func play(trace []request, get func(string, int64) bool) (gets, bytes float64) {
	var hit, all, hitBytes, allBytes float64
	for _, q := range trace {
		h := get(q.key, q.bytes)
		if q.scan {
			continue
		}
		all++
		allBytes += float64(q.bytes)
		if h {
			hit++
			hitBytes += float64(q.bytes)
		}
	}
	return 100 * hit / all, 100 * hitBytes / allBytes
}

type lru struct {
	capacity, bytes int64
	order           list.List
	at              map[string]*list.Element
}

func newLRU(capacity int64) *lru { return &lru{capacity: capacity, at: map[string]*list.Element{}} }

func (l *lru) get(key string, bytes int64) bool {
	if e := l.at[key]; e != nil {
		l.order.MoveToFront(e)
		return true
	}
	for l.bytes+bytes > l.capacity {
		old := l.order.Remove(l.order.Back()).(request)
		delete(l.at, old.key)
		l.bytes -= old.bytes
	}
	l.at[key] = l.order.PushFront(request{key: key, bytes: bytes})
	l.bytes += bytes
	return false
}

// TestEvictEndsAndEmptiesWhatIsNotLeased is the promise to a full tier: no hang, and no victim overlooked.
func TestEvictEndsAndEmptiesWhatIsNotLeased(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 7))
		m := newModel(100)
		for i := range 60 {
			key := fmt.Sprint(r.IntN(40))
			m.get(key, r.Int64N(12))
			if r.IntN(4) == 0 {
				m.leased[key] = m.nodes[key] != nil
			}
			if r.IntN(9) == 0 {
				delete(m.leased, key)
			}
			if i%10 == 0 {
				m.check(t)
			}
		}
		for {
			if _, ok := m.evict(); !ok {
				break
			}
		}
		m.check(t)
		for key := range m.nodes {
			if !m.leased[key] {
				t.Fatalf("seed %d: %s is left, though it is not leased", seed, key)
			}
		}
	}
}

func BenchmarkGetUnderEviction(b *testing.B) {
	m := newModel(100000)
	keys := make([]string, 40000)
	for i := range keys {
		keys[i] = fmt.Sprint(i)
	}
	r := rand.New(rand.NewPCG(1, 1))
	for b.Loop() {
		m.get(keys[r.IntN(len(keys))], 10)
	}
}
