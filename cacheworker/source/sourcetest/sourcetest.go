// Package sourcetest is what every source must pass: the promises of package source, each as
// a test over a real store.
package sourcetest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

// Store is a real store, empty, that a test may fill.
type Store struct {
	Open   func(t *testing.T) source.Source // each call another source of the same store and credential
	Denied func(t *testing.T) source.Source // of the same store, with a credential that may not read it; nil if there is none
	Put    func(t *testing.T, key string, data []byte)
	Delete func(t *testing.T, key string)
}

// Test runs the suite; start makes a store for each test of it.
func Test(t *testing.T, start func(t *testing.T) Store) {
	for _, c := range []struct {
		name string
		test func(*testing.T, Store)
	}{
		{"HeadAndListTellTheSameObject", testHeadAndList},
		{"GetYieldsExactlyTheRange", testGet},
		{"WhatIsNotThereIsNotFound", testMissing},
		{"AnotherVersionIsChanged", testChanged},
		{"BytesOfTwoVersionsNeverMix", testOverwritten},
		{"PagesJoinToTheFolder", testPages},
		{"ListGoesOnBehindAnyName", testAfter},
		{"UnusualNamesAreNames", testUnusualNames},
		{"KeysThatNoPathCanExpressAreRefused", testInvalid},
		{"CancelledCallsEndWithTheCause", testCancelled},
		{"DeniedIsDenied", testDenied},
		{"StoreAndPrincipalAreStable", testIdentity},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, start(t)) })
	}
}

func testHeadAndList(t *testing.T, st Store) {
	s := st.Open(t)
	for key, size := range map[string]int{"a/empty": 0, "a/small": 5, "a/large": 3 << 20} {
		st.Put(t, key, make([]byte, size))
		head, err := s.Head(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		if head.Store != s.Store() || head.Key != key || head.Size != int64(size) || head.Version == "" || head.ModTime.IsZero() {
			t.Errorf("head: %+v", head)
		}
		page, err := s.List(t.Context(), source.ListInput{Prefix: "a/"})
		if err != nil {
			t.Fatal(err)
		}
		if i := slices.IndexFunc(page.Objects, func(o object.Object) bool { return o.Key == key }); i < 0 || page.Objects[i] != head {
			t.Errorf("list has %+v, head %+v", page.Objects, head)
		}
	}
}

func testGet(t *testing.T, st Store) {
	data := content(2<<20 + 17)
	st.Put(t, "a/b", data)
	s := st.Open(t)
	o, err := s.Head(t.Context(), "a/b")
	if err != nil {
		t.Fatal(err)
	}
	ranges := [][2]int64{{0, o.Size}, {0, 1}, {o.Size - 1, 1}, {1 << 20, 1 << 20}, {12345, 1}}
	for range 20 {
		off := rand.Int64N(o.Size)
		ranges = append(ranges, [2]int64{off, 1 + rand.Int64N(o.Size-off)})
	}
	var wg sync.WaitGroup
	for _, r := range ranges {
		wg.Go(func() {
			got, err := read(t.Context(), s, o, r[0], r[1])
			if err != nil || !bytes.Equal(got, data[r[0]:r[0]+r[1]]) {
				t.Errorf("bytes %d+%d: got %d, %v", r[0], r[1], len(got), err)
			}
		})
	}
	wg.Wait()
}

func testMissing(t *testing.T, st Store) {
	st.Put(t, "a/b", []byte("x"))
	s := st.Open(t)
	for _, key := range []string{"none", "a", "a/none", "a/b/c", "none/none"} {
		if _, err := s.Head(t.Context(), key); !errors.Is(err, object.ErrNotFound) {
			t.Errorf("head %s: %v", key, err)
		} else if !strings.Contains(err.Error(), key) {
			t.Errorf("the error names no key: %v", err)
		}
	}
	gone := object.Object{Store: s.Store(), Key: "none", Version: "mtime:1", Size: 10}
	if r, err := s.Get(t.Context(), gone, 0, 1); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("get: %v, %v", r, err)
	}
	page, err := s.List(t.Context(), source.ListInput{Prefix: "none/"})
	if err != nil && !errors.Is(err, object.ErrNotFound) || len(page.Objects)+len(page.Folders) != 0 || page.Next != "" {
		t.Errorf("list: %+v, %v", page, err)
	}
}

func testChanged(t *testing.T, st Store) {
	s := st.Open(t)
	for name, next := range map[string][]byte{"same size": content(1001)[1:], "shorter": content(10), "longer": content(5000)} {
		st.Put(t, "a", content(1000))
		old, err := s.Head(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		st.Put(t, "a", next)
		if got, err := read(t.Context(), s, old, 900, 100); !errors.Is(err, object.ErrChanged) {
			t.Errorf("%s: got %d bytes, %v", name, len(got), err)
		}
		now, err := s.Head(t.Context(), "a")
		if err != nil || now.Version == old.Version || now.ID() == old.ID() {
			t.Errorf("%s: head has %v, before %v; %v", name, now, old, err)
		}
		if got, err := read(t.Context(), s, now, 0, now.Size); err != nil || !bytes.Equal(got, next) {
			t.Errorf("%s: the next version has %d bytes, %v", name, len(got), err)
		}
	}
	old, err := s.Head(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	st.Delete(t, "a")
	if _, err := read(t.Context(), s, old, 0, 1); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("deleted: %v", err)
	}
}

// testOverwritten reads an object while it is replaced again and again. A content is one
// word repeated, so a mixture shows, and so does a version that stands for two contents.
func testOverwritten(t *testing.T, st Store) {
	const versions, words = 300, 16 << 10
	st.Put(t, "a", repeated(0, words))
	ctx, stop := context.WithCancel(t.Context())
	seen := &contents{words: map[string]uint64{}, whole: make(chan struct{}, 1)}
	var readers sync.WaitGroup
	for range 4 {
		s := st.Open(t)
		readers.Go(func() {
			for ctx.Err() == nil {
				version, got, err := readWhole(t.Context(), s, "a")
				if errors.Is(err, object.ErrChanged) || errors.Is(err, object.ErrNotFound) {
					continue
				}
				if err == nil {
					err = seen.add(version, got)
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	ended := make(chan struct{})
	go func() { readers.Wait(); close(ended) }()
	for i := range versions {
		st.Put(t, "a", repeated(uint64(i+1), words))
		if i%10 == 0 {
			select { // let one be read; the store may be too busy with us for readers to keep up
			case <-seen.whole:
			case <-ended:
			}
		}
	}
	stop()
	<-ended
	t.Logf("%d whole reads of %d versions out of %d", seen.reads, len(seen.words), versions)
	if len(seen.words) < 5 {
		t.Errorf("only %d versions were read", len(seen.words))
	}
}

// contents are the words that were read, by version.
type contents struct {
	whole chan struct{} // holds a token when something was added

	mu    sync.Mutex // guards the fields below
	words map[string]uint64
	reads int
}

func (c *contents) add(version string, p []byte) error {
	word, err := same(p)
	if err != nil {
		return fmt.Errorf("version %s: %w", version, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if first, ok := c.words[version]; ok && first != word {
		return fmt.Errorf("version %s is content %d and content %d", version, first, word)
	}
	c.words[version] = word
	c.reads++
	select {
	case c.whole <- struct{}{}:
	default:
	}
	return nil
}

func readWhole(ctx context.Context, s source.Source, key string) (version string, _ []byte, _ error) {
	o, err := s.Head(ctx, key)
	if err != nil {
		return "", nil, err
	}
	got, err := read(ctx, s, o, 0, o.Size)
	return o.Version, got, err
}

func repeated(word uint64, n int) []byte {
	return bytes.Repeat(binary.LittleEndian.AppendUint64(nil, word), n)
}

func same(p []byte) (uint64, error) {
	first := binary.LittleEndian.Uint64(p)
	for i := 0; i < len(p); i += 8 {
		if w := binary.LittleEndian.Uint64(p[i:]); w != first {
			return 0, fmt.Errorf("content %d has %d at byte %d", first, w, i)
		}
	}
	return first, nil
}

// keys of a folder "a/" whose order tells S3's from a directory's: "/" sorts before "0" and
// behind "-" and ".", and a folder's name is a prefix of its neighbours'.
var keys = []string{
	"a-", "a.txt", "a/x", "a/y/z", "a0", "ab", "b", "b-/1", "b./1", "b/", "b0/1", "ba/x",
	"c d", "c+d", "c%20d", "d&<>\"'", "é", "é/ü", "日本/語", "\U0001F600", "~", "Z", "_", "!", "(x)", "=,;:@$",
}

// tree puts keys below prefix; it returns what a list of prefix must show, in order.
func tree(t *testing.T, st Store, prefix string) []string {
	want := map[string]bool{}
	for _, k := range keys {
		if strings.HasSuffix(k, "/") {
			k += "file"
		}
		name, _, folder := strings.Cut(k, "/")
		if folder {
			name += "/"
		}
		if want[strings.TrimSuffix(name, "/")] || want[name+"/"] {
			continue // a file system cannot have both
		}
		want[name] = true
		st.Put(t, prefix+k, []byte(k))
	}
	return slices.Sorted(maps.Keys(want))
}

// names of a page in key order; it checks what a page promises.
func names(t *testing.T, prefix string, p source.Page) []string {
	t.Helper()
	var out []string
	for _, o := range p.Objects {
		out = append(out, strings.TrimPrefix(o.Key, prefix))
	}
	if !slices.IsSorted(out) {
		t.Errorf("objects are not in key order: %q", out)
	}
	var folders []string
	for _, f := range p.Folders {
		folders = append(folders, f+"/")
	}
	if !slices.IsSorted(folders) {
		t.Errorf("folders are not in key order: %q", folders)
	}
	out = append(out, folders...)
	slices.Sort(out)
	if p.Next != "" && len(out) == 0 {
		t.Errorf("a page that goes on at %q has no entry", p.Next)
	}
	return out
}

func testPages(t *testing.T, st Store) {
	st.Put(t, "before", nil)
	st.Put(t, "p0", nil)
	want := tree(t, st, "p/")
	s := st.Open(t)
	for _, size := range []int{0, 1, 2, 3, 7, len(want) - 1, len(want), len(want) + 1} {
		for _, another := range []bool{false, true} { // the next page is read by another process
			got := pages(t, st, s, size, another)
			if !slices.Equal(got, want) {
				t.Errorf("pages of %d, another source %v:\n got %q\nwant %q", size, another, got, want)
			}
		}
	}
	root, err := s.List(t.Context(), source.ListInput{})
	if err != nil || !slices.Equal(names(t, "", root), []string{"before", "p/", "p0"}) {
		t.Errorf("root: %+v, %v", root, err)
	}
}

func pages(t *testing.T, st Store, s source.Source, size int, another bool) (all []string) {
	t.Helper()
	in := source.ListInput{Prefix: "p/", Max: size}
	for {
		page, err := s.List(t.Context(), in)
		if err != nil {
			t.Fatal(err)
		}
		if n := len(page.Objects) + len(page.Folders); size > 0 && n > size {
			t.Errorf("a page of at most %d has %d entries", size, n)
		}
		all = append(all, names(t, in.Prefix, page)...)
		if page.Next == "" || len(all) > 2*len(keys) {
			return all
		}
		in.After = page.Next
		if another {
			s = st.Open(t)
		}
	}
}

func testAfter(t *testing.T, st Store) {
	want := tree(t, st, "p/")
	s := st.Open(t)
	for i, key := range want {
		name, folder := strings.CutSuffix(key, "/")
		in := source.ListInput{Prefix: "p/", After: source.AfterName(name, folder)}
		page, err := s.List(t.Context(), in)
		if err != nil {
			t.Fatal(err)
		}
		if got := names(t, "p/", page); !slices.Equal(got, want[i+1:]) {
			t.Errorf("after %q:\n got %q\nwant %q", in.After, got, want[i+1:])
		}
		// Just before a folder, as those do who look for one.
		page, err = s.List(t.Context(), source.ListInput{Prefix: "p/", After: name + ".\U0010FFFF", Max: 1})
		if folder && (err != nil || !slices.Equal(page.Folders, []string{name})) {
			t.Errorf("folder %q is not behind %q: %+v, %v", name, name+".\U0010FFFF", page, err)
		}
	}
}

func testUnusualNames(t *testing.T, st Store) {
	s := st.Open(t)
	for _, name := range append(slices.Clone(keys), strings.Repeat("n", 255), strings.Repeat("é", 127), `back\slash`, "*?[x]", "trailing ", " leading", "...", "-rf") {
		key := "u/" + strings.TrimSuffix(strings.ReplaceAll(name, "/", "_"), "/")
		data := []byte("content of " + key)
		st.Put(t, key, data)
		_, got, err := readWhole(t.Context(), s, key)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%q: %q, %v", key, got, err)
		}
		page, err := s.List(t.Context(), source.ListInput{Prefix: "u/"})
		if err != nil || !slices.ContainsFunc(page.Objects, func(o object.Object) bool { return o.Key == key }) {
			t.Errorf("%q is not listed: %+v, %v", key, page, err)
		}
		st.Delete(t, key)
	}
}

func testInvalid(t *testing.T, st Store) {
	st.Put(t, "a/b", []byte("x"))
	s := st.Open(t)
	for _, key := range []string{"", "/", "a/", "/a", "a//b", ".", "..", "a/..", "../a", "a/../a/b", "a/./b", "a/b\x00", strings.Repeat("n", 256)} {
		if _, err := s.Head(t.Context(), key); !errors.Is(err, object.ErrInvalid) {
			t.Errorf("head %q: %v", key, err)
		}
		o := object.Object{Store: s.Store(), Key: key, Version: "v", Size: 1}
		if _, err := s.Get(t.Context(), o, 0, 1); !errors.Is(err, object.ErrInvalid) {
			t.Errorf("get %q: %v", key, err)
		}
	}
	for _, prefix := range []string{"a", "/", "a//", "../", "a/../", "./", "a/\x00/"} {
		if _, err := s.List(t.Context(), source.ListInput{Prefix: prefix}); !errors.Is(err, object.ErrInvalid) {
			t.Errorf("list %q: %v", prefix, err)
		}
	}
	o := object.Object{Store: s.Store(), Key: "a/b", Version: "v", Size: 10}
	for _, r := range [][2]int64{{-1, 1}, {0, 0}, {0, -1}, {0, 11}, {10, 1}, {5, 6}} {
		if _, err := s.Get(t.Context(), o, r[0], r[1]); !errors.Is(err, object.ErrInvalid) {
			t.Errorf("get %d+%d of 10: %v", r[0], r[1], err)
		}
	}
}

func testCancelled(t *testing.T, st Store) {
	st.Put(t, "a", content(1<<20))
	s := st.Open(t)
	o, err := s.Head(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	r, err := s.Get(ctx, o, 0, o.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	gone := errors.New("the reader went away")
	cancel(gone)
	if _, err := io.Copy(io.Discard, r); !errors.Is(err, gone) {
		t.Errorf("reading on: %v", err)
	}
	if _, err := s.Head(ctx, "a"); !errors.Is(err, gone) {
		t.Errorf("head: %v", err)
	}
	if _, err := s.Get(ctx, o, 0, 1); !errors.Is(err, gone) {
		t.Errorf("get: %v", err)
	}
	if _, err := s.List(ctx, source.ListInput{}); !errors.Is(err, gone) {
		t.Errorf("list: %v", err)
	}
}

func testDenied(t *testing.T, st Store) {
	if st.Denied == nil {
		return // there is one credential only, and who has none gets no source
	}
	st.Put(t, "a/b", []byte("x"))
	o, err := st.Open(t).Head(t.Context(), "a/b")
	if err != nil {
		t.Fatal(err)
	}
	s := st.Denied(t)
	if _, err := s.Head(t.Context(), "a/b"); !errors.Is(err, object.ErrDenied) {
		t.Errorf("head: %v", err)
	}
	if _, err := s.Get(t.Context(), o, 0, 1); !errors.Is(err, object.ErrDenied) {
		t.Errorf("get: %v", err)
	}
	if _, err := s.List(t.Context(), source.ListInput{Prefix: "a/"}); !errors.Is(err, object.ErrDenied) {
		t.Errorf("list: %v", err)
	}
	if s.Store() != st.Open(t).Store() {
		t.Errorf("the store of another credential is %s", s.Store())
	}
	if s.Principal() == st.Open(t).Principal() {
		t.Error("two credentials are one principal")
	}
}

func testIdentity(t *testing.T, st Store) {
	a, b := st.Open(t), st.Open(t)
	if a.Store() != b.Store() || a.Principal() != b.Principal() {
		t.Errorf("two sources of one store and credential differ: %s %s", a.Store(), b.Store())
	}
	if a.Principal() == (object.Principal{}) {
		t.Error("the principal is nobody")
	}
}

func read(ctx context.Context, s source.Source, o object.Object, off, n int64) ([]byte, error) {
	if n == 0 {
		return nil, nil
	}
	r, err := s.Get(ctx, o, off, n)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	got, err := io.ReadAll(r)
	if err == nil && int64(len(got)) != n {
		err = fmt.Errorf("the reader ended after %d of %d bytes", len(got), n)
	}
	return got, err
}

func content(n int) []byte {
	out := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(out)
	return out
}
