package s3

import (
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	awss3 "github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/larderfs/larder/sanity/s3test"
)

// BenchmarkGet asks what a source adds to plain HTTP: ranged GETs of one object, one after
// the other, past the counting proxy.
func BenchmarkGet(b *testing.B) {
	srv := s3test.Start(b)
	const size = 64 << 20
	if _, err := srv.Put("a", random(size)); err != nil {
		b.Fatal(err)
	}
	if err := srv.Age(time.Hour); err != nil {
		b.Fatal(err)
	}
	src, err := New(Config{
		Bucket: srv.Bucket, Endpoint: srv.DirectEndpoint, Region: srv.Region, PathStyle: true, NodeKey: []byte("n"),
		Credentials: Credentials{AccessKeyID: srv.AccessKey, SecretAccessKey: srv.SecretKey},
	})
	if err != nil {
		b.Fatal(err)
	}
	obj, err := src.Head(b.Context(), "a")
	if err != nil {
		b.Fatal(err)
	}
	key := "a"
	signed, err := awss3.NewPresignClient(srv.DirectClient()).PresignGetObject(b.Context(), &awss3.GetObjectInput{Bucket: &srv.Bucket, Key: &key})
	if err != nil {
		b.Fatal(err)
	}
	plain := &http.Client{Transport: &http.Transport{DisableCompression: true}}
	for _, n := range []int64{1 << 20, 8 << 20, size} {
		buf := make([]byte, n)
		b.Run(fmt.Sprintf("Source%dMiB", n>>20), func(b *testing.B) {
			b.SetBytes(n)
			for b.Loop() {
				r, err := src.Get(b.Context(), obj, 0, n)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(r, buf); err != nil {
					b.Fatal(err)
				}
				r.Close()
			}
		})
		b.Run(fmt.Sprintf("PlainHTTP%dMiB", n>>20), func(b *testing.B) {
			b.SetBytes(n)
			for b.Loop() {
				req, _ := http.NewRequestWithContext(b.Context(), http.MethodGet, signed.URL, nil)
				req.Header.Set("Range", fmt.Sprintf("bytes=0-%d", n-1))
				resp, err := plain.Do(req)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(resp.Body, buf); err != nil || resp.StatusCode != http.StatusPartialContent {
					b.Fatal(resp.Status, err)
				}
				resp.Body.Close()
			}
		})
	}
}
