package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
)

// dataset is files whose bytes follow from its name and theirs, so that a reader knows what to expect
// without being told.
type dataset struct {
	name  string
	files int
	size  int64
}

const block = 1 << 20

func (d dataset) file(i int) string { return fmt.Sprintf("part-%04d.bin", i) }

// fill writes the bytes of block n of a file into b.
func (d dataset) fill(file string, n int64, b []byte) {
	rand.NewChaCha8(sha256.Sum256(fmt.Appendf(nil, "%s/%s/%d", d.name, file, n))).Read(b)
}

// check compares b with the bytes of file from off on; both are multiples of the block size, except at the end.
func (d dataset) check(file string, off int64, b []byte) error {
	want := make([]byte, block)
	for i := 0; i < len(b); i += block {
		w := want[:min(block, len(b)-i)]
		d.fill(file, (off+int64(i))/block, w)
		if !bytes.Equal(w, b[i:i+len(w)]) {
			return fmt.Errorf("%s: wrong bytes in the MiB at %d", file, off+int64(i))
		}
	}
	return nil
}

func (d dataset) verifyReader(file string, r io.Reader) error {
	b := make([]byte, block)
	for off := int64(0); ; {
		n, err := io.ReadFull(r, b)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			if off+int64(n) != d.size {
				return fmt.Errorf("%s ends at %d, not at %d", file, off+int64(n), d.size)
			}
			return d.check(file, off, b[:n])
		}
		if err != nil {
			return fmt.Errorf("read %s at %d: %w", file, off, err)
		}
		if err := d.check(file, off, b); err != nil {
			return err
		}
		off += int64(n)
	}
}

func (d dataset) verifyFile(dir, file string) error {
	f, err := os.Open(filepath.Join(dir, file))
	if err != nil {
		return err
	}
	defer f.Close()
	return d.verifyReader(file, f)
}

func (d dataset) verifyNames(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var got, want []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	for i := range d.files {
		want = append(want, d.file(i))
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		return fmt.Errorf("%s holds %d files %.200q, not the %d of %s", dir, len(got), got, d.files, d.name)
	}
	return nil
}

func verify(_ context.Context, dir string, d dataset) error {
	if err := d.verifyNames(dir); err != nil {
		return err
	}
	for i := range d.files {
		if err := d.verifyFile(dir, d.file(i)); err != nil {
			return err
		}
	}
	fmt.Printf("right: %d files of %d bytes\n", d.files, d.size)
	return nil
}

// open gives a client of the store and makes the bucket where it is missing.
func open(ctx context.Context, endpoint, bucket string) (*s3.Client, error) {
	id, key := os.Getenv("AWS_ACCESS_KEY_ID"), os.Getenv("AWS_SECRET_ACCESS_KEY")
	client := s3.New(s3.Options{
		BaseEndpoint: &endpoint, UsePathStyle: true, Region: "us-east-1",
		Credentials: credentials.NewStaticCredentialsProvider(id, key, ""),
	})
	if _, err := client.HeadBucket(ctx, &s3.HeadBucketInput{Bucket: &bucket}); err == nil {
		return client, nil
	}
	var made *types.BucketAlreadyOwnedByYou // by another test meanwhile
	if _, err := client.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: &bucket}); err != nil && !errors.As(err, &made) {
		return nil, fmt.Errorf("create bucket %s: %w", bucket, err)
	}
	return client, nil
}

func put(ctx context.Context, endpoint, bucket string, d dataset) error {
	client, err := open(ctx, endpoint, bucket)
	if err != nil {
		return err
	}
	for i := range d.files {
		b := make([]byte, d.size)
		for off := int64(0); off < d.size; off += block {
			d.fill(d.file(i), off/block, b[off:min(off+block, d.size)])
		}
		name := d.name + "/" + d.file(i)
		if _, err := client.PutObject(ctx, &s3.PutObjectInput{Bucket: &bucket, Key: &name, Body: bytes.NewReader(b), ContentLength: aws.Int64(d.size)}); err != nil {
			return fmt.Errorf("put %s: %w", name, err)
		}
	}
	fmt.Printf("put %d files of %d bytes\n", d.files, d.size)
	return nil
}

// upload puts what comes on the standard input.
func upload(ctx context.Context, endpoint, bucket, key string) error {
	client, err := open(ctx, endpoint, bucket)
	if err != nil {
		return err
	}
	b, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	_, err = client.PutObject(ctx, &s3.PutObjectInput{Bucket: &bucket, Key: &key, Body: bytes.NewReader(b), ContentLength: aws.Int64(int64(len(b)))})
	return err
}
