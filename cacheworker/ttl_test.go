package cacheworker

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/larderfs/larder/cacheworker/cachestore"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/tiers"
	"github.com/larderfs/larder/master/client"
)

// ttlWorker has a cache and a mount table, and nothing else.
func ttlWorker(t *testing.T) *Worker {
	t.Helper()
	c, err := tiers.Open(t.Context(), tiers.Config{Tiers: []tiers.Tier{{Kind: tiers.SSD, Store: cachestore.Config{Dir: t.TempDir(), CapacityBytes: 1 << 30}}}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return &Worker{store: c, log: slog.New(slog.DiscardHandler), namespace: &mountTable{changed: make(chan struct{}, 1)}}
}

func (w *Worker) cache(t *testing.T, o object.Object) *cachestore.File {
	t.Helper()
	f, err := w.store.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	for i := range o.Chunks() {
		err = errors.Join(err, f.Put(i, make([]byte, o.ChunkLen(i))))
	}
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func mountTTL(path, uri string, options ...string) client.Mount {
	m := client.Mount{Path: path, URI: uri, Options: map[string]string{}}
	for i := 0; i < len(options); i += 2 {
		m.Options[options[i]] = options[i+1]
	}
	return m
}

// The clock is what expireOnce is told.
func TestAMountsTTLFreesWhatIsBelowItsURI(t *testing.T) {
	w := ttlWorker(t)
	const here, there, aws = "s3://s3:9000/bucket", "s3://other:9000/bucket", "s3://s3.us-east-1.amazonaws.com/bucket"
	objects := map[string]object.Object{}
	for _, name := range []string{here + " a/x", here + " a/short/y", here + " ab", here + " a/pinned", there + " a/x", aws + " a/x", "file:///srv data/x", "file:///srv datax"} {
		store, key, _ := strings.Cut(name, " ")
		objects[name] = object.Object{Store: object.Store(store), Key: key, Version: "1", Size: 3000}
		if err := w.cache(t, objects[name]).Close(); err != nil {
			t.Fatal(err)
		}
	}
	pinned, tailed := objects[here+" a/pinned"], objects[here+" a/x"]
	if err := errors.Join(w.store.Pin(t.Context(), pinned.ID()), w.store.KeepTail(tailed, make([]byte, 1000))); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	left := func() string {
		var names []string
		for name, o := range objects {
			if w.store.Peek(o.ID()).Exists {
				names = append(names, name)
			}
		}
		return strings.Join(slices.Sorted(slices.Values(names)), ", ")
	}
	everything := strings.Join(slices.Sorted(maps.Keys(objects)), ", ")
	without := func(gone ...string) string {
		return strings.Join(slices.Sorted(maps.Keys(maps.Collect(func(yield func(string, object.Object) bool) {
			for name, o := range objects {
				if !slices.Contains(gone, name) && !yield(name, o) {
					return
				}
			}
		}))), ", ")
	}
	at := func(after time.Duration, want string, again time.Duration, mounts ...client.Mount) {
		t.Helper()
		if _, err := w.namespace.set(client.Table{ID: "t", Mounts: mounts}); err != nil {
			t.Fatal(err)
		}
		if got := w.expireOnce(t.Context(), began.Add(after)); got != again && again != 0 {
			t.Errorf("after %v: looks again in %v, want %v", after, got, again)
		}
		if got := left(); got != want {
			t.Errorf("after %v there is\n%s\nwant\n%s", after, got, want)
		}
	}
	endpoint := "http://s3:9000"
	a := mountTTL("/a", "s3://bucket/a", "endpoint", endpoint, "ttl", "1h")
	short := mountTTL("/a/short", "s3://bucket/a/short", "endpoint", endpoint, "ttl", "20m")
	at(1000*time.Hour, everything, 0, mountTTL("/a", "s3://bucket/a", "endpoint", endpoint))
	at(10*time.Minute, everything, 2*time.Minute, a, short)
	at(30*time.Minute, without(here+" a/short/y"), 2*time.Minute, a, short)
	at(50*time.Minute, without(here+" a/short/y"), 6*time.Minute, a)
	if w.store.TailBytes(tailed.ID()) == 0 {
		t.Error("a tail went before its time")
	}

	open := w.cache(t, objects[here+" a/x"])
	at(2*time.Hour, without(here+" a/short/y", here+" a/x"), 6*time.Minute, a)
	if n, err := open.ReadAt(make([]byte, 3000), 0); n != 3000 || err != nil {
		t.Errorf("what is open reads %d bytes, %v", n, err)
	}
	if err := open.Close(); err != nil {
		t.Error(err)
	}
	if w.store.TailBytes(tailed.ID()) != 0 {
		t.Error("the tail stays")
	}
	if got := w.expired.Load(); got != 3000+3000+1000 {
		t.Errorf("%d bytes are counted", got)
	}

	// Another mount, in the place of that: of AWS, and of a folder.
	gone := []string{here + " a/short/y", here + " a/x"}
	at(10*time.Hour, without(append(gone, aws+" a/x")...), 6*time.Minute, mountTTL("/a", "s3://bucket/a", "ttl", "1h"))
	at(24*time.Hour, without(append(gone, aws+" a/x", "file:///srv data/x")...), expireSeldom, mountTTL("/a", "file:///srv/data", "ttl", "10h"))
	at(24*time.Hour, without(append(gone, aws+" a/x", "file:///srv data/x")...), expireSeldom, mountTTL("/a", "s3://bucket/a", "endpoint", endpoint, "ttl", "1000h"))
	w.store.Unpin(pinned.ID())
	at(48*time.Hour, without(append(gone, aws+" a/x", "file:///srv data/x", here+" a/pinned")...), 0, a)
}

// What is fetched anew is as young as it is.
func TestTTLBeginsAnewWithWhatIsCachedAgain(t *testing.T) {
	w := ttlWorker(t)
	o := object.Object{Store: "s3://s3:9000/bucket", Key: "a", Version: "1", Size: 10}
	table := client.Table{ID: "t", Mounts: []client.Mount{mountTTL("/", "s3://bucket", "endpoint", "http://s3:9000", "ttl", "1h")}}
	if _, err := w.namespace.set(table); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := w.cache(t, o).Close(); err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			after time.Duration
			there bool
		}{{59 * time.Minute, true}, {61 * time.Minute, false}} {
			w.expireOnce(t.Context(), time.Now().Add(c.after))
			if there := w.store.Peek(o.ID()).Exists; there != c.there {
				t.Fatal(fmt.Sprint("after ", c.after, " it is there: ", there))
			}
		}
	}
}
