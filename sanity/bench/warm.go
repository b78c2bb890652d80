package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/larderfs/larder/sanity/dataset"
)

// job is how fio reads a file that is completely cached, beside the same file in a local
// folder. The native file's pages are in the page cache.
type job struct {
	rw, bs  string
	threads int
	unit    string
	pages   bool // the volume's own pages are there; else they are dropped before each run, and what is read comes from the cache file
	through bool // READs may reach the worker: without passthrough
	goal    goal
}

// warm is the rows in passthrough. A run in which a READ reached the worker did not measure
// that, and fails the row.
func warm() group {
	return group{
		open: func(ctx context.Context, b *bench) (*site, error) { return b.cached(ctx) },
		rows: []row{
			{"warm-seq-1MiB-1job", job{rw: "read", bs: "1m", threads: 1, unit: "MiB/s", goal: goal{least: 0.90}}.measure},
			{"warm-seq-1MiB-4jobs", job{rw: "read", bs: "1m", threads: 4, unit: "MiB/s", goal: goal{least: 0.90}}.measure},
			{"warm-rand-4KiB-1job", job{rw: "randread", bs: "4k", threads: 1, unit: "IOPS", goal: goal{least: 0.80}}.measure},
			{"warm-rand-4KiB-4jobs", job{rw: "randread", bs: "4k", threads: 4, unit: "IOPS", goal: goal{least: 0.80}}.measure},
		},
	}
}

// unpassed is the rows without passthrough: the mount's own page cache does the work, or the
// worker answers every READ.
func unpassed() group {
	g := group{open: func(ctx context.Context, b *bench) (*site, error) { return b.cached(ctx, "--no-passthrough") }}
	for _, threads := range []int{1, 4} {
		jobs := fmt.Sprintf("%djob", threads) + strings.Repeat("s", min(1, threads-1))
		g.rows = append(g.rows,
			row{"warm-plain-pages-seq-1MiB-" + jobs, job{rw: "read", bs: "1m", threads: threads, unit: "MiB/s", pages: true, through: true, goal: goal{least: 0.90}}.measure},
			row{"warm-plain-pages-rand-4KiB-" + jobs, job{rw: "randread", bs: "4k", threads: threads, unit: "IOPS", pages: true, through: true, goal: goal{least: 0.90}}.measure},
			row{"warm-plain-seq-1MiB-" + jobs, job{rw: "read", bs: "1m", threads: threads, unit: "MiB/s", through: true, goal: goal{least: 0.25}}.measure},
			row{"warm-plain-rand-4KiB-" + jobs, job{rw: "randread", bs: "4k", threads: threads, unit: "IOPS", through: true}.measure},
		)
	}
	return g
}

// cached makes a file, uploads it, publishes a volume with it and reads it until it is
// completely cached.
func (b *bench) cached(ctx context.Context, args ...string) (*site, error) {
	size, err := fileBytes()
	if err != nil {
		return nil, err
	}
	native := filepath.Join(b.dir, "warm")
	if b.warmed == nil {
		if b.warmed, err = dataset.WriteSales(ctx, native, 1, size); err != nil {
			return nil, err
		}
		if err := dataset.Upload(ctx, b.s3.DirectClient(), bucket, "warm", native, b.warmed); err != nil {
			return nil, err
		}
	}
	s, err := b.open(ctx, volume{prefix: "warm", args: args})
	if err != nil {
		return nil, err
	}
	s.native = filepath.Join(native, b.warmed[0].Path)
	s.mounted = filepath.Join(s.root, b.warmed[0].Path)
	if err := s.warm(ctx, len(args) == 0); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// fileBytes is 2 GiB, or 1 GiB where the page cache could not hold the file thrice (native,
// cache file, the store's own).
func fileBytes() (int64, error) {
	info, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(info), "MemAvailable:")
	kib, err := strconv.ParseInt(strings.Fields(rest + " 0")[0], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("/proc/meminfo: %w", err)
	}
	if kib < 8<<20 {
		return 1 << 30, nil
	}
	return 2 << 30, nil
}

// warm reads the whole file until the cache has all of it, and, in passthrough, the kernel
// reads it without the worker.
func (s *site) warm(ctx context.Context, passthrough bool) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	for {
		before, err := s.stack.Status(ctx)
		if err != nil {
			return err
		}
		if err := s.stack.Command(ctx, "cat", s.mounted, s.native).Run(); err != nil {
			return fmt.Errorf("read the file: %w", err)
		}
		after, err := s.stack.Status(ctx)
		if err != nil {
			return err
		}
		done := after.ReadRequests == before.ReadRequests
		if !passthrough {
			done = after.CachedBytes >= s.warmed.Bytes()
		}
		if done {
			return nil
		}
	}
}

// measure reads on both sides in turns.
func (j job) measure(ctx context.Context, s *site, name string) error {
	f := figure{name: name, unit: j.unit, of: "native", goal: j.goal, note: "no READ at the worker"}
	if j.through {
		f.note = ""
	}
	for range s.runs {
		native, err := s.fio(ctx, j, s.native, false)
		if err != nil {
			return err
		}
		if j.pages { // the native file's may have pushed them out
			if err := s.stack.Command(ctx, "cat", s.mounted).Run(); err != nil {
				return err
			}
		}
		before, err := s.stack.Status(ctx)
		if err != nil {
			return err
		}
		mounted, err := s.fio(ctx, j, s.mounted, !j.pages)
		if err != nil {
			return err
		}
		after, err := s.stack.Status(ctx)
		if err != nil {
			return err
		}
		if reads := after.ReadRequests - before.ReadRequests; reads != 0 && !j.through {
			return fmt.Errorf("%d READs reached the worker; the volume was to be read without it", reads)
		}
		f.reference, f.volume = append(f.reference, native), append(f.volume, mounted)
	}
	return s.report(f)
}

// fio reads file once and returns the speed in the job's unit. invalidate drops the file's
// pages first, which on a volume are the mount's and not the cache file's.
func (s *site) fio(ctx context.Context, j job, file string, invalidate bool) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, s.runtime+time.Minute)
	defer cancel()
	drop := 0
	if invalidate {
		drop = 1
	}
	var out, diag bytes.Buffer
	cmd := s.stack.Command(ctx, "fio", "--name=bench", "--filename="+file, "--rw="+j.rw, "--bs="+j.bs,
		fmt.Sprintf("--numjobs=%d", j.threads), "--thread", "--group_reporting", "--ioengine=psync",
		"--readonly", "--norandommap", "--time_based", fmt.Sprintf("--runtime=%d", int(s.runtime.Seconds())),
		fmt.Sprintf("--invalidate=%d", drop), "--output-format=json")
	cmd.Stdout, cmd.Stderr = &out, &diag
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("fio on %s: %w: %s", file, err, bytes.TrimSpace(diag.Bytes()))
	}
	return j.speed(&out)
}

// speed takes the job's number out of what fio printed.
func (j job) speed(fio io.Reader) (float64, error) {
	var said struct {
		Jobs []struct {
			Error int
			Read  struct {
				IOPS float64 `json:"iops"`
				BW   float64 `json:"bw_bytes"` // a second
			}
		}
	}
	if err := json.NewDecoder(fio).Decode(&said); err != nil {
		return 0, fmt.Errorf("fio's output: %w", err)
	}
	if len(said.Jobs) != 1 || said.Jobs[0].Error != 0 || said.Jobs[0].Read.IOPS == 0 {
		return 0, fmt.Errorf("fio's output: %+v", said)
	}
	if j.unit == "IOPS" {
		return said.Jobs[0].Read.IOPS, nil
	}
	return said.Jobs[0].Read.BW / (1 << 20), nil
}
