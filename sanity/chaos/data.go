package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"path"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/larderfs/larder/sanity/s3test"
)

// file is one that the generator wrote. Its bytes follow from its path and their offset, so
// that whoever reads a piece of it knows whether it is right, and from where it is if not.
type file struct {
	Path string `json:"path"` // relative to the volume
	Size int64  `json:"size"`
}

// word is the eight bytes at offset 8*i of the file.
func word(seed, i uint64) uint64 {
	x := (seed ^ i) * 0x9e3779b97f4a7c15
	return x ^ x>>29
}

func (f file) seed() uint64 {
	h := fnv.New64a()
	h.Write([]byte(f.Path))
	return h.Sum64()
}

// fill writes what the file holds at off, a multiple of eight.
func (f file) fill(b []byte, off int64) {
	seed, i := f.seed(), uint64(off)/8
	for ; len(b) >= 8; b, i = b[8:], i+1 {
		binary.LittleEndian.PutUint64(b, word(seed, i))
	}
	var tail [8]byte
	binary.LittleEndian.PutUint64(tail[:], word(seed, i))
	copy(b, tail[:])
}

// check returns the offset of the first wrong byte of b, which was read at off, a multiple of
// eight; -1 if there is none.
func (f file) check(b []byte, off int64) int64 {
	seed, i := f.seed(), uint64(off)/8
	n := len(b) &^ 7
	for at := 0; at < n; at, i = at+8, i+1 {
		if binary.LittleEndian.Uint64(b[at:]) != word(seed, i) {
			return f.wrong(b[at:at+8], off+int64(at))
		}
	}
	if n < len(b) {
		return f.wrong(b[n:], off+int64(n))
	}
	return -1
}

// wrong is check for at most eight bytes.
func (f file) wrong(b []byte, off int64) int64 {
	var want [8]byte
	f.fill(want[:], off)
	for i := range b {
		if b[i] != want[i] {
			return off + int64(i)
		}
	}
	return -1
}

// dataset is what the volumes show.
type dataset struct {
	Cold []file // together much more than the tier: fetched, evicted and fetched again
	Hot  []file // fits: complete, and read past the worker
	Tree []file // many small ones in many folders
	Many []file // one folder with many entries
}

// Folders of the bucket, one volume each.
const (
	coldFolder = "cold"
	hotFolder  = "hot"
	treeFolder = "tree"
)

// scale is how much of it there is.
type scale struct {
	ColdFiles, HotFiles, Folders, FilesPerFolder, Many int
	ColdSize, HotSize                                  int64
	TierBytes                                          int64
}

var (
	long = scale{
		ColdFiles: 24, ColdSize: 16<<20 + 5, HotFiles: 6, HotSize: 8<<20 + 3, Folders: 40, FilesPerFolder: 12, Many: 120,
		TierBytes: 160 << 20,
	}
	short = scale{
		ColdFiles: 10, ColdSize: 8<<20 + 5, HotFiles: 4, HotSize: 4<<20 + 3, Folders: 12, FilesPerFolder: 6, Many: 100,
		TierBytes: 56 << 20,
	}
)

func (s scale) dataset() dataset {
	var d dataset
	for i := range s.ColdFiles {
		d.Cold = append(d.Cold, file{fmt.Sprintf("part-%05d.bin", i), s.ColdSize + int64(i)*4099})
	}
	for i := range s.HotFiles {
		d.Hot = append(d.Hot, file{fmt.Sprintf("warm-%d.bin", i), s.HotSize + int64(i)*257})
	}
	for i := range s.Folders {
		folder := fmt.Sprintf("a%d/b%02d", i%5, i)
		for j := range s.FilesPerFolder {
			d.Tree = append(d.Tree, file{fmt.Sprintf("%s/file-%d.txt", folder, j), int64(17 + (i*s.FilesPerFolder+j)*5003%40_000)})
		}
	}
	for i := range s.Many {
		// Names of all lengths: the entries of a small buffer are not all of one size.
		d.Many = append(d.Many, file{fmt.Sprintf("many/%05d%.*s", i, i*31%200, padding), 8})
	}
	return d
}

var padding = string(slices.Repeat([]byte{'x'}, 200))

// upload writes all files into the bucket.
func (d dataset) upload(ctx context.Context, to *s3test.Server) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for _, part := range []struct {
		folder string
		files  []file
	}{{coldFolder, d.Cold}, {hotFolder, d.Hot}, {treeFolder, d.Tree}, {treeFolder, d.Many}} {
		for _, f := range part.files {
			g.Go(func() error {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				b := make([]byte, f.Size)
				f.fill(b, 0)
				_, err := to.Put(path.Join(part.folder, f.Path), b)
				return err
			})
		}
	}
	return g.Wait()
}
