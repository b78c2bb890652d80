package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/larderfs/larder/sanity/dataset"
	"github.com/larderfs/larder/sanity/result"
)

// The ways to read, in the names of the rows ("set/way").
const (
	native = "native"
	sdk    = "s3-sdk"
	cold   = "cold"
	warm   = "warm"
	domain = "socket"
)

// set is a part of the dataset and how its speed is told.
type set struct {
	key, unit string
	files     dataset.Files
	random    time.Duration // read at random places for that long; 0 means whole files
	speed     func(report) float64
}

func (d *demo) sets() []set {
	return []set{
		{"sales", "MiB/s", d.sales, 0, func(r report) float64 { return float64(r.Bytes) / (1 << 20) / r.Seconds }},
		{"go", "files/s", d.golang, 0, func(r report) float64 { return float64(r.Files) / r.Seconds }},
		{"random", "IOPS", d.sales, time.Second, func(r report) float64 { return float64(r.Ops) / r.Seconds }},
	}
}

// task is how a way reads.
func (d *demo) task(way string) task {
	target := d.volume.Targets[0]
	switch way {
	case native:
		return task{Folder: d.native(), Touch: true}
	case sdk:
		return task{S3: &store{
			Endpoint: d.s3.DirectEndpoint, Region: d.s3.Region, Bucket: d.s3.Bucket, Prefix: prefix,
			AccessKey: d.s3.AccessKey, SecretKey: d.s3.SecretKey,
		}}
	case domain:
		return task{Socket: filepath.Join(target, "domain")}
	case warm: // from the cache file, not from pages that the mount still has
		return task{Folder: filepath.Join(target, "data"), Touch: true, Drop: true}
	}
	return task{Folder: filepath.Join(target, "data")}
}

// child reads in a process of its own.
func (d *demo) child(ctx context.Context, t task) (report, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	self, err := os.Executable()
	if err != nil {
		return report{}, err
	}
	in, err := json.Marshal(t)
	if err != nil {
		return report{}, err
	}
	var out, diag bytes.Buffer
	cmd := d.stack.Command(ctx, self, "read")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &out, &diag
	if err := cmd.Run(); err != nil {
		return report{}, fmt.Errorf("%w: %s", err, bytes.TrimSpace(diag.Bytes()))
	}
	var r report
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		return report{}, err
	}
	if r.Bad != "" {
		return report{}, fmt.Errorf("%s: SHA-256 differs from what was generated", r.Bad)
	}
	return r, nil
}

// meter collects what was measured, by row.
type meter struct {
	*demo
	values map[string][]float64
}

func (m *meter) note(row string, value float64) { m.values[row] = append(m.values[row], value) }

// measure reads everything by all ways and fills the rows.
func (d *demo) measure(ctx context.Context, rounds int) error {
	m := &meter{demo: d, values: map[string][]float64{}}
	sets := d.sets()
	steps := []struct {
		what string
		do   func() error
	}{
		{"read and check all by the SDK, straight from S3", func() error { return m.verified(ctx, sdk) }},
		{"read and check all from the cold volume", func() error { return m.verified(ctx, cold) }},
		{"check native file, warm volume and domain socket", func() error { return m.settle(ctx) }},
		{"read at random places by the SDK", func() error { return m.timed(ctx, sdk, sets[2]) }},
	}
	for _, s := range steps {
		if err := step(s.what, s.do); err != nil {
			return err
		}
	}
	for i := range rounds {
		what := fmt.Sprintf("time native file, warm volume and domain socket (%d of %d)", i+1, rounds)
		if err := step(what, func() error { return m.round(ctx, sets) }); err != nil {
			return err
		}
	}
	return m.fill()
}

// verified is the one pass of a way that is read, timed and checked at once.
func (m *meter) verified(ctx context.Context, way string) error {
	before, err := m.stack.Status(ctx)
	if err != nil {
		return err
	}
	for _, s := range m.sets()[:2] {
		r, err := m.check(ctx, way, s)
		if err != nil {
			return err
		}
		m.note(s.key+"/"+way, s.speed(r))
	}
	after, err := m.stack.Status(ctx)
	if err == nil && way == cold {
		m.note("reads/"+way, float64(after.ReadRequests-before.ReadRequests))
	}
	return err
}

func (m *meter) check(ctx context.Context, way string, s set) (report, error) {
	t := m.task(way)
	t.Files, t.Verify = s.files, true
	r, err := m.child(ctx, t)
	if err != nil {
		return report{}, fmt.Errorf("%s by %s: %w", s.key, way, err)
	}
	return r, nil
}

// settle checks all bytes of the ways that are timed later. The volume is read until the
// kernel reads all of it without the worker, five times at most.
func (m *meter) settle(ctx context.Context) error {
	pass := func(way string) error {
		m.direct = 0
		for _, s := range m.sets()[:2] {
			r, err := m.check(ctx, way, s)
			if err != nil {
				return err
			}
			m.direct += r.Direct
		}
		return nil
	}
	for range 5 {
		before, err := m.stack.Status(ctx)
		if err != nil {
			return err
		}
		if err := pass(warm); err != nil {
			return err
		}
		if after, err := m.stack.Status(ctx); err != nil || after.ReadRequests == before.ReadRequests {
			break
		}
	}
	if err := pass(native); err != nil {
		return err
	}
	return pass(domain)
}

// round times the ways that do not need the store, one after the other for each set.
func (m *meter) round(ctx context.Context, sets []set) error {
	var reads int64
	for _, s := range sets {
		if err := m.timed(ctx, native, s); err != nil {
			return err
		}
		before, err := m.stack.Status(ctx)
		if err != nil {
			return err
		}
		if err := m.timed(ctx, warm, s); err != nil {
			return err
		}
		after, err := m.stack.Status(ctx)
		if err != nil {
			return err
		}
		reads += after.ReadRequests - before.ReadRequests
		if err := m.timed(ctx, domain, s); err != nil {
			return err
		}
	}
	m.note("reads/"+warm, float64(reads))
	return nil
}

// timed reads a set and does nothing with the bytes.
func (m *meter) timed(ctx context.Context, way string, s set) error {
	t := m.task(way)
	t.Files, t.Random, t.Least = s.files, s.random, time.Second
	r, err := m.child(ctx, t)
	if err != nil {
		return fmt.Errorf("%s by %s: %w", s.key, way, err)
	}
	m.note(s.key+"/"+way, s.speed(r))
	return nil
}

// fill makes rows of what was measured. The reference is the native file, but the cold
// volume's is what it competes with: the store itself.
func (m *meter) fill() error {
	for _, s := range m.sets() {
		for _, way := range []string{native, sdk, cold, warm, domain} {
			row, reference := s.key+"/"+way, s.key+"/"+native
			if way == cold {
				reference = s.key + "/" + sdk
			}
			if len(m.values[row]) == 0 {
				continue // cold, at random places: a file is cold once
			}
			if err := m.rows.Add(row, s.unit, reference, m.values[row]...); err != nil {
				return err
			}
		}
	}
	for _, way := range []string{cold, warm} {
		row := "reads/" + way
		if err := m.rows.Add(row, "READs", row, m.values[row]...); err != nil {
			return err
		}
	}
	return nil
}

// print shows the rows as one table.
func (d *demo) print(out string) error {
	sales := fmt.Sprintf("sales table (%d files, %d MiB)", len(d.sales), d.sales.Bytes()>>20)
	golang := fmt.Sprintf("Go distribution (%d files, %d MiB)", len(d.golang), d.golang.Bytes()>>20)
	fmt.Printf("\n%d readers; %s; %s; random: 4 KiB of the sales table\n\n", readers, sales, golang)
	err := d.rows.Table(os.Stdout,
		[]result.Axis{
			{Key: sdk, Title: "S3 by the SDK ¹"},
			{Key: cold, Title: "volume, cold ¹"},
			{Key: warm, Title: "volume, warm"},
			{Key: domain, Title: "domain socket"},
			{Key: native, Title: "native file"},
		},
		[]result.Axis{
			{Key: "sales", Title: "sales table"},
			{Key: "go", Title: "Go distribution"},
			{Key: "random", Title: "random 4 KiB"},
			{Key: "reads", Title: "FUSE READs at the worker"},
		})
	fmt.Printf(`
×  is the share of the native file's speed, and for the cold volume that of the SDK's.
¹  read and hashed in one pass, for a file is cold only once, and the SDK likewise; the others are
   medians of passes that only read, and were hashed in passes of their own. All SHA-256 are right.
   Page cache: the native file's is warm, the volume's was dropped before each pass.
   The domain socket gave descriptors for %d of the %d files.
The same rows are in %s.
`, d.direct, len(d.sales)+len(d.golang), out)
	return err
}

func goroot(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return "", fmt.Errorf("go env GOROOT: %w", err)
	}
	return filepath.EvalSymlinks(strings.TrimSpace(string(out)))
}
