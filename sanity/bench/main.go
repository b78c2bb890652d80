// Command bench measures how near a volume comes to what limits it: a local file, the SDK, the
// link to the store, or the least number of requests.
//
// A row is one figure beside the limit that it is compared with. Both are measured in turns
// in the same run, so that a machine that slows down slows both. What a row says about the
// worker (nothing reached it, nothing was fetched twice) is checked in every run of it, and fails the row.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"github.com/larderfs/larder/sanity/dataset"
	"github.com/larderfs/larder/sanity/leak"
	"github.com/larderfs/larder/sanity/result"
	"github.com/larderfs/larder/sanity/s3test"
	"github.com/larderfs/larder/sanity/shaper"
	"github.com/larderfs/larder/sanity/stack"
)

func main() {
	out := flag.String("out", "build/bench.json", "`file` that the rows are written to")
	only := flag.String("run", "", "`regexp` of the rows to measure")
	runs := flag.Int("runs", 5, "how often each side of a row is measured; the median counts")
	runtime := flag.Duration("runtime", 3*time.Second, "length of one run of fio, in whole seconds")
	child := flag.Bool("read", false, "be the child process that reads what standard input says")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	err := errors.New("there are arguments too many")
	switch {
	case flag.NArg() > 0:
	case *child:
		err = read(os.Stdin, os.Stdout)
	default:
		err = run(ctx, *out, *only, *runs, *runtime)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// group is rows that share a volume.
type group struct {
	open func(context.Context, *bench) (*site, error)
	rows []row
}

// row is one line, or a few whose names begin alike.
type row struct {
	name    string
	measure func(context.Context, *site, string) error
}

func groups() []group {
	return []group{warm(), unpassed(), shaped(), unshaped(), thrift(), listed(100, 1000), listed(1, 100_000), small(), memory(),
		columns("never"), columns("always")}
}

func choose(all []group, only string) ([]group, error) {
	match, err := regexp.Compile(only)
	if err != nil {
		return nil, err
	}
	var chosen []group
	for _, g := range all {
		some := group{open: g.open}
		for _, r := range g.rows {
			if match.MatchString(r.name) {
				some.rows = append(some.rows, r)
			}
		}
		if len(some.rows) > 0 {
			chosen = append(chosen, some)
		}
	}
	if len(chosen) == 0 {
		return nil, fmt.Errorf("no row matches %q", only)
	}
	return chosen, nil
}

func run(ctx context.Context, out, only string, runs int, runtime time.Duration) error {
	chosen, err := choose(groups(), only)
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

// bench is what all groups share.
type bench struct {
	dir     string
	runs    int
	runtime time.Duration
	binary  string // larder
	s3      *s3test.Server
	proxy   *shaper.Proxy
	rows    result.Rows

	sites    int           // started so far
	warmed   dataset.Files // of the warm rows, uploaded
	uploaded bool          // the objects of the cold rows
	linkRate float64       // of the shaped rows, bytes a second
	tpch     tpch
}

const bucket = "larder-bench"

func (b *bench) measure(ctx context.Context, chosen []group) error {
	err := b.prepare(ctx)
	for _, g := range chosen {
		if err == nil {
			err = b.group(ctx, g)
		}
	}
	return errors.Join(err, b.close())
}

func (b *bench) prepare(ctx context.Context) (err error) {
	b.binary = filepath.Join(b.dir, "bin", "larder")
	if err := stack.Build(ctx, b.binary); err != nil {
		return err
	}
	if b.s3, err = s3test.Run(ctx, s3test.Config{Dir: filepath.Join(b.dir, "s3"), Bucket: bucket}); err != nil {
		return err
	}
	b.proxy, err = shaper.Listen(b.s3.DirectEndpoint)
	return err
}

func (b *bench) close() error {
	var errs []error
	if b.proxy != nil {
		errs = append(errs, b.proxy.Close())
	}
	if b.s3 != nil {
		errs = append(errs, b.s3.Close())
	}
	return errors.Join(errs...)
}

// group measures its rows on a new volume.
func (b *bench) group(ctx context.Context, g group) error {
	s, err := g.open(ctx, b)
	if err != nil {
		return err
	}
	for _, r := range g.rows {
		if err == nil {
			if err = r.measure(ctx, s, r.name); err != nil {
				err = fmt.Errorf("%s: %w", r.name, err)
			}
		}
	}
	if err != nil && ctx.Err() == nil && s.stack != nil {
		fmt.Fprintf(os.Stderr, "the end of larder's log:\n%s\n", s.stack.Tail())
	}
	return errors.Join(err, s.close())
}
