package s3

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
	"github.com/larderfs/larder/sanity/s3test"
)

func listingOf(out *s3.ListObjectsV2Output) *listing {
	l := &listing{}
	l.take(out)
	return l
}

// versitygw keeps keys as paths, so the odd ones come from a made-up answer.
func TestKeysThatNoPathCanExpressAreHidden(t *testing.T) {
	out := &s3.ListObjectsV2Output{}
	file := func(key string, size int64) {
		out.Contents = append(out.Contents, types.Object{Key: &key, Size: &size, ETag: aws.String(`"e"`), LastModified: aws.Time(time.Unix(5, 6))})
	}
	folder := func(prefix string) {
		out.CommonPrefixes = append(out.CommonPrefixes, types.CommonPrefix{Prefix: &prefix})
	}
	file("d/", 0) // the folder's own marker
	for _, name := range []string{"good", ".", "..", "nul\x00", strings.Repeat("n", 256), "é"} {
		file("d/"+name, 1)
		folder("d/" + name + "-folder/")
		folder("d/" + name + "/")
	}
	folder("d//")

	entries, hidden := (&Source{store: "s"}).entries("d/", "", listingOf(out))
	var got []string
	for _, e := range entries {
		got = append(got, e.key)
	}
	want := []string{".-folder/", "..-folder/", "good", "good-folder/", "good/", "é", "é-folder/", "é/"}
	if !slices.Equal(got, want) || hidden != 11 {
		t.Errorf("%q, %d hidden; want %q, 11", got, hidden, want)
	}
	wantObj := object.Object{Store: "s", Key: "d/good", Version: "e", Size: 1, ModTime: time.Unix(5, 0).UTC()}
	if i := slices.IndexFunc(entries, func(e entry) bool { return e.key == "good" }); entries[i].obj != wantObj {
		t.Errorf("%+v", entries[i].obj)
	}
	out.Contents = nil
	file("d/", 1)
	if _, hidden := (&Source{}).entries("d/", "", listingOf(out)); hidden != 8 {
		t.Errorf("a marker with content: %d hidden", hidden)
	}
}

func TestKeysAreDecodedWhereTheStoreEncodedThem(t *testing.T) {
	key := "d/a b+c%\n\x01é"
	encoded := url.QueryEscape(key)
	out := &s3.ListObjectsV2Output{Contents: []types.Object{{Key: &encoded, ETag: aws.String("e")}}, EncodingType: types.EncodingTypeUrl}
	entries, _ := (&Source{}).entries("d/", "", listingOf(out))
	if len(entries) != 1 || entries[0].obj.Key != key {
		t.Errorf("%+v", entries)
	}
	out.EncodingType = ""
	out.Contents[0].Key = &key
	if entries, _ = (&Source{}).entries("d/", "", listingOf(out)); len(entries) != 1 || entries[0].obj.Key != key {
		t.Errorf("%+v", entries)
	}
}

func TestFolderMarkerIsNoFile(t *testing.T) {
	srv := s3test.Start(t)
	put(t, srv, "m/", nil)
	put(t, srv, "n/", nil)
	put(t, srv, "n/a", []byte("x"))
	s := open(t, srv, nil)
	root, err := s.List(t.Context(), source.ListInput{})
	if err != nil || !slices.Equal(root.Folders, []string{"m", "n"}) || len(root.Objects) != 0 || root.Hidden != 0 {
		t.Errorf("root: %+v, %v", root, err)
	}
	m, err := s.List(t.Context(), source.ListInput{Prefix: "m/"})
	if err != nil || len(m.Objects)+len(m.Folders)+m.Hidden != 0 || m.Next != "" {
		t.Errorf("m/: %+v, %v", m, err)
	}
	srv.ResetCounts()
	n, err := s.List(t.Context(), source.ListInput{Prefix: "n/", Max: 1})
	if err != nil || len(n.Objects) != 1 || n.Objects[0].Key != "n/a" {
		t.Errorf("n/: %+v, %v", n, err)
	}
	if c := srv.Counts(); c.List != 1 {
		t.Errorf("the marker cost %d lists", c.List)
	}
	if _, err := s.Head(t.Context(), "m"); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("head m: %v", err)
	}
}

// queries records what LISTs ask for.
type queries struct {
	mu  sync.Mutex
	all []url.Values
}

func (q *queries) hook(w http.ResponseWriter, r *http.Request, req s3test.Request, next http.Handler) {
	if req.Kind == s3test.List {
		q.mu.Lock()
		q.all = append(q.all, r.URL.Query())
		q.mu.Unlock()
	}
	next.ServeHTTP(w, r)
}

func TestSeriesOfPagesUsesTheStoresToken(t *testing.T) {
	srv := s3test.Start(t)
	for i := range 6 {
		put(t, srv, fmt.Sprintf("d/%d", i), nil)
	}
	s := open(t, srv, nil)
	var q queries
	srv.SetHook(q.hook)
	first, err := s.List(t.Context(), source.ListInput{Prefix: "d/", Max: 2, After: "0"})
	if err != nil {
		t.Fatal(err)
	}
	in := source.ListInput{Prefix: "d/", Max: 2, After: first.Next}
	for range 2 { // a token is used once
		if page, err := s.List(t.Context(), in); err != nil || len(page.Objects) != 2 || page.Objects[0].Key != "d/3" {
			t.Errorf("second page: %+v, %v", page, err)
		}
	}
	if len(q.all) != 3 || q.all[1].Get("continuation-token") == "" || q.all[2].Has("continuation-token") || q.all[2].Get("start-after") != "d/2" {
		t.Errorf("asked %v", q.all)
	}
}

func TestTokenThatTheStoreForgotIsReplacedByTheName(t *testing.T) {
	srv := s3test.Start(t)
	for i := range 4 {
		put(t, srv, fmt.Sprintf("d/%d", i), nil)
	}
	s := open(t, srv, nil)
	first, err := s.List(t.Context(), source.ListInput{Prefix: "d/", Max: 2, After: "0"})
	if err != nil {
		t.Fatal(err)
	}
	srv.SetHook(s3test.Times(1, s3test.List, s3test.Refuse(400, "InvalidArgument")))
	page, err := s.List(t.Context(), source.ListInput{Prefix: "d/", After: first.Next})
	if err != nil || len(page.Objects) != 1 || page.Objects[0].Key != "d/3" {
		t.Errorf("%+v, %v", page, err)
	}
}

func TestFolderOfThousandsIsPagedByTheStore(t *testing.T) {
	srv := s3test.Start(t)
	dir := filepath.Join(srv.Dir, srv.Bucket, "d")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	var want []string
	for i := range 2500 {
		name := fmt.Sprintf("%05d", i)
		want = append(want, name)
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s := open(t, srv, nil)
	var got []string
	in := source.ListInput{Prefix: "d/"}
	for {
		page, err := s.List(t.Context(), in)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range page.Objects {
			got = append(got, strings.TrimPrefix(o.Key, "d/"))
		}
		if in.After = page.Next; in.After == "" {
			break
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("%d names", len(got))
	}
	if c := srv.Counts(); c.List != 3 || c.Head != 0 {
		t.Errorf("%+v", c)
	}
}

// A file that was put into the gateway's folder by hand has no etag.
func TestObjectWithoutEtagIsReadByItsTime(t *testing.T) {
	srv := s3test.Start(t)
	path := filepath.Join(srv.Dir, srv.Bucket, "hand")
	write := func(text string, at time.Time) {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, at, at); err != nil {
			t.Fatal(err)
		}
	}
	at := time.Unix(1_700_000_000, 987_654_321)
	write("first", at)
	s := open(t, srv, nil)
	o, err := s.Head(t.Context(), "hand")
	if err != nil || o.Version != "mtime:1700000000" || o.Size != 5 {
		t.Fatalf("head: %+v, %v", o, err)
	}
	page, err := s.List(t.Context(), source.ListInput{})
	if err != nil || len(page.Objects) != 1 || page.Objects[0] != o {
		t.Errorf("list: %+v, %v; head %+v", page, err, o)
	}
	f := &fixture{srv: srv, src: s, obj: o}
	if got, err := f.read(t.Context(), 1, 3); err != nil || string(got) != "irs" {
		t.Errorf("get: %q, %v", got, err)
	}
	for _, change := range []time.Duration{time.Second, time.Hour, -time.Hour} {
		write("other", at.Add(change))
		if got, err := f.read(t.Context(), 0, 5); !errors.Is(err, object.ErrChanged) {
			t.Errorf("written %v later: %q, %v", change, got, err)
		}
	}
	write("first and more", at)
	if got, err := f.read(t.Context(), 0, 5); !errors.Is(err, object.ErrChanged) {
		t.Errorf("longer: %q, %v", got, err)
	}
	put(t, srv, "hand", []byte("first")) // now it has an etag
	if got, err := f.read(t.Context(), 0, 5); !errors.Is(err, object.ErrChanged) {
		t.Errorf("put: %q, %v", got, err)
	}
}
