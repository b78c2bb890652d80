package shaper

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/larderfs/larder/sanity/leak"
	"github.com/larderfs/larder/sanity/s3test"
)

func TestMain(m *testing.M) { os.Exit(leak.Run(m)) }

func listen(t *testing.T, endpoint string) *Proxy {
	t.Helper()
	p, err := Listen(endpoint)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

func TestSDKReadsThroughItAndIsCounted(t *testing.T) {
	srv := s3test.Start(t)
	p := listen(t, srv.DirectEndpoint)
	p.Shape(Limits{FirstByte: time.Millisecond, ConnectionRate: 1 << 30, LinkRate: 1 << 30})
	key, data := "a b/c+ü", random(3<<20)
	if _, err := srv.Put(key, data); err != nil {
		t.Fatal(err)
	}
	client := s3.New(s3.Options{
		BaseEndpoint: &p.Endpoint, UsePathStyle: true, Region: srv.Region,
		Credentials: credentials.NewStaticCredentialsProvider(srv.AccessKey, srv.SecretKey, ""),
	})
	if _, err := client.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: &srv.Bucket, Key: &key}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.ListObjectsV2(t.Context(), &s3.ListObjectsV2Input{Bucket: &srv.Bucket, Prefix: aws.String("a b/")}); err != nil {
		t.Fatal(err)
	}
	out, err := client.GetObject(t.Context(), &s3.GetObjectInput{Bucket: &srv.Bucket, Key: &key, Range: aws.String("bytes=5-2000004")})
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(out.Body)
	if err != nil || !bytes.Equal(got, data[5:2000005]) {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
	out.Body.Close()
	rs := p.Take()
	for kind, want := range map[Kind]int{List: 1, Head: 1, Get: 1, Other: 0} {
		if n, _ := Count(rs, kind); n != want {
			t.Errorf("%d of %s, want %d: %+v", n, kind, want, rs)
		}
	}
	last := rs[len(rs)-1]
	if last.Key != key || last.Range != "bytes=5-2000004" || last.Bytes != 2000000 {
		t.Errorf("logged %+v", last)
	}
	if rs := p.Take(); len(rs) != 0 {
		t.Errorf("taken twice: %+v", rs)
	}
	if _, err := client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: &srv.Bucket, Key: &key, Body: bytes.NewReader(data)}); err == nil {
		t.Error("a PUT passed")
	}
}

// TestNothingPassesBeforeItsTime can be asked on a slow machine too: it bounds from below only.
func TestNothingPassesBeforeItsTime(t *testing.T) {
	data := random(4 << 20)
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/b/pieces" {
			w.Write(data[:10])
			w.(http.Flusher).Flush() // no Content-Length
			w.Write(data[10:])
			return
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(data)))
		w.Write(data)
	}))
	defer up.Close()
	p := listen(t, up.URL)
	const first, rate = 20 * time.Millisecond, 40 << 20
	transfer := time.Duration(float64(len(data))/rate*float64(time.Second)) - 2*late
	for _, c := range []struct {
		name    string
		limits  Limits
		readers int
		least   time.Duration
	}{
		{"first byte", Limits{FirstByte: first}, 1, first},
		{"connection", Limits{ConnectionRate: rate}, 2, transfer},
		{"link", Limits{LinkRate: rate}, 2, 2 * transfer},
	} {
		p.Shape(c.limits)
		for _, path := range []string{"/b/whole", "/b/pieces"} {
			start := time.Now()
			var wg sync.WaitGroup
			for range c.readers {
				wg.Go(func() {
					resp, err := http.Get(p.Endpoint + path)
					if err != nil {
						t.Error(err)
						return
					}
					defer resp.Body.Close()
					if got, err := io.ReadAll(resp.Body); err != nil || !bytes.Equal(got, data) {
						t.Errorf("%s of %s: %d bytes, %v", c.name, path, len(got), err)
					}
				})
			}
			wg.Wait()
			if took := time.Since(start); took < c.least {
				t.Errorf("%s of %s: %v, want at least %v", c.name, path, took, c.least)
			}
		}
	}
	http.DefaultClient.CloseIdleConnections()
}

func TestClockAddsUpAndForgivesLittle(t *testing.T) {
	var c clock
	now := time.Unix(100, 0)
	if at := c.reserve(now, 1000, 0); at != now {
		t.Errorf("without a limit: %v", at.Sub(now))
	}
	if at := c.reserve(now, 1000, 1000); at != now.Add(time.Second-late) {
		t.Errorf("first second: %v", at.Sub(now))
	}
	if at := c.reserve(now, 1000, 1000); at != now.Add(2*time.Second-late) {
		t.Errorf("two seconds: %v", at.Sub(now))
	}
	now = now.Add(time.Hour) // what was not used is lost
	if at := c.reserve(now, 1000, 1000); at != now.Add(time.Second-late) {
		t.Errorf("after an hour: %v", at.Sub(now))
	}
}
