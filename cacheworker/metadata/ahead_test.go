package metadata

import (
	"context"
	"crypto/md5"
	"encoding/hex"
	"fmt"
	"runtime"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/larderfs/larder/cacheworker/fill/memsource"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

// wide is a store of which only the folders' names are kept, and each request takes a while.
type wide struct {
	*memsource.Source
	delay   time.Duration
	page    int // entries
	folders map[string]names

	mu                 sync.Mutex // guards the fields below
	lists, heads       int
	under, most, twice int
	asked              map[string]bool
}

// names are the sorted names of a folder, those of folders with "/" behind them.
type names struct {
	n    int
	name func(i int) string
}

func listed(s []string) names { return names{len(s), func(i int) string { return s[i] }} }

func (w *wide) List(ctx context.Context, in source.ListInput) (source.Page, error) {
	w.mu.Lock()
	w.lists++
	if w.asked[in.Prefix+"\x00"+in.After] {
		w.twice++
	}
	w.asked[in.Prefix+"\x00"+in.After] = true
	w.under++
	w.most = max(w.most, w.under)
	w.mu.Unlock()
	select {
	case <-time.After(w.delay):
	case <-ctx.Done():
	}
	w.mu.Lock()
	w.under--
	w.mu.Unlock()
	var p source.Page
	f := w.folders[in.Prefix]
	behind := func(i int) string {
		name, folder := strings.CutSuffix(f.name(i), "/")
		return source.AfterName(name, folder)
	}
	i := sort.Search(f.n, func(i int) bool { return behind(i) > in.After })
	for limit := w.page; i < f.n && limit > 0; i, limit = i+1, limit-1 {
		if name, folder := strings.CutSuffix(f.name(i), "/"); folder {
			p.Folders = append(p.Folders, name)
		} else {
			p.Objects = append(p.Objects, object.Object{Store: "memory://test", Key: in.Prefix + name,
				Version: fmt.Sprintf("%032x", i), Size: int64(i), ModTime: time.Unix(1e9, 0)})
		}
	}
	if i < f.n {
		p.Next = behind(i - 1)
	}
	return p, nil
}

func (w *wide) Head(ctx context.Context, key string) (object.Object, error) {
	w.mu.Lock()
	w.heads++
	w.mu.Unlock()
	return object.Object{}, object.ErrNotFound
}

// reset forgets what was counted, and returns it.
func (w *wide) reset() (lists, most, twice int) {
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	lists, most, twice = w.lists, w.most, w.twice
	w.lists, w.heads, w.most, w.twice, w.asked = 0, 0, 0, 0, map[string]bool{}
	return lists, most, twice
}

func newWide(folders map[string]names) (*wide, *View) {
	w := &wide{Source: (&memsource.Store{}).Source("alice"), delay: 30 * time.Millisecond, page: 1000, folders: folders, asked: map[string]bool{}}
	return w, New(Config{}).View(w)
}

// read lists a folder to its end and returns its names, those of folders with "/" behind them.
func read(t testing.TB, v *View, dir string, maxAge time.Duration) (all []string) {
	t.Helper()
	for after, more := "", true; more; {
		es, m, err := v.List(t.Context(), dir, after, maxAge)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range es {
			after = e.Cookie()
			all = append(all, after)
		}
		more = m
	}
	return all
}

// shapes are folders as people have them. Each is as large as its first return says.
func shapes(n int) map[string][]string {
	counters, hashes, uuids, plain, dates, mixed := []string{}, []string{}, []string{}, []string{}, []string{}, []string{}
	for i := range n {
		sum := md5.Sum([]byte(strconv.Itoa(i)))
		h := hex.EncodeToString(sum[:])
		counters = append(counters, fmt.Sprintf("part-%05d-of-%05d.parquet", i, n))
		hashes = append(hashes, h)
		uuids = append(uuids, strings.ToUpper(h[:8]+"-"+h[8:12]+"-"+h[12:16]+"-"+h[16:20]+"-"+h[20:])+".jpg")
		plain = append(plain, "img"+strconv.Itoa(i))
		dates = append(dates, time.Unix(1.6e9, 0).Add(time.Duration(i)*17*time.Minute).UTC().Format("2006-01-02T15-04-05Z.log"))
		if mixed = append(mixed, h[:1+i%9]+"_"+strconv.Itoa(i)); i%7 == 0 {
			mixed[i] += "/"
		}
	}
	all := map[string][]string{"counters": counters, "hashes": hashes, "uuids": uuids, "plain numbers": plain, "dates": dates, "mixed": mixed}
	for _, s := range all {
		slices.Sort(s)
	}
	return all
}

func TestALargeFolderIsListedFromSeveralPlacesAtOnce(t *testing.T) {
	const pages, page = 100, 100
	for shape, want := range shapes(pages * page) {
		t.Run(shape, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, v := newWide(map[string]names{"d/": listed(want)})
				w.page = page
				defer w.reset() // when all has come
				start := time.Now()
				if got := read(t, v, "d/", time.Hour); !slices.Equal(got, want) {
					t.Fatalf("%d names, want %d", len(got), len(want))
				}
				took, series := time.Since(start), pages*w.delay
				lists, most, twice := w.reset()
				t.Logf("%d LISTs, %d at once, %v; a series takes %v", lists, most, took, series)
				limit := series / 2
				if shape == "dates" || shape == "mixed" { // they leave gaps where a number would go on
					limit = series * 2 / 3
				}
				if lists > pages*6/5 || twice > 0 || w.heads > 0 || took > limit {
					t.Errorf("want at most 1.2 times the LISTs, within %v", limit)
				}
				if read(t, v, "d/", time.Hour); w.lists != 0 {
					t.Errorf("%d LISTs the second time", w.lists)
				}
				time.Sleep(time.Minute)
				start = time.Now()
				if got := read(t, v, "d/", time.Second); !slices.Equal(got, want) {
					t.Fatalf("anew: %d names, want %d", len(got), len(want))
				}
				took = time.Since(start)
				lists, most, _ = w.reset()
				t.Logf("anew: %d LISTs, %d at once, %v", lists, most, took)
				if lists > pages*6/5 || took > series/4 {
					t.Error("anew: want at most 1.2 times the LISTs, in a quarter of that time")
				}
				checkInvariants(t, v.c)
			})
		})
	}
}

// Where a folder ends can only be guessed, until a guess has shown it.
func TestNothingIsAskedForBehindTheKnownEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const pages, page = 100, 100
		w, v := newWide(map[string]names{"d/": {pages * page, func(i int) string { return fmt.Sprintf("part-%06d", i) }}})
		w.page = page
		read(t, v, "d/", time.Hour)
		if lists, _, _ := w.reset(); lists > pages+8 {
			t.Errorf("%d LISTs for %d pages", lists, pages)
		}
	})
}

// tree is a folder with folders of files.
func tree(folders, files int) map[string]names {
	root := []string{}
	all := map[string]names{}
	for i := range folders {
		dir := fmt.Sprintf("day=%03d/", i)
		root = append(root, dir)
		all["t/"+dir] = names{files, func(i int) string { return fmt.Sprintf("f%06d", i) }}
	}
	all["t/"] = listed(root)
	return all
}

// walkTree reads a folder and all below it, as find does.
func walkTree(t *testing.T, v *View, dir string) (n int) {
	for _, name := range read(t, v, dir, time.Minute) {
		if n++; strings.HasSuffix(name, "/") {
			n += walkTree(t, v, dir+name)
		}
	}
	return n
}

func TestTheFoldersOfATreeAreListedAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, v := newWide(tree(100, 1000))
		start := time.Now()
		if n := walkTree(t, v, "t/"); n != 100*1001 {
			t.Fatalf("%d names", n)
		}
		took, series := time.Since(start), 101*w.delay
		lists, most, _ := w.reset()
		t.Logf("%d LISTs, %d at once, %v; a series takes %v", lists, most, took, series)
		if lists != 101 || took > series/4 || w.heads != 0 {
			t.Errorf("want 101 LISTs and no HEAD, in a quarter of that time")
		}
		if walkTree(t, v, "t/"); w.lists+w.heads != 0 {
			t.Errorf("%d requests the second time", w.lists+w.heads)
		}
	})
}

// Who has read a folder and goes on with the first one in it reads a tree.
func TestTheFirstFolderOfATreeIsNotReadAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, v := newWide(tree(100, 10))
		read(t, v, "t/", time.Minute)
		w.reset()
		read(t, v, "t/day=000/", time.Minute)
		if lists, most, _ := w.reset(); lists != 3 || most != 3 {
			t.Errorf("%d LISTs, %d at once; want its own and two more", lists, most)
		}
		time.Sleep(2 * walkGone)
		v.c.denied(v.t)
		read(t, v, "t/", time.Minute)
		time.Sleep(2 * walkGone)
		w.reset()
		read(t, v, "t/day=000/", time.Minute)
		if lists, _, _ := w.reset(); lists != 1 {
			t.Errorf("%d LISTs, later", lists)
		}
	})
}

// A reader of one folder, or of the beginning of many, pays for no guess.
func TestNothingIsListedAheadForWhoReadsOnePage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		folders := tree(100, 50_000)
		w, v := newWide(folders)
		first := func(dir string) {
			if _, _, err := v.List(t.Context(), dir, "", time.Minute); err != nil {
				t.Fatal(err)
			}
		}
		first("t/")
		first("t/day=007/")
		if lists, _, _ := w.reset(); lists != 2 {
			t.Errorf("%d LISTs for two folders", lists)
		}
		first("t/day=050/")
		if lists, _, _ := w.reset(); lists > 3 {
			t.Errorf("%d LISTs for a third one", lists)
		}
	})
}

// A folder is not held as a whole by who reads it: what is listed and not read yet is bounded, and so is what is remembered.
func TestAMillionEntriesInOneFolderAreReadInBoundedMemory(t *testing.T) {
	const n, remembered = 1_000_000, 50_000
	w, v := newWide(map[string]names{"d/": {n, func(i int) string { return fmt.Sprintf("%07d.jpg", i) }}})
	w.delay = 0
	v.c.cfg.MaxEntries = remembered
	before, most := heapBytes(), uint64(0)
	after, seen := "", 0
	for more := true; more; {
		es, m, err := v.List(t.Context(), "d/", after, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range es {
			if want := w.folders["d/"].name(seen); e.Name != want {
				t.Fatalf("entry %d is %s, want %s", seen, e.Name, want)
			}
			seen++
		}
		if len(es) > 2*listLimit {
			t.Fatalf("%d entries at once", len(es))
		}
		if more = m; len(es) > 0 {
			after = es[len(es)-1].Cookie()
		}
		if seen/100_000 != (seen-len(es))/100_000 {
			most = max(most, heapBytes())
		}
	}
	held := int64(most) - int64(before)
	t.Logf("%d entries by %d LISTs; %d KiB of memory at most", seen, w.lists, held>>10)
	if seen != n || held > 64<<20 || v.c.Stats().Entries > remembered {
		t.Errorf("%d entries, %d remembered; want %d and 64 MiB at most", seen, v.c.Stats().Entries, n)
	}
	if w.lists > 1200 {
		t.Errorf("%d LISTs of 1000 entries", w.lists)
	}
}

func heapBytes() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// BenchmarkKnownEntry: what memory does an entry cost that is remembered?
func BenchmarkKnownEntry(b *testing.B) {
	const n = 200_000
	for _, shape := range []string{"counters", "uuids"} {
		b.Run(shape, func(b *testing.B) {
			all := shapes(n)[shape]
			w, _ := newWide(map[string]names{"datasets/imagenet/train/": listed(all)})
			w.delay = 0
			for b.Loop() {
				b.StopTimer()
				v := New(Config{}).View(w)
				before := heapBytes()
				b.StartTimer()
				read(b, v, "datasets/imagenet/train/", time.Hour)
				b.StopTimer()
				b.ReportMetric(float64(int64(heapBytes())-int64(before))/n, "B/entry")
				if got := v.c.Stats().Entries; got != n {
					b.Fatalf("%d entries", got)
				}
				b.StartTimer()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/entry")
		})
	}
}

func TestAPaceGoesOnInNamesOfTheSameShape(t *testing.T) {
	for _, c := range []struct {
		page  []string
		pages int
		want  string // that lies so many pages behind the last one
	}{
		{[]string{"f0000", "f0001", "f0499", "f0999"}, 1, "f1998"},
		{[]string{"f0000", "f0001", "f0499", "f0999"}, 8, "f8991"},
		{[]string{"f0000", "f0001", "f0499", "f0999"}, 100, "f9999"},
		{[]string{"00ab", "00ff", "01b3", "02c0"}, 2, "06ea"},
		{[]string{"2020-01-02T00", "2020-01-02T12", "2020-01-03T00"}, 10, "2020-01-13T"},
		{[]string{"a", "b"}, 1, "c"},
		{[]string{"x-", "x_"}, 1, ""},
		{[]string{"z"}, 1, ""},
		{[]string{"9", "99"}, 1, ""},
	} {
		page := make([]slot, len(c.page))
		for i, name := range c.page {
			page[i].key = "dir/" + name
		}
		last := c.page[len(c.page)-1]
		got, ok := paceOf(c.page[0], 1, page, len("dir/")).beyond(last, c.pages)
		if ok != (c.want != "") || !strings.HasPrefix(got, c.want) || ok && got <= last {
			t.Errorf("%d pages behind %s: %q, %v; want %q…", c.pages, c.page, got, ok, c.want)
		}
	}
}

func TestWhatFollowsANameIsToldWithoutAsking(t *testing.T) {
	w := newWorld(t, Config{}, "d/a", "d/b", "d/c/x", "d/d", "d/e")
	behind := func(name string, n int) (names []string) {
		for _, e := range w.view.Behind("d/", name, n) {
			names = append(names, e.Name)
		}
		return names
	}
	if got := behind("", 3); got != nil {
		t.Errorf("of a folder of which nothing is known: %q", got)
	}
	w.lookup("d/", "a", time.Hour)
	w.asked()
	for _, c := range []struct {
		name string
		n    int
		want []string
	}{
		{"", 2, []string{"a", "b"}},
		{"a", 2, []string{"b", "d"}},
		{"aa", 1, []string{"b"}},
		{"d", 5, []string{"e"}},
		{"e", 5, nil},
	} {
		if got := behind(c.name, c.n); !slices.Equal(got, c.want) {
			t.Errorf("%d behind %q: %q; want %q", c.n, c.name, got, c.want)
		}
	}
	if got := w.asked(); got != "0 LIST 0 HEAD" {
		t.Error(got)
	}
}
