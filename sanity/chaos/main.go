// Command chaos kills what serves a volume, again and again, under readers that check every
// byte, and says what they noticed.
//
// Readers are child processes: sequential and random reads, O_DIRECT, mmap, folders read with
// small and large buffers, open and close, trees walked as git walks them, one under a timer's
// signals, and some that read past the worker. Files are generated so that a wrong byte is
// known by its place. Worker and broker of a `larder up` are killed (SIGKILL, alone, twice in a
// row, while stopped, while the other is stopped, for want of memory), never both before
// the survivor has handed over. A worker's kill counts if a reader's operation that only
// the worker can answer had begun before the signal and ended after the process; a broker's if a
// passthrough handle was open, or a mount call in that state. The master is in the process of
// `larder up`, which is not killed here; -apart runs master, node service with the broker,
// worker and controller as processes of their own, and kills the master and the controller too.
//
// Nothing stays behind, also after Ctrl-C. The exit status is 1 if any reader saw an error or a
// wrong byte.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/sanity/leak"
	"github.com/larderfs/larder/sanity/result"
	"github.com/larderfs/larder/sanity/s3test"
	"github.com/larderfs/larder/sanity/stack"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "read" {
		readMain()
	}
	kills := flag.Int("kills", 100, "how many kills have to count, half of them of the worker")
	seed := flag.Uint64("seed", 0, "seed of what is killed, when and how; 0 means another one each time")
	out := flag.String("out", "build/chaos.json", "`file` that the rows are written to")
	keepLog := flag.String("log", "build/chaos.log", "`file` that larder's log is copied to")
	apart := flag.Bool("apart", false, "master, controller, node service and worker as processes of their own; master and controller are killed too")
	verbose := flag.Bool("v", false, "print each kill")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	c := config{scale: long, kills: *kills, seed: *seed, keepLog: *keepLog, apart: *apart, verbose: *verbose, say: os.Stdout}
	if c.seed == 0 {
		c.seed = rand.Uint64N(1 << 32)
	}
	res, err := run(ctx, c)
	if res != nil {
		err = errors.Join(err, res.write(*out, os.Stdout))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
		os.Exit(1)
	}
	if !res.good() {
		os.Exit(1)
	}
}

// readMain is a child process. It reads on the main thread: that is where the kernel delivers
// a timer's signal.
func readMain() {
	runtime.LockOSThread()
	if unix.Gettid() != unix.Getpid() {
		self, err := os.Executable()
		if err == nil {
			err = syscall.Exec(self, os.Args, os.Environ())
		}
		fmt.Fprintln(os.Stderr, "chaos: begin again on the main thread:", err)
		os.Exit(1)
	}
	if err := read(os.Stdin, os.Stdout, os.NewFile(3, "slot")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// config of a run.
type config struct {
	scale
	kills   int
	seed    uint64
	binary  string // larder; "" builds it
	keepLog string // "" for none
	verbose bool   // say each kill
	apart   bool   // each part as a process of its own
	say     io.Writer
	// plan kills instead of what the seed says.
	plan func(context.Context, *killer) error
}

// run makes everything, kills, and removes everything.
func run(ctx context.Context, c config) (_ *outcome, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("it mounts volumes: run it as root")
	}
	dir, err := os.MkdirTemp("", "chaos")
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return nil, err
	}
	outer := os.Getenv("TMPDIR")
	os.Setenv("TMPDIR", dir) // all there is, is below it
	defer os.Setenv("TMPDIR", outer)
	defer func() {
		err = errors.Join(err, leak.Clean(dir))
		if ctx.Err() != nil {
			err = fmt.Errorf("%w: everything was removed", context.Cause(ctx))
		}
	}()
	fmt.Fprintf(c.say, "seed %d\n", c.seed)
	r := &runner{config: c, dir: dir}
	err = r.prepare(ctx)
	if err == nil {
		err = r.chaos(ctx)
	}
	err = errors.Join(err, r.close())
	if r.killer == nil {
		return nil, err
	}
	r.progress()
	return r.outcome(), err
}

// runner is the state of a run.
type runner struct {
	config
	dir    string
	data   dataset
	s3     *s3test.Server
	node   *node
	fleet  *fleet
	killer *killer
	churn  *churn

	said       struct{ kills, errs, wrong int } // by progress
	privileges map[string]bool                  // of the workers seen
	began      time.Time
	ops        int64
	bytes      int64
	passing    int64
}

func (r *runner) prepare(ctx context.Context) (err error) {
	if r.binary == "" {
		r.binary = filepath.Join(r.dir, "larder")
		if err := stack.Build(ctx, r.binary); err != nil {
			return err
		}
	}
	r.data = r.scale.dataset()
	if r.s3, err = s3test.Run(ctx, s3test.Config{Dir: filepath.Join(r.dir, "s3")}); err != nil {
		return err
	}
	if err := r.data.upload(ctx, r.s3); err != nil {
		return err
	}
	if err := r.s3.Age(time.Hour); err != nil {
		return err
	}
	if r.apart {
		r.node, err = startApart(ctx, filepath.Join(r.dir, "apart"), r.binary, r.TierBytes)
	} else {
		r.node, err = startUp(ctx, stack.Config{Dir: filepath.Join(r.dir, "up"), Binary: r.binary}, r.TierBytes)
	}
	if err != nil {
		return err
	}
	r.fleet = &fleet{command: r.node.Command}
	r.privileges = map[string]bool{}
	return r.start(ctx)
}

// start publishes the volumes and starts the readers.
func (r *runner) start(ctx context.Context) error {
	targets := map[string]string{}
	var ids []string
	for _, v := range []struct{ folder, complete string }{{coldFolder, "never"}, {hotFolder, "always"}, {treeFolder, "auto"}} {
		p, err := r.node.Publish(ctx, r.volume(v.folder, v.folder, v.complete))
		if err != nil {
			return err
		}
		ids = append(ids, p.ID)
		targets[v.folder] = filepath.Join(p.Targets[0], "data")
		targets["socket of "+v.folder] = filepath.Join(p.Targets[0], "domain")
	}
	rng := rand.New(rand.NewPCG(r.seed, 2))
	for _, t := range []struct {
		way, folder string
		files       []file
	}{
		{"sequential", coldFolder, r.data.Cold},
		{"random", coldFolder, r.data.Cold},
		{"direct", coldFolder, r.data.Cold},
		{"mmap", coldFolder, r.data.Cold},
		{"timer", coldFolder, r.data.Cold},
		{"readdir", treeFolder, r.data.Many},
		{"open", treeFolder, r.data.Tree},
		{"tree", treeFolder, r.data.Tree},
		{"passthrough", hotFolder, r.data.Hot},
		{"holder", hotFolder, r.data.Hot},
		{"socket", "socket of " + coldFolder, r.data.Cold},
	} {
		if _, err := r.fleet.start(ctx, task{Way: t.way, Root: targets[t.folder], Files: t.files, Seed: rng.Uint64()}); err != nil {
			return err
		}
	}
	r.churn = &churn{node: r.node, fleet: r.fleet, in: r.volume("", hotFolder, "auto"), files: r.data.Hot[1:2]}
	r.killer = &killer{node: r.node, fleet: r.fleet, churn: r.churn, rng: rand.New(rand.NewPCG(r.seed, 3)), stable: ids,
		takeovers: map[string]int{}, since: map[string]int64{}}
	return eventually(ctx, "a file is read past the worker", func() bool { return r.fleet.held() > 0 })
}

func (r *runner) volume(name, folder, complete string) stack.PublishInput {
	return stack.PublishInput{
		Name: name, ReadOnly: true,
		Parameters: map[string]string{
			"source": "s3://" + r.s3.Bucket + "/" + folder, "endpoint": r.s3.DirectEndpoint, "region": r.s3.Region, "pathStyle": "true",
			"complete": complete, "freshness": "1s",
		},
		Secrets: map[string]string{"AWS_ACCESS_KEY_ID": r.s3.AccessKey, "AWS_SECRET_ACCESS_KEY": r.s3.SecretKey},
	}
}

// chaos kills until enough kills count. It is bounded: kills that do not count are so too.
func (r *runner) chaos(ctx context.Context) error {
	var err error
	if r.killer.memory, err = newMemory(); err != nil {
		fmt.Fprintln(r.say, "no OOM kills:", err)
	} else {
		defer func() {
			if err := r.killer.memory.close(context.WithoutCancel(ctx)); err != nil {
				r.fleet.fail(err.Error())
			}
		}()
	}
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute+time.Duration(r.kills)*5*time.Second, errors.New("it takes too long"))
	defer cancel()
	r.began = time.Now()
	g, ctx := errgroup.WithContext(ctx)
	calls, stopCalls := context.WithCancel(ctx)
	g.Go(func() error { return r.churn.run(calls) })
	g.Go(func() error { return r.watch(calls) })
	g.Go(func() error {
		defer stopCalls()
		if r.plan != nil {
			return r.plan(ctx, r.killer)
		}
		return r.killAll(ctx)
	})
	return g.Wait()
}

// watch ends the run when a reader hangs.
func (r *runner) watch(ctx context.Context) error {
	for pause(ctx, time.Second) {
		if err := r.fleet.hung(); err != nil {
			r.fleet.fail(err.Error())
			return errors.Join(err, r.node.Abort())
		}
	}
	return nil
}

func (r *runner) killAll(ctx context.Context) error {
	k := r.killer
	half := (r.kills + 1) / 2
	for ctx.Err() == nil {
		w, b := k.counted(workerPart), k.counted(brokerPart)
		if w >= half && b >= half {
			return nil
		}
		part := workerPart
		if w >= half || b < half && len(k.kills)%2 == 1 {
			part = brokerPart
		}
		err := k.round(ctx, part)
		if err == nil {
			err = k.others(ctx, r.apart)
		}
		if err == nil {
			err = r.lookAtWorker(ctx)
		}
		if faults := r.progress(); err == nil && faults > maxErrors {
			err = fmt.Errorf("more than %d errors", maxErrors)
		}
		if err != nil {
			return err
		}
	}
	return context.Cause(ctx)
}

const maxErrors = 100 // then there is nothing new to learn

// progress says what is new, and returns how much went wrong in all.
func (r *runner) progress() int {
	k := r.killer
	errs, wrong := r.fleet.faults()
	for _, text := range append(errs[r.said.errs:], wrong[r.said.wrong:]...) {
		fmt.Fprintln(r.say, text)
	}
	r.said.errs, r.said.wrong = len(errs), len(wrong)
	for ; r.said.kills < len(k.kills); r.said.kills++ {
		if r.verbose {
			fmt.Fprintln(r.say, k.kills[r.said.kills])
		}
		if n := r.said.kills + 1; n%50 == 0 {
			fmt.Fprintf(r.say, "%4.0f s  %d kills, %d + %d count, %d errors, %d wrong\n", time.Since(r.began).Seconds(), n,
				k.counted(workerPart), k.counted(brokerPart), len(errs), len(wrong))
		}
	}
	return len(errs) + len(wrong)
}

// lookAtWorker notes the worker's rights.
func (r *runner) lookAtWorker(ctx context.Context) error {
	p, err := r.node.find(ctx, workerPart, 0)
	if err != nil {
		return err
	}
	defer p.close()
	uid, caps, err := p.privileges()
	if err != nil {
		return err
	}
	r.privileges[fmt.Sprintf("uid %d, capabilities %#x", uid, caps)] = true
	if uid == 0 || caps != 0 {
		return fmt.Errorf("the worker has uid %d and capabilities %#x", uid, caps)
	}
	return nil
}

// close takes everything down. It may be called at any point.
func (r *runner) close() error {
	var errs []error
	if r.fleet != nil {
		err := r.fleet.close(15 * time.Second)
		if err != nil {
			errs = append(errs, err, r.node.Abort(), r.fleet.close(10*time.Second))
		}
		for _, m := range r.fleet.all() {
			r.ops += m.slot.Ops.Load()
			r.bytes += m.slot.Bytes.Load()
			r.passing += m.slot.Passing.Load()
			if m.slot.Ops.Load() == 0 {
				r.fleet.fail(fmt.Sprintf("reader %s read nothing", m.name))
			}
		}
	}
	if r.node != nil {
		if r.keepLog != "" {
			errs = append(errs, copyFile(r.keepLog, r.node.Log()))
		}
		errs = append(errs, r.node.Close())
	}
	if r.s3 != nil {
		errs = append(errs, r.s3.Close())
	}
	return errors.Join(errs...)
}

func copyFile(to, from string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o644)
}

// outcome is what a run found.
type outcome struct {
	seed               uint64
	took               time.Duration
	kills              []*kill
	stops, oom, others int
	errs, wrong        []string
	privileges         []string
	ops                int64
	bytes              int64
	passing            int64
	rounds             int
	again              int
}

func (r *runner) outcome() *outcome {
	o := &outcome{seed: r.seed, took: time.Since(r.began), kills: r.killer.kills, stops: r.killer.stops, oom: r.killer.starved, others: r.killer.beside,
		ops: r.ops, bytes: r.bytes, passing: r.passing, rounds: r.churn.rounds, again: r.churn.again}
	o.errs, o.wrong = r.fleet.faults()
	for p := range r.privileges {
		o.privileges = append(o.privileges, p)
	}
	return o
}

func (o *outcome) good() bool { return len(o.errs) == 0 && len(o.wrong) == 0 }

// of are the kills of a part; "" is all of them.
func (o *outcome) of(part string) (all, counted int, gaps []time.Duration) {
	for _, k := range o.kills {
		if part != "" && k.Target != part {
			continue
		}
		all++
		if k.Counted {
			counted++
			gaps = append(gaps, k.Gap)
		}
	}
	slices.Sort(gaps)
	return all, counted, gaps
}

func (o *outcome) rows() (result.Rows, error) {
	var rows result.Rows
	var errs []error
	add := func(name, unit string, value float64) { errs = append(errs, rows.Add(name, unit, name, value)) }
	for _, part := range []string{workerPart, brokerPart, ""} {
		all, counted, gaps := o.of(part)
		if part == "" {
			part = "all"
		}
		add("kills/"+part, "", float64(all))
		add("counted/"+part, "", float64(counted))
		for _, q := range []struct {
			name string
			q    float64
		}{{"p50", .5}, {"p99", .99}, {"max", 1}} {
			add("gap-"+q.name+"/"+part, "ms", float64(quantile(gaps, q.q).Microseconds())/1000)
		}
	}
	add("oom/all", "", float64(o.oom))
	add("others/all", "", float64(o.others))
	add("stops/all", "", float64(o.stops))
	add("errors/all", "", float64(len(o.errs)))
	add("wrong/all", "", float64(len(o.wrong)))
	add("operations/all", "", float64(o.ops))
	add("read/all", "MiB", float64(o.bytes>>20))
	return rows, errors.Join(errs...)
}

// write writes the rows and says what happened; the last line is the summary.
func (o *outcome) write(file string, w io.Writer) error {
	rows, err := o.rows()
	if err != nil {
		return err
	}
	if err := rows.Write(file); err != nil {
		return err
	}
	slow := slices.SortedFunc(slices.Values(o.kills), func(a, b *kill) int { return int(b.Gap - a.Gap) })
	for _, k := range slow[:min(5, len(slow))] {
		fmt.Fprintln(w, k)
	}
	fmt.Fprintln(w)
	err = rows.Table(w, []result.Axis{{Key: workerPart, Title: "worker"}, {Key: brokerPart, Title: "broker"}, {Key: "all", Title: "both"}},
		[]result.Axis{{Key: "kills", Title: "kills"}, {Key: "counted", Title: "counted"}, {Key: "gap-p50", Title: "longest gap p50"},
			{Key: "gap-p99", Title: "p99"}, {Key: "gap-max", Title: "max"}})
	if err != nil {
		return err
	}
	fmt.Fprintf(w, `
%d OOM kills; besides %d stops, %d kills of master and controller; %d operations, %d MiB right, %d MiB of it read past the worker; %d volumes made and
removed meanwhile, %d calls repeated; worker: %s. Rows: %s
`, o.oom, o.stops, o.others, o.ops, o.bytes>>20, o.passing>>20, o.rounds, o.again, strings.Join(o.privileges, "; "), file)
	fmt.Fprintln(w, o.summary())
	return nil
}

func (o *outcome) summary() string {
	all, counted, gaps := o.of("")
	_, workers, _ := o.of(workerPart)
	ms := func(q float64) string { return fmt.Sprintf("%.0f ms", float64(quantile(gaps, q).Microseconds())/1000) }
	return fmt.Sprintf("chaos: %d kills, %d count (%d worker, %d broker), %d errors, %d wrong bytes, longest gap per kill p50 %s, p99 %s, max %s (seed %d, %.0f s)",
		all, counted, workers, counted-workers, len(o.errs), len(o.wrong), ms(.5), ms(.99), ms(1), o.seed, o.took.Seconds())
}
