package metadata

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source/s3"
	"github.com/larderfs/larder/sanity/s3test"
)

func openS3(t *testing.T, srv *s3test.Server, bucket, access, secret string) *s3.Source {
	t.Helper()
	s, err := s3.New(s3.Config{
		Bucket: bucket, Endpoint: srv.Endpoint, Region: srv.Region, PathStyle: true,
		Credentials: s3.Credentials{AccessKeyID: access, SecretAccessKey: secret}, NodeKey: []byte("node"),
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestOverS3 asks a real server: pages, folders, overwritten files, a credential that may
// only read, and one that is refused.
func TestOverS3(t *testing.T) {
	srv := s3test.Start(t)
	for user, rights := range map[string]s3test.Rights{"reader": {Read: true}, "stranger": {}} {
		if err := srv.AddUser(t.Context(), user, user+"secret", rights); err != nil {
			t.Fatal(err)
		}
	}
	const files = 1203 // more than a page
	var wg sync.WaitGroup
	for k := range 8 {
		wg.Go(func() {
			for i := k; i < files; i += 8 {
				if _, err := srv.Put(fmt.Sprintf("d/f%05d", i), []byte{1}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if _, err := srv.Put("d/sub/x y+%é", []byte("x")); err != nil {
		t.Fatal(err)
	}
	refused := 0
	c := New(Config{OnDenied: func(object.Principal, object.Store) { refused++ }})
	t.Cleanup(func() { checkInvariants(t, c) })
	root := openS3(t, srv, srv.Bucket, srv.AccessKey, srv.SecretKey)
	v := c.View(root)
	if err := v.Check(t.Context(), "d/"); err != nil {
		t.Error(err)
	}
	srv.ResetCounts()
	for range 3 {
		n, after := 0, ""
		for more := true; more; {
			es, m, err := v.List(t.Context(), "d/", after, time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range es {
				want := fmt.Sprintf("f%05d", n)
				if n == files {
					want = "sub/"
				}
				if e.Cookie() != want {
					t.Fatalf("entry %d is %q", n, e.Cookie())
				}
				n++
				after = e.Cookie()
			}
			more = m
		}
		if n != files+1 {
			t.Errorf("%d entries", n)
		}
	}
	for i := range files {
		if e, err := v.Lookup(t.Context(), "d/", fmt.Sprintf("f%05d", i), time.Hour); err != nil || e.Object.Size != 1 {
			t.Fatal(e, err)
		}
	}
	if _, err := v.Lookup(t.Context(), "d/", "nope", time.Hour); !errors.Is(err, object.ErrNotFound) {
		t.Error(err)
	}
	if n := srv.Counts(); n.List != 2 || n.Head != 0 {
		t.Errorf("%+v; want two LISTs", n)
	}
	if e, err := v.Lookup(t.Context(), "d/sub/", "x y+%é", time.Hour); err != nil || e.Object.Key != "d/sub/x y+%é" {
		t.Error(e, err)
	}
	if e, err := v.Lookup(t.Context(), "", "d", 0); err != nil || !e.Folder {
		t.Error(e, err)
	}

	etag, err := srv.Put("d/f00007", []byte("other"))
	if err != nil {
		t.Fatal(err)
	}
	v.Invalidate("d/", "f00007")
	e, err := v.Lookup(t.Context(), "d/", "f00007", time.Hour)
	if err != nil || e.Object.Version != strings.Trim(etag, `"`) || e.Object.Size != 5 {
		t.Errorf("%+v, %v; want version %s", e, err, etag)
	}
	if o, err := root.Head(t.Context(), "d/f00007"); err != nil || o != e.Object {
		t.Errorf("looked up %+v, head %+v, %v", e.Object, o, err)
	}

	only := c.View(openS3(t, srv, srv.Bucket, "reader", "readersecret"))
	if e, err := only.Lookup(t.Context(), "d/", "f00008", time.Hour); err != nil || e.Object.Size != 1 || refused != 1 {
		t.Errorf("a credential that may not list: %+v, %v, %d refusals", e, err, refused)
	}
	if _, err := c.View(openS3(t, srv, srv.Bucket, "stranger", "strangersecret")).Lookup(t.Context(), "d/", "f00008", time.Hour); !errors.Is(err, object.ErrDenied) {
		t.Errorf("stranger: %v", err)
	}
	err = c.View(openS3(t, srv, "no-such-bucket", srv.AccessKey, srv.SecretKey)).Check(t.Context(), "p/")
	if !errors.Is(err, object.ErrNotFound) || !strings.Contains(err.Error(), "no-such-bucket") {
		t.Errorf("check of a bucket that does not exist: %v", err)
	}
}

// BenchmarkLookupKnown: what does a lookup cost that needs no request?
func BenchmarkLookupKnown(b *testing.B) {
	v := New(Config{}).View(benchStore(b).Source("alice"))
	names := make([]string, 5000)
	for i := range names {
		names[i] = fmt.Sprintf("f%05d", i)
	}
	for after, more := "", true; more; {
		es, m, err := v.List(b.Context(), "d/", after, time.Hour)
		if err != nil {
			b.Fatal(err)
		}
		after, more = es[len(es)-1].Cookie(), m
	}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		if _, err := v.Lookup(b.Context(), "d/", names[i%len(names)], time.Hour); err != nil {
			b.Fatal(err)
		}
		i++
	}
}

// BenchmarkListKnown: and a page of a list?
func BenchmarkListKnown(b *testing.B) {
	v := New(Config{}).View(benchStore(b).Source("alice"))
	b.ReportAllocs()
	for b.Loop() {
		if es, _, err := v.List(b.Context(), "d/", "", time.Hour); err != nil || len(es) < 900 {
			b.Fatal(len(es), err)
		}
	}
}
