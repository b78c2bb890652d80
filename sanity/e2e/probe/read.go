package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/domainsocket/shortcircuit"
)

// loop reads until it is told to end: whole files, blocks of files that it holds open, mapped
// blocks, and the folder. A line a second says how far it is and the longest single step.
func loop(ctx context.Context, dir string, d dataset) error {
	held := make([]*os.File, min(d.files, 4))
	for i := range held {
		f, err := os.Open(filepath.Join(dir, d.file(i)))
		if err != nil {
			return err
		}
		defer f.Close()
		held[i] = f
	}
	steps := []func() error{
		func() error { return d.verifyFile(dir, d.file(rand.IntN(d.files))) },
		func() error { i := rand.IntN(len(held)); return d.readBlock(d.file(i), held[i]) },
		func() error { i := rand.IntN(len(held)); return d.mapBlock(d.file(i), held[i]) },
		func() error { return d.verifyNames(dir) },
	}
	var longest time.Duration
	said := time.Now()
	for n := 0; ctx.Err() == nil; n++ {
		start := time.Now()
		if err := steps[n%len(steps)](); err != nil {
			return fmt.Errorf("step %d, after %v: %w", n, time.Since(start), err)
		}
		longest = max(longest, time.Since(start))
		if time.Since(said) >= time.Second {
			said = time.Now()
			fmt.Printf("step %d longest %v\n", n, longest.Round(time.Millisecond))
		}
	}
	fmt.Println("told to end; all was right")
	return nil
}

func (d dataset) anyBlock() (off, n int64) {
	off = rand.Int64N((d.size+block-1)/block) * block
	return off, min(block, d.size-off)
}

func (d dataset) readBlock(file string, f *os.File) error {
	off, n := d.anyBlock()
	b := make([]byte, n)
	if _, err := f.ReadAt(b, off); err != nil {
		return fmt.Errorf("read %s at %d: %w", file, off, err)
	}
	return d.check(file, off, b)
}

func (d dataset) mapBlock(file string, f *os.File) error {
	off, n := d.anyBlock()
	b, err := unix.Mmap(int(f.Fd()), off, int(n), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map %s: %w", file, err)
	}
	return errors.Join(d.check(file, off, b), unix.Munmap(b))
}

func socket(ctx context.Context, dir string, d dataset) error {
	path, err := shortcircuit.Find(dir)
	if err != nil {
		return err
	}
	c, err := shortcircuit.Dial(ctx, path)
	if err != nil {
		return err
	}
	defer c.Close()
	for i := range d.files {
		f, err := c.Open(ctx, d.file(i))
		if err != nil {
			return err
		}
		err = d.verifyReader(d.file(i), io.NewSectionReader(f, 0, f.Size()))
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	fmt.Println(filepath.Base(path))
	return nil
}

func connect(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	c, err := shortcircuit.Dial(ctx, path)
	if err != nil {
		return err
	}
	defer c.Close()
	s, err := c.Status(ctx)
	if err != nil {
		return err
	}
	fmt.Println(s.Worker)
	return nil
}

// write tries to change a volume, and prints what the kernel says.
func write(_ context.Context, dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	if len(entries) == 0 {
		return fmt.Errorf("%s is empty", dir)
	}
	file := filepath.Join(dir, entries[0].Name())
	type try struct {
		what string
		do   func() error
	}
	tries := []try{
		{"create", func() error { _, err := os.Create(filepath.Join(dir, "new")); return err }},
		{"remove", func() error { return os.Remove(file) }},
		{"rename", func() error { return os.Rename(file, file+"2") }},
		{"make a folder", func() error { return os.Mkdir(filepath.Join(dir, "folder"), 0o755) }},
		{"change the mode", func() error { return os.Chmod(file, 0o777) }},
	}
	if entries[0].Type().IsRegular() { // and no socket
		tries = append(tries,
			try{"open for writing", func() error { _, err := os.OpenFile(file, os.O_WRONLY, 0); return err }},
			try{"append", func() error { _, err := os.OpenFile(file, os.O_WRONLY|os.O_APPEND, 0); return err }},
			try{"truncate", func() error { return os.Truncate(file, 0) }})
	}
	for _, t := range tries {
		err := t.do()
		if !errors.Is(err, unix.EROFS) {
			return fmt.Errorf("%s gives %v, not EROFS", t.what, err)
		}
	}
	fmt.Println("EROFS every time")
	return nil
}
