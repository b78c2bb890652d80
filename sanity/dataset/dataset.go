// Package dataset makes folders of real files and knows the SHA-256 of each: a retail sales
// table, generated (the same bytes on every machine), and the Go distribution.
//
// The sums are taken from the bytes as they are written, before any store or cache has seen
// them. Hence whoever reads the right bytes back, however they came, can prove it.
package dataset

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/aws/aws-sdk-go-v2/service/s3"
	"golang.org/x/sync/errgroup"
)

// File is one file of a dataset.
type File struct {
	Path   string `json:"path"` // relative to the dataset, with slashes
	Size   int64  `json:"size"` // bytes
	SHA256 string `json:"sha256"`
}

// Files is a dataset, or a part of one.
type Files []File

// Bytes is the size of all files.
func (fs Files) Bytes() (n int64) {
	for _, f := range fs {
		n += f.Size
	}
	return n
}

// WriteSales writes a sales table of at least total bytes into the folder "sales" of dir, one
// file for each of the quarters.
func WriteSales(ctx context.Context, dir string, quarters int, total int64) (Files, error) {
	files := make(Files, quarters)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for q := range quarters {
		files[q].Path = path.Join("sales", quarterName(q))
		g.Go(func() error {
			return files[q].write(dir, func(w io.Writer) error {
				// Aligned writes: the page cache keeps what odd ones leave in small folios, and
				// the file would be read back slower than it could be.
				aligned := bufio.NewWriterSize(w, 1<<20)
				err := writeQuarter(ctx, aligned, q, (total+int64(quarters)-1)/int64(quarters))
				return errors.Join(err, aligned.Flush())
			})
		})
	}
	return files, g.Wait()
}

// CopyTree copies the regular files below from into the folder name of dir. It follows
// symbolic links to folders at the top of the tree, as distributions of Go have them, and
// leaves out all others. skip says which paths, relative to from, are left out as well.
func CopyTree(ctx context.Context, dir, name, from string, skip func(rel string) bool) (Files, error) {
	files, err := tree(from, skip)
	if err != nil {
		return nil, err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(2 * runtime.GOMAXPROCS(0))
	for i := range files {
		rel := files[i].Path
		files[i].Path = path.Join(name, rel)
		g.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			src, err := os.Open(filepath.Join(from, filepath.FromSlash(rel)))
			if err != nil {
				return err
			}
			defer src.Close()
			return files[i].write(dir, func(w io.Writer) error {
				_, err := io.Copy(w, src)
				return err
			})
		})
	}
	return files, g.Wait()
}

// TreeBytes is the size of what CopyTree would copy.
func TreeBytes(from string) (n int64, err error) {
	files, err := tree(from, func(string) bool { return false })
	for _, f := range files {
		n += f.Size
	}
	return n, err
}

// tree lists the regular files below root; paths are relative to it.
func tree(root string, skip func(rel string) bool) (Files, error) {
	top, err := os.ReadDir(root)
	if err != nil {
		return nil, err
	}
	var files Files
	for _, e := range top {
		at := filepath.Join(root, e.Name())
		if info, err := os.Stat(at); err == nil && info.IsDir() {
			if at, err = filepath.EvalSymlinks(at); err != nil {
				return nil, err
			}
		}
		err := filepath.WalkDir(at, func(p string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			rel := e.Name() + filepath.ToSlash(strings.TrimPrefix(p, at))
			if skip(rel) {
				return nil
			}
			info, err := d.Info()
			if err == nil {
				files = append(files, File{Path: rel, Size: info.Size()})
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return files, nil
}

// write makes the file below dir with what fill writes, and notes its size and sum.
func (f *File) write(dir string, fill func(io.Writer) error) (err error) {
	name := filepath.Join(dir, filepath.FromSlash(f.Path))
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	out, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	sum := sha256.New()
	err = fill(io.MultiWriter(out, sum))
	if size, serr := out.Seek(0, io.SeekCurrent); serr == nil {
		f.Size = size
	}
	f.SHA256 = hex.EncodeToString(sum.Sum(nil))
	if cerr := out.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// Upload puts the files, which lie in dir, into the bucket below prefix.
func Upload(ctx context.Context, to *s3.Client, bucket, prefix, dir string, files Files) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for _, f := range files {
		g.Go(func() error {
			body, err := os.Open(filepath.Join(dir, filepath.FromSlash(f.Path)))
			if err != nil {
				return err
			}
			defer body.Close()
			key := path.Join(prefix, f.Path)
			_, err = to.PutObject(ctx, &s3.PutObjectInput{Bucket: &bucket, Key: &key, Body: body, ContentLength: &f.Size})
			if err != nil {
				return fmt.Errorf("put %s: %w", key, err)
			}
			return nil
		})
	}
	return g.Wait()
}
