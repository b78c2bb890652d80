// Command demo shows what Larder does, on one machine, with nothing but Go and root: it puts
// a dataset of real files into a real S3 server, provisions a volume for it by the CSI calls
// of a kubelet, reads everything by five ways, and prints one table, whose rows it also
// writes as JSON.
//
// The ways read with equal parallelism and each in child processes, so that a mount that
// hangs stops a child and not the demo. All bytes of all ways are compared by SHA-256 with
// what was generated. Nothing stays behind, also after Ctrl-C: everything is below one
// directory, whose mounts, processes and files go at the end.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/sanity/dataset"
	"github.com/larderfs/larder/sanity/leak"
	"github.com/larderfs/larder/sanity/result"
	"github.com/larderfs/larder/sanity/s3test"
	"github.com/larderfs/larder/sanity/stack"
)

func main() {
	out := flag.String("out", "build/demo.json", "`file` that the rows are written to")
	salesMiB := flag.Int64("sales", 1024, "size of the sales table in `MiB`")
	rounds := flag.Int("rounds", 3, "how often the warm ways are timed; the median counts")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	var err error
	if flag.Arg(0) == "read" {
		err = read(ctx, os.Stdin, os.Stdout)
	} else {
		err = run(ctx, *out, *salesMiB<<20, *rounds)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out string, salesBytes int64, rounds int) error {
	if os.Geteuid() != 0 {
		return errors.New("it mounts a volume: run it as root")
	}
	dir, err := workDir(4 * (salesBytes + maxGoBytes))
	if err != nil {
		return err
	}
	err = runIn(ctx, dir, out, salesBytes, rounds)
	fmt.Println("cleaning up")
	if cerr := leak.Clean(dir); cerr != nil {
		return errors.Join(err, cerr)
	}
	if ctx.Err() != nil {
		return errors.New("interrupted; everything was removed") // what else failed, failed for that
	}
	return err
}

func runIn(ctx context.Context, dir, out string, salesBytes int64, rounds int) error {
	d := &demo{dir: dir}
	err := d.prepare(ctx, salesBytes)
	if err == nil {
		err = d.measure(ctx, rounds)
	}
	if err != nil && ctx.Err() == nil && d.stack != nil {
		fmt.Fprintf(os.Stderr, "the end of larder's log:\n%s\n", d.stack.Tail())
	}
	if err = errors.Join(err, d.close()); err != nil {
		return err
	}
	if err := d.rows.Write(out); err != nil {
		return err
	}
	return d.print(out)
}

// workDir makes the directory that all is below, also what others make in TMPDIR.
func workDir(needBytes int64) (string, error) {
	dir, err := os.MkdirTemp("", "larder-demo")
	if err != nil {
		return "", err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "", errors.Join(err, os.Remove(dir))
	}
	if free := int64(st.Bavail) * st.Bsize; free < needBytes {
		err := fmt.Errorf("%s has %d MiB free, the demo needs %d; set TMPDIR to another place", filepath.Dir(dir), free>>20, needBytes>>20)
		return "", errors.Join(err, os.Remove(dir))
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return "", err
	}
	return dir, os.Setenv("TMPDIR", dir)
}

// demo is the state of a run.
type demo struct {
	dir    string
	s3     *s3test.Server
	stack  *stack.Stack
	volume *stack.Volume
	sales  dataset.Files
	golang dataset.Files
	rows   result.Rows
	direct int64 // files that the domain socket gave a descriptor for
}

const prefix = "datasets/shop"

// prepare does all that comes before the first read.
func (d *demo) prepare(ctx context.Context, salesBytes int64) error {
	steps := []struct {
		what string
		do   func(context.Context) error
	}{
		{"start an S3 server (the first time on a machine it is built)", d.startS3},
		{"build larder", func(ctx context.Context) error { return stack.Build(ctx, d.binary()) }},
		{"generate a retail sales table", func(ctx context.Context) error { return d.generate(ctx, salesBytes) }},
		{"copy the Go distribution", d.copyGo},
		{"upload both to S3", d.upload},
		{"start larder up", d.startLarder},
		{"CreateVolume, NodeStageVolume, NodePublishVolume", d.publish},
	}
	for _, s := range steps {
		if err := step(s.what, func() error { return s.do(ctx) }); err != nil {
			return err
		}
	}
	return nil
}

// step prints what is done, and how long it took.
func step(what string, do func() error) error {
	fmt.Printf("%-62s", what)
	start := time.Now()
	if err := do(); err != nil {
		fmt.Println()
		return fmt.Errorf("%s: %w", what, err)
	}
	fmt.Printf("%6.1f s\n", time.Since(start).Seconds())
	return nil
}

func (d *demo) binary() string { return filepath.Join(d.dir, "larder") }
func (d *demo) native() string { return filepath.Join(d.dir, "native") }

func (d *demo) startS3(ctx context.Context) (err error) {
	d.s3, err = s3test.Run(ctx, s3test.Config{Dir: filepath.Join(d.dir, "s3"), Bucket: "larder-demo"})
	return err
}

func (d *demo) generate(ctx context.Context, bytes int64) (err error) {
	d.sales, err = dataset.WriteSales(ctx, d.native(), 8, bytes)
	return err
}

func (d *demo) upload(ctx context.Context) error {
	files := append(append(dataset.Files{}, d.sales...), d.golang...)
	return dataset.Upload(ctx, d.s3.DirectClient(), d.s3.Bucket, prefix, d.native(), files)
}

func (d *demo) startLarder(ctx context.Context) (err error) {
	d.stack, err = stack.Start(ctx, stack.Config{Dir: filepath.Join(d.dir, "up"), Binary: d.binary()})
	return err
}

func (d *demo) publish(ctx context.Context) (err error) {
	d.volume, err = d.stack.Publish(ctx, stack.PublishInput{
		Name: "shop",
		Parameters: map[string]string{
			"source":    "s3://" + d.s3.Bucket + "/" + prefix,
			"endpoint":  d.s3.DirectEndpoint,
			"region":    d.s3.Region,
			"pathStyle": "true",
		},
		Secrets: map[string]string{
			"AWS_ACCESS_KEY_ID":     d.s3.AccessKey,
			"AWS_SECRET_ACCESS_KEY": d.s3.SecretKey,
		},
		ReadOnly: true,
	})
	return err
}

// close takes everything down in the order of Kubernetes. It may be called at any point.
func (d *demo) close() error {
	var errs []error
	if d.volume != nil {
		errs = append(errs, step("NodeUnpublishVolume, NodeUnstageVolume, DeleteVolume", func() error {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			return d.stack.Unpublish(ctx, d.volume)
		}))
	}
	if d.stack != nil {
		errs = append(errs, step("stop larder up", d.stack.Close))
	}
	if d.s3 != nil {
		errs = append(errs, d.s3.Close())
	}
	return errors.Join(errs...)
}

// maxGoBytes is up to which size the Go distribution is taken whole.
const maxGoBytes = 500 << 20

// copyGo copies the Go distribution below GOROOT: all of it, or, where it is larger than
// maxGoBytes, without its binaries (bin and pkg).
func (d *demo) copyGo(ctx context.Context) error {
	root, err := goroot(ctx)
	if err != nil {
		return err
	}
	bytes, err := dataset.TreeBytes(root)
	if err != nil {
		return err
	}
	binaries := func(rel string) bool { return strings.HasPrefix(rel, "bin/") || strings.HasPrefix(rel, "pkg/") }
	skip := func(string) bool { return false }
	if bytes > maxGoBytes {
		skip = binaries
	}
	d.golang, err = dataset.CopyTree(ctx, d.native(), "go", root, skip)
	return err
}
