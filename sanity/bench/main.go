// Command bench measures with fio how fast a volume reads a file that is completely cached,
// beside the same file in a local folder.
//
// Native and volume take turns, so that a machine that slows down slows both. The native
// file's pages are in the page cache. The volume's own pages are dropped before each run: what
// it reads comes from the cache file, whose pages stay, too. A run in which a READ reached
// the worker did not measure that, and fails the row.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/larderfs/larder/sanity/dataset"
	"github.com/larderfs/larder/sanity/leak"
	"github.com/larderfs/larder/sanity/result"
	"github.com/larderfs/larder/sanity/s3test"
	"github.com/larderfs/larder/sanity/stack"
)

func main() {
	out := flag.String("out", "build/bench.json", "`file` that the rows are written to")
	only := flag.String("run", "", "`regexp` of the rows to measure")
	runs := flag.Int("runs", 7, "how often each side of a row is measured; the median counts")
	runtime := flag.Duration("runtime", 3*time.Second, "length of one run, in whole seconds")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := run(ctx, *out, *only, *runs, *runtime); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// job is one row: how fio reads.
type job struct {
	name    string
	rw, bs  string
	threads int
	unit    string
	floor   float64 // the least share of native that counts as good
}

var jobs = []job{
	{"warm-seq-1MiB-1job", "read", "1m", 1, "MiB/s", 0.90},
	{"warm-seq-1MiB-4jobs", "read", "1m", 4, "MiB/s", 0.90},
	{"warm-rand-4KiB-1job", "randread", "4k", 1, "IOPS", 0.80},
	{"warm-rand-4KiB-4jobs", "randread", "4k", 4, "IOPS", 0.80},
}

func run(ctx context.Context, out, only string, runs int, runtime time.Duration) error {
	chosen, err := choose(only)
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("it mounts a volume: run it as root")
	}
	dir, err := os.MkdirTemp("", "larder-bench")
	if err != nil {
		return err
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return err
	}
	os.Setenv("TMPDIR", dir)
	b := &bench{dir: dir, runs: runs, runtime: runtime}
	err = b.measure(ctx, chosen)
	if cerr := leak.Clean(dir); cerr != nil {
		return errors.Join(err, cerr)
	}
	if ctx.Err() != nil {
		return errors.New("interrupted; everything was removed")
	}
	if err != nil {
		return err
	}
	return b.rows.Write(out)
}

func (b *bench) measure(ctx context.Context, chosen []job) error {
	err := b.prepare(ctx)
	for _, j := range chosen {
		if err == nil {
			err = b.row(ctx, j)
		}
	}
	if err != nil && ctx.Err() == nil && b.stack != nil {
		fmt.Fprintf(os.Stderr, "the end of larder's log:\n%s\n", b.stack.Tail())
	}
	return errors.Join(err, b.close())
}

func choose(only string) ([]job, error) {
	match, err := regexp.Compile(only)
	if err != nil {
		return nil, err
	}
	var chosen []job
	for _, j := range jobs {
		if match.MatchString(j.name) {
			chosen = append(chosen, j)
		}
	}
	if len(chosen) == 0 {
		return nil, fmt.Errorf("no row matches %q", only)
	}
	return chosen, nil
}

type bench struct {
	dir     string
	runs    int
	runtime time.Duration
	s3      *s3test.Server
	stack   *stack.Stack
	native  string // the two files
	mounted string
	rows    result.Rows
}

const bucket, prefix = "larder-bench", "bench"

// prepare makes the file, uploads it, publishes a volume with it and reads it until it is
// completely cached.
func (b *bench) prepare(ctx context.Context) error {
	size, err := fileBytes()
	if err != nil {
		return err
	}
	fmt.Printf("prepare a file of %d MiB, an S3 server and a volume\n", size>>20)
	files, err := dataset.WriteSales(ctx, b.dir, 1, size)
	if err != nil {
		return err
	}
	if b.s3, err = s3test.Run(ctx, s3test.Config{Dir: filepath.Join(b.dir, "s3"), Bucket: bucket}); err != nil {
		return err
	}
	if err := dataset.Upload(ctx, b.s3.DirectClient(), bucket, prefix, b.dir, files); err != nil {
		return err
	}
	if b.stack, err = stack.Start(ctx, stack.Config{Dir: filepath.Join(b.dir, "up")}); err != nil {
		return err
	}
	v, err := b.stack.Publish(ctx, stack.PublishInput{
		Name: "bench",
		Parameters: map[string]string{
			"source": "s3://" + bucket + "/" + prefix, "endpoint": b.s3.DirectEndpoint,
			"region": b.s3.Region, "pathStyle": "true", "layout": "data",
			"freshness": "1h", // nobody else writes there
		},
		Secrets:  map[string]string{"AWS_ACCESS_KEY_ID": b.s3.AccessKey, "AWS_SECRET_ACCESS_KEY": b.s3.SecretKey},
		ReadOnly: true,
	})
	if err != nil {
		return err
	}
	b.native = filepath.Join(b.dir, files[0].Path)
	b.mounted = filepath.Join(v.Targets[0], files[0].Path)
	return b.warm(ctx)
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

// warm reads the whole file until the kernel does so without the worker.
func (b *bench) warm(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	for {
		before, err := b.stack.Status(ctx)
		if err != nil {
			return err
		}
		if err := b.stack.Command(ctx, "cat", b.mounted, b.native).Run(); err != nil {
			return fmt.Errorf("read the file: %w", err)
		}
		after, err := b.stack.Status(ctx)
		if err != nil {
			return err
		}
		if after.ReadRequests == before.ReadRequests {
			return nil
		}
	}
}

func (b *bench) close() error {
	var errs []error
	if b.stack != nil {
		errs = append(errs, b.stack.Close())
	}
	if b.s3 != nil {
		errs = append(errs, b.s3.Close())
	}
	return errors.Join(errs...)
}

// row measures a job on both sides in turns and prints what came out.
func (b *bench) row(ctx context.Context, j job) error {
	var native, mounted []float64
	for range b.runs {
		n, err := b.fio(ctx, j, b.native, false)
		if err != nil {
			return err
		}
		before, err := b.stack.Status(ctx)
		if err != nil {
			return err
		}
		m, err := b.fio(ctx, j, b.mounted, true)
		if err != nil {
			return err
		}
		after, err := b.stack.Status(ctx)
		if err != nil {
			return err
		}
		if reads := after.ReadRequests - before.ReadRequests; reads != 0 {
			return fmt.Errorf("%s: %d READs reached the worker; the volume was to be read without it", j.name, reads)
		}
		native, mounted = append(native, n), append(mounted, m)
	}
	if err := b.rows.Add(j.name+"/native", j.unit, j.name+"/native", native...); err != nil {
		return err
	}
	if err := b.rows.Add(j.name+"/volume", j.unit, j.name+"/native", mounted...); err != nil {
		return err
	}
	return b.print(j)
}

func (b *bench) print(j job) error {
	native, _ := b.rows.Find(j.name + "/native")
	volume, _ := b.rows.Find(j.name + "/volume")
	verdict := "reached"
	if volume.Ratio < j.floor {
		verdict = "missed"
	}
	fmt.Printf("%-21s native %7.0f (%.0f–%.0f)  volume %7.0f (%.0f–%.0f) %s  %.2f×, goal %.2f %s; no READ at the worker\n",
		j.name, native.Value, native.Spread[0], native.Spread[1],
		volume.Value, volume.Spread[0], volume.Spread[1], j.unit, volume.Ratio, j.floor, verdict)
	return nil
}

// fio reads file once and returns the speed in the job's unit. invalidate drops the file's
// pages first, which on a volume are the mount's and not the cache file's.
func (b *bench) fio(ctx context.Context, j job, file string, invalidate bool) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, b.runtime+time.Minute)
	defer cancel()
	drop := 0
	if invalidate {
		drop = 1
	}
	var out, diag bytes.Buffer
	cmd := b.stack.Command(ctx, "fio", "--name="+j.name, "--filename="+file, "--rw="+j.rw, "--bs="+j.bs,
		fmt.Sprintf("--numjobs=%d", j.threads), "--thread", "--group_reporting", "--ioengine=psync",
		"--readonly", "--norandommap", "--time_based", fmt.Sprintf("--runtime=%d", int(b.runtime.Seconds())),
		fmt.Sprintf("--invalidate=%d", drop), "--output-format=json")
	cmd.Stdout, cmd.Stderr = &out, &diag
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("fio %s on %s: %w: %s", j.name, file, err, bytes.TrimSpace(diag.Bytes()))
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
