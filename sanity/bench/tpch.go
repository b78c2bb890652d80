package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/larderfs/larder/sanity/shaper"
)

const (
	duckdb  = "duckdb==2.0.0"
	tpchgen = "tpchgen-cli==4.0.0"
)

//go:embed tpch.py
var tpchScript string

// tpch is what DuckDB's venv and the table are.
type tpch struct {
	python string
	data   string // folder of lineitem at scale 1, in 16 files
}

// makeTPCH makes it below the user's cache directory, once for these versions. It needs python3-venv.
func makeTPCH(ctx context.Context) (tpch, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return tpch{}, err
	}
	dir := filepath.Join(cache, "larder", fmt.Sprintf("tpch-%.8x", sha256.Sum256([]byte(duckdb+tpchgen))))
	t := tpch{filepath.Join(dir, "venv/bin/python"), filepath.Join(dir, "data/lineitem")}
	if _, err := os.Stat(filepath.Join(dir, "done")); err == nil {
		return t, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return tpch{}, err
	}
	fmt.Println("make a venv with DuckDB, and table lineitem")
	for _, args := range [][]string{
		{"python3", "-m", "venv", "--clear", filepath.Join(dir, "venv")},
		{filepath.Join(dir, "venv/bin/pip"), "install", "-q", duckdb, tpchgen},
		{filepath.Join(dir, "venv/bin/tpchgen-cli"), "parquet", "-s", "1", "--tables=lineitem", "--parts=16", "--output-dir=" + filepath.Join(dir, "data")},
	} {
		if out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput(); err != nil {
			return tpch{}, fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	return t, os.WriteFile(filepath.Join(dir, "done"), nil, 0o644)
}

// columns is the rows of TPC-H by DuckDB, page caches dropped before each run: in part cached, and completely.
func columns(complete string) group {
	g := group{open: func(ctx context.Context, b *bench) (*site, error) { return b.openTPCH(ctx, complete) }}
	for _, q := range []string{"q6", "q1"} {
		if complete == "never" {
			g.rows = append(g.rows, row{"tpch-" + q + "-never", inPart})
		} else {
			g.rows = append(g.rows, row{"tpch-" + q + "-complete", completed})
		}
	}
	return g
}

func (b *bench) openTPCH(ctx context.Context, complete string) (_ *site, err error) {
	if b.tpch, err = makeTPCH(ctx); err != nil {
		return nil, err
	}
	files, err := filepath.Glob(filepath.Join(b.tpch.data, "*.parquet"))
	if err != nil || len(files) == 0 {
		return nil, fmt.Errorf("no Parquet files in %s: %w", b.tpch.data, err)
	}
	for _, name := range files {
		body, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		_, err = b.s3.DirectClient().PutObject(ctx, &s3.PutObjectInput{
			Bucket: aws.String(bucket), Key: aws.String("tpch/" + filepath.Base(name)), Body: body,
		})
		if err = errors.Join(err, body.Close()); err != nil {
			return nil, err
		}
	}
	if err := errors.Join(b.s3.Age(time.Hour), b.shape(ctx)); err != nil {
		return nil, err
	}
	return b.open(ctx, volume{prefix: "tpch", endpoint: b.proxy.Endpoint, complete: complete})
}

// answer is what tpch.py prints.
type answer struct {
	Seconds float64
	Answer  string
	Bytes   int64
}

func (s *site) ask(ctx context.Context, what, row, folder string) (a answer, err error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	var out, diag bytes.Buffer
	cmd := s.stack.Command(ctx, s.tpch.python, "-c", tpchScript, what, strings.Split(row, "-")[1], folder)
	cmd.Stdout, cmd.Stderr = &out, &diag
	if err := cmd.Run(); err != nil {
		return a, fmt.Errorf("DuckDB in %s: %w: %s", folder, err, bytes.TrimSpace(diag.Bytes()))
	}
	err = json.Unmarshal(out.Bytes(), &a)
	return a, err
}

// dropped asks with cold page caches.
func (s *site) dropped(ctx context.Context, row, folder string) (answer, error) {
	if err := s.dropCaches(ctx); err != nil {
		return answer{}, err
	}
	return s.ask(ctx, "run", row, folder)
}

// inPart compares what the first run fetches with the chunks that hold the query's columns and the footers, and
// the second run with a local folder.
func inPart(ctx context.Context, s *site, name string) error {
	if err := s.renew(ctx); err != nil {
		return err
	}
	least, err := s.ask(ctx, "least", name, s.tpch.data)
	if err != nil {
		return err
	}
	s.proxy.Take()
	first, err := s.dropped(ctx, name, s.root)
	if err != nil {
		return err
	}
	gets, fetched := shaper.Count(s.proxy.Take(), shaper.Get)
	st, err := s.stack.Status(ctx)
	if err != nil {
		return err
	}
	unread := st.AheadBytes - st.AheadRead
	err = s.report(figure{
		name: name + "-fetched", unit: "MiB", of: "columns", goal: goal{most: 1},
		reference: []float64{float64(least.Bytes) / chunk}, volume: []float64{float64(fetched) / chunk},
		note: fmt.Sprintf("%d GETs, %.1f s; beyond the columns %.1f MiB that nobody asked for, %.1f MiB that the kernel asked ahead",
			gets, first.Seconds, float64(unread)/chunk, float64(fetched-least.Bytes-unread)/chunk),
	})
	if err != nil {
		return err
	}
	return s.queries(ctx, name+"-second", name, 0.6)
}

func completed(ctx context.Context, s *site, name string) error {
	if err := s.fillAll(ctx); err != nil {
		return err
	}
	if _, err := s.ask(ctx, "run", name, s.root); err != nil { // from this open on the names lead to the completed files
		return err
	}
	return s.queries(ctx, name, name, 0.9)
}

// fillAll reads all files, until the cache has them.
func (s *site) fillAll(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	files, err := filepath.Glob(filepath.Join(s.tpch.data, "*.parquet"))
	if err != nil {
		return err
	}
	for {
		if err := s.stack.Command(ctx, "sh", "-c", `cat "$0"/*.parquet >/dev/null`, s.root).Run(); err != nil {
			return err
		}
		st, err := s.stack.Status(ctx)
		if err != nil || st.Complete >= len(files) {
			return err
		}
	}
}

// queries compares seconds, as speeds.
func (s *site) queries(ctx context.Context, name, row string, least float64) error {
	f := figure{name: name, unit: "1/s", of: "native", goal: goal{least: least}, note: "page caches dropped"}
	for range min(s.runs, 3) {
		native, err := s.dropped(ctx, row, s.tpch.data)
		if err != nil {
			return err
		}
		mounted, err := s.dropped(ctx, row, s.root)
		if err != nil {
			return err
		}
		if native.Answer != mounted.Answer {
			return fmt.Errorf("DuckDB answers %s from the volume, and %s from a local folder", mounted.Answer, native.Answer)
		}
		f.reference, f.volume = append(f.reference, 1/native.Seconds), append(f.volume, 1/mounted.Seconds)
	}
	return s.report(f)
}
