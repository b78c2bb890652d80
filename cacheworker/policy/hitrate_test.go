package policy

import (
	"container/list"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// access is an open of a file and the chunks that are read of it. A scan's are not counted: nobody can have them.
type access struct {
	file   int
	chunks []int
}

// trace is what readers ask for, in order; all chunks are one byte.
type trace struct {
	name     string
	accesses []access
	capacity int64 // chunks
	byFile   bool  // few files: the clairvoyant one does not take long
	lruWins  bool  // by what it takes to find out
}

// cacheModel is a cache as cachestore uses one: files are opened, grow by the chunks that were missing, and go as a whole.
type cacheModel interface {
	open(file int)
	grow(file int) (evicted []int) // by a chunk
}

// hitRate replays a trace and gives the share of chunks that were there.
func hitRate(t *testing.T, tr trace, c cacheModel) float64 {
	t.Helper()
	present := map[int]map[int]bool{}
	used := int64(0)
	var hit, all float64
	for _, a := range tr.accesses {
		c.open(a.file)
		if present[a.file] == nil {
			present[a.file] = map[int]bool{}
		}
		for _, i := range a.chunks {
			all++
			if present[a.file][i] {
				hit++
				continue
			}
			for _, gone := range c.grow(a.file) {
				used -= int64(len(present[gone]))
				delete(present, gone)
			}
			present[a.file][i] = true
			if used++; used > tr.capacity {
				t.Fatalf("%d chunks in a cache of %d", used, tr.capacity)
			}
		}
	}
	return hit / all
}

// ours is this package's policy.
type ours struct {
	c        *Cache[int]
	nodes    map[int]*Node[int]
	capacity int64
}

func (o *ours) open(file int) {
	if n := o.nodes[file]; n != nil {
		o.c.Hit(n)
		return
	}
	n := &Node[int]{Key: file}
	o.nodes[file] = n
	o.c.Insert(n, 0)
}

func (o *ours) grow(file int) (evicted []int) {
	for o.c.Bytes()+1 > o.capacity {
		n := o.c.Evict(func(n *Node[int]) bool { return n.Key == file }) // it is leased
		delete(o.nodes, n.Key)
		evicted = append(evicted, n.Key)
	}
	o.c.Grow(o.nodes[file], 1)
	return evicted
}

// leastRecent is LRU over files.
type leastRecent struct {
	order          list.List // of int, the latest first
	at             map[int]*list.Element
	bytes          map[int]int64
	used, capacity int64
}

func (l *leastRecent) open(file int) {
	if e := l.at[file]; e != nil {
		l.order.MoveToFront(e)
		return
	}
	l.at[file] = l.order.PushFront(file)
}

func (l *leastRecent) grow(file int) (evicted []int) {
	for l.used+1 > l.capacity {
		old := l.order.Remove(l.order.Back()).(int)
		l.used -= l.bytes[old]
		delete(l.at, old)
		delete(l.bytes, old)
		evicted = append(evicted, old)
	}
	l.bytes[file]++
	l.used++
	return evicted
}

// bound is an upper bound for every policy, also one that knows the future and evicts single chunks (PFOO-L, Berger and
// others 2018). To have a chunk at its next access costs its bytes times the accesses until then; in all there is the
// capacity times the length of the trace. The cheapest hits that this pays for are at least as many as
// can be had.
func bound(tr trace) float64 {
	type chunk struct{ file, i int }
	last := map[chunk]int{}
	var costs []int
	now := 0
	for _, a := range tr.accesses {
		for _, i := range a.chunks {
			c := chunk{a.file, i}
			if before, again := last[c]; again {
				costs = append(costs, now-before)
			}
			last[c] = now
			now++
		}
	}
	slices.Sort(costs)
	budget, n := float64(tr.capacity)*float64(now), 0
	for _, cost := range costs {
		if budget -= float64(cost); budget < 0 {
			break
		}
		n++
	}
	return float64(n) / float64(now)
}

func TestTheBoundIsOne(t *testing.T) {
	// Two files of one chunk by turns in a cache of one: one of two accesses can hit, all but the first two in a cache of two.
	tr := trace{capacity: 1}
	for i := range 100 {
		tr.accesses = append(tr.accesses, access{i % 2, []int{0}})
	}
	if b := bound(tr); b != 0.5 {
		t.Errorf("bound %v, want 0.5", b)
	}
	tr.capacity = 2
	if b := bound(tr); b != 0.98 {
		t.Errorf("bound %v, want 0.98", b)
	}
}

// clairvoyant evicts the file that is opened again last: what whole files can give to somebody who knows the future,
// though no bound.
type clairvoyant struct {
	opens          map[int][]int // of each file, those that are still to come
	bytes          map[int]int64
	used, capacity int64
}

func newClairvoyant(tr trace) *clairvoyant {
	c := &clairvoyant{opens: map[int][]int{}, bytes: map[int]int64{}, capacity: tr.capacity}
	for n, a := range tr.accesses {
		c.opens[a.file] = append(c.opens[a.file], n)
	}
	return c
}

func (c *clairvoyant) open(file int) {
	c.opens[file] = c.opens[file][1:]
	c.bytes[file] += 0
}

func (c *clairvoyant) grow(file int) (evicted []int) {
	for c.used+1 > c.capacity {
		last, when := -1, -1
		for f, bytes := range c.bytes {
			next := math.MaxInt
			if len(c.opens[f]) > 0 {
				next = c.opens[f][0]
			}
			if f != file && bytes > 0 && next > when {
				last, when = f, next
			}
		}
		c.used -= c.bytes[last]
		delete(c.bytes, last)
		evicted = append(evicted, last)
	}
	c.bytes[file]++
	c.used++
	return evicted
}

// TestHitRates compares the policy with LRU and with what could be had at most. That bound is for a cache of single
// chunks. Ours has whole files, of which the columns that are read often and those that are read
// once come and go together: the clairvoyant one has the same handicap.
func TestHitRates(t *testing.T) {
	for _, c := range []struct {
		trace
		enough float64 // of the bound
	}{
		{scanTrace(), 0.99}, {zipfTrace(), 0.8}, {shiftTrace(), 0.95},
		{tpchTrace(1, 2), 0.67}, {tpchTrace(1, 3), 0.5}, {tpchTrace(4, 2), 0.66}, {tpchTrace(4, 3), 0.46},
	} {
		o := hitRate(t, c.trace, &ours{New[int](c.capacity), map[int]*Node[int]{}, c.capacity})
		l := hitRate(t, c.trace, &leastRecent{at: map[int]*list.Element{}, bytes: map[int]int64{}, capacity: c.capacity})
		b, by := bound(c.trace), "-"
		if c.byFile {
			f := hitRate(t, c.trace, newClairvoyant(c.trace))
			by = fmt.Sprintf("%.1f %% (%.2f of it)", 100*f, o/f)
		}
		t.Logf("%-32s %5.1f %% of bytes hit; LRU %4.1f %%; at most %4.1f %% (%.2f of it); clairvoyant, whole files: %s", c.name, 100*o, 100*l, 100*b, o/b, by)
		if o < l && !c.lruWins {
			t.Errorf("%s: %.3f of bytes hit, LRU %.3f", c.name, o, l)
		}
		if o > b || l > b {
			t.Errorf("%s: %.3f and %.3f hit, above the bound of %.3f", c.name, o, l, b)
		}
		if o < c.enough*b {
			t.Errorf("%s: %.2f of the bound, want %.2f", c.name, o/b, c.enough)
		}
	}
}

func upTo(n int) []int {
	c := make([]int, n)
	for i := range c {
		c[i] = i
	}
	return c
}

// scanTrace is a hot set that fits, and now and then a job that reads ten times the cache once.
func scanTrace() trace {
	r := rand.New(rand.NewPCG(1, 2))
	tr := trace{name: "scan over a hot set", capacity: 2000}
	next := 1000
	for n := range 40000 {
		tr.accesses = append(tr.accesses, access{r.IntN(200), upTo(8)})
		if n%4000 == 3999 {
			for range 2500 {
				next++
				tr.accesses = append(tr.accesses, access{next, upTo(8)})
			}
		}
	}
	return tr
}

// shiftTrace is jobs one after the other, each of which reads a dataset of its own ten times; one fits. LRU,
// which keeps whatever came last, cannot do better; we have to find out first that this is no scan.
func shiftTrace() trace {
	const files = 160
	r := rand.New(rand.NewPCG(7, 8))
	tr := trace{name: "another dataset now and then", capacity: 10 * files, lruWins: true}
	for job := range 8 {
		for range 10 {
			for _, f := range r.Perm(files) {
				tr.accesses = append(tr.accesses, access{job*files + f, upTo(8)})
			}
		}
	}
	return tr
}

// zipfTrace is popularity alone, of files of 1 to 16 chunks; a tenth of their bytes fits.
func zipfTrace() trace {
	const files = 5000
	r := rand.New(rand.NewPCG(3, 4))
	sum, cumulative := 0.0, make([]float64, files)
	for i := range cumulative {
		sum += math.Pow(float64(i+1), -0.9)
		cumulative[i] = sum
	}
	tr := trace{name: "Zipf 0.9", capacity: files * 17 / 2 / 10}
	for range 60000 {
		k, _ := slices.BinarySearch(cumulative, r.Float64()*sum)
		tr.accesses = append(tr.accesses, access{k, upTo(1 + k*7%16)})
	}
	return tr
}

// tables of TPC-H as Parquet: MiB at scale 1, and the share of each column.
var tables = map[string]struct {
	mib     int
	columns string // name:percent
}{
	"lineitem": {210, "orderkey:7 partkey:11 suppkey:8 linenumber:1 quantity:3 extendedprice:15 discount:2 tax:2 returnflag:1 linestatus:1 shipdate:5 commitdate:5 receiptdate:5 shipinstruct:1 shipmode:1 comment:32"},
	"orders":   {58, "orderkey:10 custkey:14 orderstatus:1 totalprice:19 orderdate:7 orderpriority:2 clerk:7 shippriority:1 comment:39"},
	"partsupp": {42, "partkey:4 suppkey:6 availqty:5 supplycost:8 comment:77"},
	"part":     {8, "partkey:5 name:36 mfgr:2 brand:3 type:5 size:3 container:3 retailprice:8 comment:35"},
	"customer": {12, "custkey:4 name:12 address:25 nationkey:2 phone:16 acctbal:10 mktsegment:2 comment:29"},
	"supplier": {1, "suppkey:5 name:10 address:25 nationkey:2 phone:15 acctbal:10 comment:33"},
	"nation":   {1, "nationkey:20 name:40 regionkey:20 comment:20"},
	"region":   {1, "regionkey:20 name:40 comment:40"},
}

// queries are the columns that each of the 22 reads.
var queries = []string{
	"lineitem:quantity,extendedprice,discount,tax,returnflag,linestatus,shipdate",
	"part:partkey,mfgr,type,size supplier:suppkey,name,address,nationkey,phone,acctbal,comment partsupp:partkey,suppkey,supplycost nation:nationkey,name,regionkey region:regionkey,name",
	"customer:custkey,mktsegment orders:orderkey,custkey,orderdate,shippriority lineitem:orderkey,extendedprice,discount,shipdate",
	"orders:orderkey,orderdate,orderpriority lineitem:orderkey,commitdate,receiptdate",
	"customer:custkey,nationkey orders:orderkey,custkey,orderdate lineitem:orderkey,suppkey,extendedprice,discount supplier:suppkey,nationkey nation:nationkey,name,regionkey region:regionkey,name",
	"lineitem:quantity,extendedprice,discount,shipdate",
	"supplier:suppkey,nationkey lineitem:orderkey,suppkey,extendedprice,discount,shipdate orders:orderkey,custkey customer:custkey,nationkey nation:nationkey,name",
	"part:partkey,type supplier:suppkey,nationkey lineitem:orderkey,partkey,suppkey,extendedprice,discount orders:orderkey,custkey,orderdate customer:custkey,nationkey nation:nationkey,name,regionkey region:regionkey,name",
	"part:partkey,name supplier:suppkey,nationkey lineitem:orderkey,partkey,suppkey,quantity,extendedprice,discount partsupp:partkey,suppkey,supplycost orders:orderkey,orderdate nation:nationkey,name",
	"customer:custkey,name,address,nationkey,phone,acctbal,comment orders:orderkey,custkey,orderdate lineitem:orderkey,extendedprice,discount,returnflag nation:nationkey,name",
	"partsupp:partkey,suppkey,availqty,supplycost supplier:suppkey,nationkey nation:nationkey,name",
	"orders:orderkey,orderpriority lineitem:orderkey,shipdate,commitdate,receiptdate,shipmode",
	"customer:custkey orders:orderkey,custkey,comment",
	"lineitem:partkey,extendedprice,discount,shipdate part:partkey,type",
	"lineitem:suppkey,extendedprice,discount,shipdate supplier:suppkey,name,address,phone",
	"partsupp:partkey,suppkey part:partkey,brand,type,size supplier:suppkey,comment",
	"lineitem:partkey,quantity,extendedprice part:partkey,brand,container",
	"customer:custkey,name orders:orderkey,custkey,totalprice,orderdate lineitem:orderkey,quantity",
	"lineitem:partkey,quantity,extendedprice,discount,shipinstruct,shipmode part:partkey,brand,size,container",
	"supplier:suppkey,name,address,nationkey nation:nationkey,name partsupp:partkey,suppkey,availqty part:partkey,name lineitem:partkey,suppkey,quantity,shipdate",
	"supplier:suppkey,name,nationkey lineitem:orderkey,suppkey,commitdate,receiptdate orders:orderkey,orderstatus nation:nationkey,name",
	"customer:custkey,phone,acctbal orders:custkey",
}

const (
	tpchScale   = 10
	tpchFileMiB = 64
	tpchRounds  = 4
)

// tpchTrace is streams of the 22 queries, each in an order of its own, four times, over tables in files of 64 MiB: a
// query opens the files of its tables in a row and reads the footer and its columns. A part of what is ever read fits.
func tpchTrace(streamCount, part int) trace {
	first, files := map[string]int{}, 0
	names := []string{"lineitem", "orders", "partsupp", "part", "customer", "supplier", "nation", "region"}
	for _, name := range names {
		first[name] = files
		files += filesOf(name)
	}
	r := rand.New(rand.NewPCG(5, 6))
	streams := make([][]access, streamCount)
	for s := range streams {
		for range tpchRounds {
			for _, q := range r.Perm(len(queries)) {
				streams[s] = append(streams[s], query(queries[q], first)...)
			}
		}
	}
	tr := trace{name: fmt.Sprintf("TPC-H, %d streams, 1/%d fits", streamCount, part), byFile: true}
	for len(streams) > 0 {
		s := r.IntN(len(streams))
		tr.accesses = append(tr.accesses, streams[s][0])
		if streams[s] = streams[s][1:]; len(streams[s]) == 0 {
			streams = slices.Delete(streams, s, s+1)
		}
	}
	read := map[[2]int]bool{}
	for _, a := range tr.accesses {
		for _, i := range a.chunks {
			read[[2]int{a.file, i}] = true
		}
	}
	tr.capacity = int64(len(read) / part)
	return tr
}

func filesOf(table string) int {
	mib := tables[table].mib
	if mib == 1 { // it does not grow with the scale, or hardly
		return 1
	}
	return (mib*tpchScale + tpchFileMiB - 1) / tpchFileMiB
}

// query is the files that a query opens, and the chunks that overlap its columns.
func query(text string, first map[string]int) (accesses []access) {
	for part := range strings.FieldsSeq(text) {
		table, columns, _ := strings.Cut(part, ":")
		mib := min(tables[table].mib*tpchScale, tpchFileMiB)
		if tables[table].mib == 1 {
			mib = 1
		}
		wanted := map[string]bool{}
		for c := range strings.SplitSeq(columns, ",") {
			wanted[c] = true
		}
		chunks := map[int]bool{mib - 1: true} // the footer's
		at := 0.0
		for c := range strings.FieldsSeq(tables[table].columns) {
			name, share, _ := strings.Cut(c, ":")
			var percent float64
			fmt.Sscan(share, &percent)
			end := at + percent/100*float64(mib)
			for i := int(at); wanted[name] && float64(i) < end && i < mib; i++ {
				chunks[i] = true
			}
			at = end
		}
		sorted := make([]int, 0, len(chunks))
		for i := range chunks {
			sorted = append(sorted, i)
		}
		slices.Sort(sorted)
		for f := range filesOf(table) {
			accesses = append(accesses, access{first[table] + f, sorted})
		}
	}
	return accesses
}
