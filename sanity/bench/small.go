package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	smallFiles = 10_000
	smallBytes = 4096
)

// small is the rows of many small files, each opened, read and closed.
func small() group {
	return group{
		open: func(ctx context.Context, b *bench) (*site, error) {
			if err := b.plantSmall(ctx); err != nil {
				return nil, err
			}
			return b.open(ctx, volume{prefix: "small"})
		},
		rows: []row{
			{"small-4KiB-cold", func(ctx context.Context, s *site, name string) error {
				return s.each(ctx, name, 1, goal{}, s.dropCaches, nil)
			}},
			{"small-4KiB-dropped", func(ctx context.Context, s *site, name string) error {
				return s.each(ctx, name, min(s.runs, 3), goal{least: 0.5}, s.dropCaches, s.readSmall)
			}},
			{"small-4KiB-hot", func(ctx context.Context, s *site, name string) error {
				return s.each(ctx, name, s.runs, goal{}, nil, s.readSmall)
			}},
		},
	}
}

func smallName(i int) string { return fmt.Sprintf("d%02d/f%05d", i%100, i) }

// plantSmall makes the files twice: in a local folder, and as objects. Those are links, because from the cache
// each is read as its own file anyway.
func (b *bench) plantSmall(ctx context.Context) error {
	if err := b.upload(ctx, "seed/small", smallBytes); err != nil {
		return err
	}
	for i := range smallFiles {
		if err := b.link("seed/small", "small/"+smallName(i)); err != nil {
			return err
		}
		name := filepath.Join(b.dir, "small", smallName(i))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := writeRandom(name, smallBytes); err != nil {
			return err
		}
	}
	return nil
}

// dropCaches has the kernel forget pages and names, which it does only with what is on the disk.
func (s *site) dropCaches(context.Context) error {
	unix.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

func (s *site) smallTask(root string) task {
	t := task{Do: "each"}
	for i := range smallFiles {
		t.Files = append(t.Files, filepath.Join(root, smallName(i)))
	}
	return t
}

// readSmall has everything cached that can be.
func (s *site) readSmall(ctx context.Context) error {
	for range 2 {
		for _, root := range []string{filepath.Join(s.dir, "small"), s.root} {
			if _, err := s.child(ctx, s.smallTask(root)); err != nil {
				return err
			}
		}
	}
	return nil
}

// each compares files a second. first is done once, before before each side of each run.
func (s *site) each(ctx context.Context, name string, runs int, g goal, before, first func(context.Context) error) error {
	f := figure{name: name, unit: "files/s", of: "native", goal: g}
	if first != nil {
		if err := first(ctx); err != nil {
			return err
		}
	}
	for range runs {
		for _, side := range []struct {
			root string
			to   *[]float64
		}{{filepath.Join(s.dir, "small"), &f.reference}, {s.root, &f.volume}} {
			if before != nil {
				if err := before(ctx); err != nil {
					return err
				}
			}
			r, err := s.child(ctx, s.smallTask(side.root))
			if err != nil {
				return err
			}
			if r.Bytes != smallFiles*smallBytes {
				return fmt.Errorf("%d bytes were read", r.Bytes)
			}
			*side.to = append(*side.to, smallFiles/r.Seconds)
		}
	}
	return s.report(f)
}
