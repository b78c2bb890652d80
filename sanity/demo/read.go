package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/domainsocket/shortcircuit"
	"github.com/larderfs/larder/sanity/dataset"
)

// readers is how many files are read at a time, whichever the way.
const readers = 8

// task is what a child process is to read. It comes in on standard input, because it holds
// a secret.
type task struct {
	Folder string // a way: the files are below it
	Socket string // another: the domain folder of a volume
	S3     *store // another

	Files  dataset.Files
	Verify bool          // compare the SHA-256 of each file
	Drop   bool          // drop the page cache of Folder's files first
	Touch  bool          // open each file once first, so that no name has to be looked up
	Least  time.Duration // read all again until that much time went into reading
	Random time.Duration // read 4 KiB at random places for that long, not whole files
}

type store struct {
	Endpoint, Region, Bucket, Prefix, AccessKey, SecretKey string
}

// report is what the child found, on its standard output.
type report struct {
	Files, Bytes, Ops int64
	Seconds           float64
	Direct            int64  // files that the socket gave a descriptor for
	Bad               string // the first file whose SHA-256 differs
}

// way is how files are opened; piece is how many bytes it is best asked for at a time.
type way interface {
	open(ctx context.Context, f dataset.File) (file, error)
	piece() int
	io.Closer
}

type file interface {
	io.ReaderAt
	io.Closer
}

// read is the child process.
func read(ctx context.Context, in io.Reader, out io.Writer) error {
	var t task
	if err := json.NewDecoder(in).Decode(&t); err != nil {
		return fmt.Errorf("read the task: %w", err)
	}
	w, err := t.way(ctx)
	if err != nil {
		return err
	}
	defer w.Close()
	var r report
	for r.Seconds == 0 || r.Seconds < t.Least.Seconds() {
		if err := t.prepare(ctx, w); err != nil {
			return err
		}
		start := time.Now()
		if t.Random > 0 {
			err = t.random(ctx, w, &r)
		} else {
			err = t.whole(ctx, w, &r)
		}
		if err != nil {
			return err
		}
		r.Seconds += time.Since(start).Seconds()
	}
	return json.NewEncoder(out).Encode(r)
}

func (t task) way(ctx context.Context) (way, error) {
	switch {
	case t.Folder != "":
		return folder(t.Folder), nil
	case t.Socket != "":
		at, err := shortcircuit.Find(t.Socket)
		if err != nil {
			return nil, err
		}
		c, err := shortcircuit.Dial(ctx, at)
		return worker{c}, err
	case t.S3 != nil:
		return newBucket(*t.S3), nil
	}
	return nil, errors.New("the task names no way")
}

func (t task) prepare(ctx context.Context, w way) error {
	if !t.Touch && !t.Drop {
		return nil
	}
	return t.each(ctx, func(ctx context.Context, f dataset.File, _ []byte) error {
		h, err := w.open(ctx, f)
		if err != nil {
			return err
		}
		defer h.Close()
		if o, ok := h.(*os.File); ok && t.Drop {
			return unix.Fadvise(int(o.Fd()), 0, 0, unix.FADV_DONTNEED)
		}
		return nil
	}, 0)
}

// each calls do for every file, in order of start, readers at a time, with a buffer of size
// bytes that is its own for the call.
func (t task) each(ctx context.Context, do func(context.Context, dataset.File, []byte) error, size int) error {
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range readers {
		g.Go(func() error {
			buf := make([]byte, size)
			for {
				i := int(next.Add(1)) - 1
				if i >= len(t.Files) {
					return nil
				}
				if err := do(ctx, t.Files[i], buf); err != nil {
					return fmt.Errorf("%s: %w", t.Files[i].Path, err)
				}
			}
		})
	}
	return g.Wait()
}

// whole reads every file from its start to its end, and hashes what it reads if it is to verify.
func (t task) whole(ctx context.Context, w way, r *report) error {
	var bad atomic.Pointer[string]
	var direct atomic.Int64
	err := t.each(ctx, func(ctx context.Context, f dataset.File, buf []byte) error {
		h, err := w.open(ctx, f)
		if err != nil {
			return err
		}
		defer h.Close()
		if s, ok := h.(*shortcircuit.File); ok && s.Local() {
			direct.Add(1)
		}
		sum := sha256.New()
		for off := int64(0); off < f.Size; {
			p := buf[:min(int64(len(buf)), f.Size-off)]
			n, err := h.ReadAt(p, off)
			if n < len(p) {
				return fmt.Errorf("read %d bytes at %d: got %d: %w", len(p), off, n, err)
			}
			if t.Verify {
				sum.Write(p)
			}
			off += int64(n)
		}
		if t.Verify && hex.EncodeToString(sum.Sum(nil)) != f.SHA256 {
			bad.CompareAndSwap(nil, &f.Path)
		}
		return nil
	}, w.piece())
	r.Files += int64(len(t.Files))
	r.Bytes += t.Files.Bytes()
	r.Direct += direct.Load()
	if p := bad.Load(); p != nil {
		r.Bad = *p
	}
	return err
}

// random reads 4 KiB at a time at aligned random places of files that stay open.
func (t task) random(ctx context.Context, w way, r *report) error {
	const size = 4096
	var ops atomic.Int64
	end := time.Now().Add(t.Random)
	g, ctx := errgroup.WithContext(ctx)
	for i := range readers {
		f := t.Files[i%len(t.Files)]
		g.Go(func() error {
			h, err := w.open(ctx, f)
			if err != nil {
				return err
			}
			defer h.Close()
			places := rand.New(rand.NewPCG(7, uint64(i)))
			buf := make([]byte, size)
			for time.Now().Before(end) {
				if _, err := h.ReadAt(buf, places.Int64N(f.Size/size)*size); err != nil {
					return fmt.Errorf("%s: %w", f.Path, err)
				}
				ops.Add(1)
			}
			return nil
		})
	}
	err := g.Wait()
	r.Ops += ops.Load()
	return err
}

type folder string

func (d folder) open(_ context.Context, f dataset.File) (file, error) {
	return os.Open(filepath.Join(string(d), filepath.FromSlash(f.Path)))
}
func (d folder) piece() int   { return 1 << 20 }
func (d folder) Close() error { return nil }

type worker struct{ *shortcircuit.Client }

func (s worker) open(ctx context.Context, f dataset.File) (file, error) { return s.Open(ctx, f.Path) }
func (s worker) piece() int                                             { return 1 << 20 }

// bucket reads straight from S3 by the SDK.
type bucket struct {
	client *s3.Client
	store
}

func newBucket(s store) bucket {
	return bucket{store: s, client: s3.New(s3.Options{
		BaseEndpoint: &s.Endpoint, UsePathStyle: true, Region: s.Region,
		Credentials:                credentials.NewStaticCredentialsProvider(s.AccessKey, s.SecretKey, ""),
		ResponseChecksumValidation: aws.ResponseChecksumValidationWhenRequired, // we compare sums ourselves
		HTTPClient:                 &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: readers, DisableCompression: true}},
	})}
}

func (b bucket) open(ctx context.Context, f dataset.File) (file, error) {
	return remote{ctx, b, path.Join(b.Prefix, f.Path)}, nil
}
func (b bucket) piece() int   { return 8 << 20 }
func (b bucket) Close() error { return nil }

// remote is an object; every ReadAt is a GET of that range.
type remote struct {
	ctx context.Context // of the pass
	b   bucket
	key string
}

func (r remote) ReadAt(p []byte, off int64) (int, error) {
	span := fmt.Sprintf("bytes=%d-%d", off, off+int64(len(p))-1)
	out, err := r.b.client.GetObject(r.ctx, &s3.GetObjectInput{Bucket: &r.b.Bucket, Key: &r.key, Range: &span})
	if err != nil {
		return 0, err
	}
	defer out.Body.Close()
	n, err := io.ReadFull(out.Body, p)
	if err == nil {
		_, err = io.Copy(io.Discard, out.Body) // so that the connection is used again
	}
	return n, err
}

func (remote) Close() error { return nil }
