package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/feature/s3/transfermanager"
	"github.com/aws/aws-sdk-go-v2/feature/s3/transfermanager/types"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"golang.org/x/sync/errgroup"
)

// client is the SDK's, as anybody would make it.
func (b *bench) client(endpoint string) *s3.Client {
	return s3.New(s3.Options{
		BaseEndpoint: &endpoint, UsePathStyle: true, Region: b.s3.Region,
		Credentials:                credentials.NewStaticCredentialsProvider(b.s3.AccessKey, b.s3.SecretKey, ""),
		ResponseChecksumValidation: aws.ResponseChecksumValidationWhenRequired, // they cover whole objects
		HTTPClient:                 &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true}},
	})
}

// nowhere takes what is downloaded only to see how fast that is.
type nowhere struct{}

func (nowhere) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

// download is the SDK's parallel one.
func download(ctx context.Context, client *s3.Client, key string, to io.WriterAt) error {
	d := transfermanager.New(client, func(o *transfermanager.Options) { o.GetObjectType = types.GetObjectRanges })
	_, err := d.DownloadObject(ctx, &transfermanager.DownloadObjectInput{Bucket: aws.String(bucket), Key: &key, WriterAt: to})
	return err
}

// downloads are several at once, each to a file of its own; it returns how long they took.
func (b *bench) downloads(ctx context.Context, client *s3.Client, keys []string) (seconds float64, err error) {
	dir, err := os.MkdirTemp(b.dir, "sdk")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	start := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for i, key := range keys {
		g.Go(func() error {
			f, err := os.Create(filepath.Join(dir, fmt.Sprint(i)))
			if err != nil {
				return err
			}
			return errors.Join(download(ctx, client, key, f), f.Close())
		})
	}
	err = g.Wait()
	return time.Since(start).Seconds(), err
}

// firstByte is how long the SDK waits for it, with a HEAD before the GET or without.
func firstByte(ctx context.Context, client *s3.Client, key string, head bool) (seconds float64, err error) {
	start := time.Now()
	if head {
		if _, err := client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: aws.String(bucket), Key: &key}); err != nil {
			return 0, err
		}
	}
	out, err := client.GetObject(ctx, &s3.GetObjectInput{Bucket: aws.String(bucket), Key: &key})
	if err != nil {
		return 0, err
	}
	defer out.Body.Close()
	_, err = io.ReadFull(out.Body, make([]byte, 1))
	return time.Since(start).Seconds(), err
}

// upload puts an object of random bytes.
func (b *bench) upload(ctx context.Context, key string, size int64) error {
	return b.uploadEnding(ctx, key, size, nil)
}

func (b *bench) uploadEnding(ctx context.Context, key string, size int64, end []byte) error {
	name := filepath.Join(b.dir, "upload")
	if err := writeRandom(name, size); err != nil {
		return err
	}
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	if _, err := f.WriteAt(end, size-int64(len(end))); err != nil {
		return errors.Join(err, f.Close())
	}
	_, err = b.s3.DirectClient().PutObject(ctx, &s3.PutObjectInput{Bucket: aws.String(bucket), Key: &key, Body: f, ContentLength: &size})
	return errors.Join(err, f.Close(), os.Remove(name))
}

func writeRandom(name string, size int64) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	_, err = io.CopyBuffer(struct{ io.Writer }{f}, io.LimitReader(rand.NewChaCha8([32]byte{}), size), make([]byte, 1<<20))
	return errors.Join(err, f.Close())
}

// link makes another object of the same bytes, as a hard link in the server's folder: to a cache it is another
// one, and the machine has its bytes only once.
func (b *bench) link(key, other string) error {
	root := filepath.Join(b.s3.Dir, bucket)
	name := filepath.Join(root, filepath.FromSlash(other))
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	return os.Link(filepath.Join(root, filepath.FromSlash(key)), name)
}
