package fill

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/feature/s3/transfermanager"
	"github.com/aws/aws-sdk-go-v2/feature/s3/transfermanager/types"
	awss3 "github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/larderfs/larder/cacheworker/cachestore"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source/s3"
	"github.com/larderfs/larder/sanity/s3test"
)

func openS3(t testing.TB, srv *s3test.Server, endpoint, access, secret string) *s3.Source {
	t.Helper()
	s, err := s3.New(s3.Config{
		Bucket: srv.Bucket, Endpoint: endpoint, Region: srv.Region, PathStyle: true,
		Credentials: s3.Credentials{AccessKeyID: access, SecretAccessKey: secret}, NodeKey: []byte("node"),
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestOverS3 fills from a real server: shared fetches, another credential, one that may not
// read, and an object that is overwritten.
func TestOverS3(t *testing.T) {
	srv := s3test.Start(t)
	for user, rights := range map[string]s3test.Rights{"reader": {List: true, Read: true}, "stranger": {List: true}} {
		if err := srv.AddUser(t.Context(), user, user+"secret", rights); err != nil {
			t.Fatal(err)
		}
	}
	data := content(1, 40*mib+13)
	if _, err := srv.Put("d/a", data); err != nil {
		t.Fatal(err)
	}
	if err := srv.Age(time.Hour); err != nil { // no GET is confirmed by a HEAD
		t.Fatal(err)
	}
	root := openS3(t, srv, srv.Endpoint, srv.AccessKey, srv.SecretKey)
	reader := openS3(t, srv, srv.Endpoint, "reader", "readersecret")
	stranger := openS3(t, srv, srv.Endpoint, "stranger", "strangersecret")
	obj, err := root.Head(t.Context(), "d/a")
	if err != nil {
		t.Fatal(err)
	}
	cache := openCache(t, 1<<30)
	w := newWorld(t, cache, Config{})
	defer w.close()
	srv.ResetCounts()
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			r := w.fills.Open(obj, root)
			defer r.Close()
			for off := int64(0); off < obj.Size; off += 128 << 10 {
				if err := check(r, data, off, 128<<10); err != nil {
					t.Errorf("reader %d: %v", i, err)
				}
			}
		})
	}
	wg.Wait()
	if c := srv.Counts(); c.GetBytes != obj.Size || c.Head != 0 || c.List != 0 {
		t.Errorf("four cold readers: %+v; the object has %d bytes", c, obj.Size)
	}

	srv.ResetCounts()
	r := w.fills.Open(obj, reader)
	defer r.Close()
	w.read(r, data, 0, len(data))
	w.read(r, data, 0, len(data))
	if c := srv.Counts(); c.Head != 1 || c.Get != 0 {
		t.Errorf("another credential: %+v; want one HEAD", c)
	}
	s := w.fills.Open(obj, stranger)
	defer s.Close()
	if err := s.Authorize(t.Context()); !errors.Is(err, object.ErrDenied) {
		t.Errorf("stranger opens: %v", err)
	}
	if err := check(s, data, 0, 100); !errors.Is(err, object.ErrDenied) {
		t.Errorf("stranger reads: %v", err)
	}

	if _, err := srv.Put("d/b", data); err != nil {
		t.Fatal(err)
	}
	if obj, err = root.Head(t.Context(), "d/b"); err != nil {
		t.Fatal(err)
	}
	b := w.fills.Open(obj, root)
	defer b.Close()
	w.read(b, data, 0, 100)
	if _, err := srv.Put("d/b", content(2, len(data))); err != nil {
		t.Fatal(err)
	}
	w.read(b, data, 200, 100)
	if err := check(b, data, 20*mib, 100); !errors.Is(err, object.ErrChanged) {
		t.Errorf("overwritten: %v", err)
	}
}

// put writes the object "a" as if it were old, so that no GET is confirmed by a HEAD.
func put(b *testing.B, srv *s3test.Server, data []byte) {
	b.Helper()
	_, err := srv.Put("a", data)
	if err := errors.Join(err, srv.Age(time.Hour)); err != nil {
		b.Fatal(err)
	}
}

// cold reads an object in order through an empty cache, as FUSE would, and returns how long the first
// bytes and all took.
func cold(b *testing.B, src *s3.Source, obj object.Object, n int) (first, all time.Duration) {
	b.StopTimer()
	dir, err := os.MkdirTemp(b.TempDir(), "")
	if err != nil {
		b.Fatal(err)
	}
	defer os.RemoveAll(dir) // at once: the next run then finds pages that the kernel has used before
	cache, err := cachestore.Open(cachestore.Config{Dir: dir, CapacityBytes: 2*obj.Size + 64*mib})
	if err != nil {
		b.Fatal(err)
	}
	fills := New(Config{}, cache)
	b.StartTimer()
	start := time.Now()
	r := fills.Open(obj, src)
	p := make([]byte, n)
	for off := int64(0); off < obj.Size; off += int64(n) {
		if _, err := r.ReadAt(b.Context(), p, off); err != nil {
			b.Fatal(err)
		}
		if off == 0 {
			first = time.Since(start)
		}
	}
	all = time.Since(start)
	b.StopTimer()
	if err := errors.Join(r.Close(), fills.Close(), cache.Close()); err != nil {
		b.Error(err)
	}
	b.StartTimer()
	return first, all
}

func median(d []time.Duration) float64 {
	slices.Sort(d)
	return d[len(d)/2].Seconds()
}

// BenchmarkColdSequentialAgainstSDK: is a cold read through the cache slower than the SDK's own download? The
// runs are interleaved; what counts are the ratios of medians.
func BenchmarkColdSequentialAgainstSDK(b *testing.B) {
	srv := s3test.Start(b)
	data := content(1, 256*mib)
	put(b, srv, data)
	src := openS3(b, srv, srv.DirectEndpoint, srv.AccessKey, srv.SecretKey)
	obj, err := src.Head(b.Context(), "a")
	if err != nil {
		b.Fatal(err)
	}
	for _, n := range []int{128 << 10, mib} {
		b.Run(fmt.Sprintf("%dK", n>>10), func(b *testing.B) {
			b.SetBytes(obj.Size)
			var ours, firsts, sdk, get, sdkFirsts []time.Duration
			buf := make([]byte, obj.Size)
			for b.Loop() {
				first, all := cold(b, src, obj, n)
				ours, firsts = append(ours, all), append(firsts, first)
				sdk = append(sdk, download(b, srv, buf))
				first, all = plainGet(b, srv, n)
				get, sdkFirsts = append(get, all), append(sdkFirsts, first)
			}
			if !bytes.Equal(buf, data) {
				b.Error("the SDK got other bytes")
			}
			b.ReportMetric(float64(obj.Size)/mib/median(ours), "cache-MiB/s")
			b.ReportMetric(float64(obj.Size)/mib/median(sdk), "sdk-MiB/s")
			b.ReportMetric(median(sdk)/median(ours), "speed/sdk-parallel")
			b.ReportMetric(median(get)/median(ours), "speed/sdk-get")
			b.ReportMetric(median(firsts)/median(sdkFirsts), "first-read/sdk-get")
		})
	}
}

// download is the SDK's parallel one, into memory.
func download(b *testing.B, srv *s3test.Server, buf []byte) time.Duration {
	start := time.Now()
	d := transfermanager.New(srv.DirectClient(), func(o *transfermanager.Options) { o.GetObjectType = types.GetObjectRanges })
	in := &transfermanager.DownloadObjectInput{Bucket: &srv.Bucket, Key: aws.String("a"), WriterAt: types.NewWriteAtBuffer(buf)}
	if _, err := d.DownloadObject(b.Context(), in); err != nil {
		b.Fatal(err)
	}
	return time.Since(start)
}

// plainGet is one GET, read in pieces of n bytes.
func plainGet(b *testing.B, srv *s3test.Server, n int) (first, all time.Duration) {
	start := time.Now()
	out, err := srv.DirectClient().GetObject(b.Context(), &awss3.GetObjectInput{Bucket: &srv.Bucket, Key: aws.String("a")})
	if err != nil {
		b.Fatal(err)
	}
	defer out.Body.Close()
	p := make([]byte, n)
	for {
		_, err := io.ReadFull(out.Body, p)
		if first == 0 {
			first = time.Since(start)
		}
		if err == io.EOF {
			return first, time.Since(start)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkColdRandomRead4KAgainstSDK: what does one cold 4 KiB read cost, compared with a ranged GET of 4 KiB?
func BenchmarkColdRandomRead4KAgainstSDK(b *testing.B) {
	srv := s3test.Start(b)
	put(b, srv, content(1, 256*mib))
	src := openS3(b, srv, srv.DirectEndpoint, srv.AccessKey, srv.SecretKey)
	obj, err := src.Head(b.Context(), "a")
	if err != nil {
		b.Fatal(err)
	}
	var ours, sdk []time.Duration
	p := make([]byte, 4096)
	for b.Loop() {
		b.StopTimer()
		cache := openCache(b, 2*obj.Size+64*mib)
		fills := New(Config{}, cache)
		r := fills.Open(obj, src)
		b.StartTimer()
		for i := range int64(32) {
			off := (i * 37 % 256) * mib
			start := time.Now()
			if _, err := r.ReadAt(b.Context(), p, off+5000); err != nil {
				b.Fatal(err)
			}
			ours = append(ours, time.Since(start))
			settle(b, fills)
			start = time.Now()
			out, err := srv.DirectClient().GetObject(b.Context(), &awss3.GetObjectInput{
				Bucket: &srv.Bucket, Key: aws.String("a"), Range: aws.String(fmt.Sprintf("bytes=%d-%d", off, off+4095)),
			})
			if err == nil {
				_, err = io.ReadFull(out.Body, p)
				out.Body.Close()
			}
			if err != nil {
				b.Fatal(err)
			}
			sdk = append(sdk, time.Since(start))
		}
		b.StopTimer()
		if err := errors.Join(r.Close(), fills.Close(), cache.Close()); err != nil {
			b.Error(err)
		}
		b.StartTimer()
	}
	b.ReportMetric(median(ours)*1e6, "cache-µs")
	b.ReportMetric(median(ours)/median(sdk), "time/sdk-get")
}

// settle waits until nothing is in flight.
func settle(b testing.TB, f *Fills) {
	for {
		f.mu.Lock()
		var some *chunk
		for _, c := range f.chunks {
			some = c
		}
		f.mu.Unlock()
		if some == nil {
			return
		}
		if err := f.awaitStored(b.Context(), some); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkWarmSpan128K: the hot path of reads of a partial file.
func BenchmarkWarmSpan128K(b *testing.B) {
	w := newWorld(b, openCache(b, 1<<30), Config{})
	data := content(1, 16*mib)
	obj := w.store.Put("a", data)
	r := w.open(obj, "alice")
	w.read(r, data, 0, 15*mib) // its last chunk is absent, so streams are looked for
	if err := r.Complete(b.Context()); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	b.SetBytes(128 << 10)
	off := int64(0)
	for b.Loop() {
		_, release, ok := r.Span(off, 128<<10)
		if !ok {
			b.Fatal("no span")
		}
		release()
		off = (off + 5*mib + 128<<10) % (15 * mib)
	}
	r.Close()
	w.close()
}
