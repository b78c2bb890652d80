package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"github.com/larderfs/larder/cacheworker"
	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/telemetry"
	"github.com/larderfs/larder/driver"
	"github.com/larderfs/larder/driver/broker"
	"github.com/larderfs/larder/master"
	"github.com/larderfs/larder/master/client"
)

// up is all of Larder on one machine: master and CSI services in this process, broker and worker
// as its children, which are restarted when they die.
type up struct {
	dir       string
	tier      tierFlag
	fileRoot  string
	endpoints []string
	nodeName  string
	workerUID int64 // -1: see prepare
	minFree   size
	memory    size
	deadline  time.Duration
	features  cacheworker.Features
	listens   listens

	driverCredentials, stsEndpoints []string

	log     *slog.Logger
	tracer  *telemetry.Tracer
	hurried context.Context // done after a second signal
	upgrade chan os.Signal  // tells to replace the worker
	held    *os.File        // the lock; the children inherit it
}

func upCommand() *cobra.Command {
	u := &up{}
	return service("up", "Run everything on this machine",
		`Master, CSI services, broker and worker on one machine, over unix sockets below --dir:

  DIR/csi.sock   CSI identity, controller and node service
  DIR/cache      the cache (--tier)

It needs root, Linux, and nothing else. SIGTERM stops in order and leaves no mount; a second one hurries.
SIGHUP replaces the worker by one from the binary that is on disk now; readers do not notice.`,
		func(f *pflag.FlagSet) {
			f.StringVar(&u.dir, "dir", "/var/lib/larder", "`directory` of everything")
			f.Var(&u.tier, "tier", "cache directory, its capacity, and its kind, MEM, SSD or HDD (repeated; default DIR/cache:10GiB; SSD unless it says)")
			f.Var(&u.minFree, "min-free", "bytes of each tier's file system that stay free")
			f.Var(&u.memory, "memory", "bytes that the worker may use (default nine tenths of its cgroup's limit)")
			f.StringVar(&u.nodeName, "node-name", hostname(), "`name` of this node")
			f.StringVar(&u.listens.metrics, "metrics-listen", "", "`address` of this process's /metrics, beside DIR/run/*-metrics.sock")
			f.StringVar(&u.listens.profiles, "pprof", "", "loopback `address` of this process's /debug/pprof/; worker and broker have theirs at DIR/run/*-pprof.sock then; empty for none")
			u.listens.traceFlags(f)
			f.Int64Var(&u.workerUID, "worker-uid", -1, "user `id` that the worker runs as, without capabilities; it owns the tiers (default the owner of --file-root, else 65534)")
			sourceFlags(f, &u.fileRoot, &u.endpoints)
			tenantFlags(f, &u.driverCredentials, &u.stsEndpoints)
			f.DurationVar(&u.deadline, "takeover-deadline", 10*time.Minute, "how long readers wait for a worker before their mount is given up")
			featureFlags(f, &u.features)
		},
		func(ctx context.Context, log *slog.Logger) error {
			u.log, u.hurried, u.upgrade = log, hurry(ctx), make(chan os.Signal, 1)
			signal.Notify(u.upgrade, syscall.SIGHUP)
			defer signal.Stop(u.upgrade)
			return u.run(ctx)
		})
}

func (u *up) run(ctx context.Context) (err error) {
	if err := u.prepare(); err != nil {
		return err
	}
	if u.tracer, err = u.listens.tracer(ctx, "up", u.nodeName, u.log); err != nil {
		return err
	}
	defer closing(u.tracer, u.log)
	u.held, err = u.lock(ctx)
	if err != nil {
		return err
	}
	defer u.held.Close()
	if err := u.clean(); err != nil { // of an earlier one that was killed
		return err
	}
	defer func() { err = errors.Join(err, u.clean()) }()

	// Each stage is stopped before the one above it: the services that make mounts, the broker that
	// removes them, the worker that serves them meanwhile, the master.
	bg := context.WithoutCancel(ctx)
	masterStage, stopMaster := stage(bg, u.runMaster)
	workerStage, stopWorker := stage(bg, u.runWorker)
	brokerStage, stopBroker := stage(bg, u.runBroker)
	csiStage, stopCSI := stage(bg, u.runCSI)
	select {
	case <-ctx.Done():
		u.log.Info("stopping")
	case err = <-masterStage:
	case err = <-workerStage:
	case err = <-brokerStage:
	case err = <-csiStage:
	}
	stopped := make(chan error, 1)
	go func() { stopped <- errors.Join(stopCSI(), stopBroker(), stopWorker(), stopMaster()) }()
	select {
	case serr := <-stopped:
		return errors.Join(err, serr)
	case <-u.hurried.Done(): // the children are being killed; what is left goes with this process
		return errors.Join(err, errHurry)
	}
}

// stage runs one part until stop is called, which returns its error once.
func stage(ctx context.Context, run func(context.Context) error) (ended <-chan error, stop func() error) {
	ctx, cancel := context.WithCancel(ctx)
	ch, done := make(chan error, 1), make(chan struct{})
	go func() {
		defer close(done)
		ch <- run(ctx)
	}()
	return ch, func() error {
		cancel()
		<-done
		select {
		case err := <-ch:
			return err
		default:
			return nil
		}
	}
}

func (u *up) runDir() string { return filepath.Join(u.dir, "run") }

// views is where each tier is shown read-only.
func (u *up) views() (dirs []string) {
	for i := range u.tier.tiers {
		dirs = append(dirs, filepath.Join(u.runDir(), "view"))
		if i > 0 {
			dirs[i] += strconv.Itoa(i)
		}
	}
	return dirs
}

func (u *up) tierDirs() (dirs []string) {
	for _, t := range u.tier.tiers {
		dirs = append(dirs, t.dir)
	}
	return dirs
}

func (u *up) source() string { return mountSource(u.dir) }

// prepare checks the flags, reporting all mistakes, and makes the directories.
func (u *up) prepare() error {
	errs := []error{u.listens.validate()}
	if os.Geteuid() != 0 {
		errs = append(errs, errors.New("larder up makes mounts and needs root"))
	}
	dir, err := filepath.Abs(u.dir)
	errs = append(errs, err)
	if err == nil {
		u.dir = dir
	}
	if len(u.tier.tiers) == 0 {
		u.tier.tiers = []tier{{dir: filepath.Join(u.dir, "cache"), bytes: 10 << 30}}
	}
	if u.fileRoot != "" {
		if st, err := os.Stat(u.fileRoot); err != nil || !st.IsDir() {
			errs = append(errs, fmt.Errorf("--file-root %s is not a directory", u.fileRoot))
		}
		if u.fileRoot, err = filepath.Abs(u.fileRoot); err != nil {
			errs = append(errs, err)
		}
	}
	if u.workerUID < 0 {
		u.workerUID = nobody
		if u.fileRoot != "" { // it reads there what its owner may
			if uid, err := ownerOf(u.fileRoot); err == nil {
				u.workerUID = int64(uid)
			}
		}
	}
	if u.workerUID > math.MaxUint32-1 {
		errs = append(errs, fmt.Errorf("--worker-uid %d: want 0 to %d", u.workerUID, uint32(math.MaxUint32-1)))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, d := range []string{u.dir, u.runDir()} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if u.dir, err = filepath.EvalSymlinks(u.dir); err != nil {
		return err
	}
	given, err := giveTiers(u.tierDirs(), int(u.workerUID), u.log)
	if err != nil {
		return err
	}
	all := u.tier.tiers
	u.tier.tiers = nil
	for _, i := range given {
		u.tier.tiers = append(u.tier.tiers, all[i])
	}
	return giveRunDir(u.runDir(), int(u.workerUID))
}

// chownTree gives the tier to the worker; it is walked only if it was another user's.
func chownTree(dir string, uid int) error {
	if owner, err := ownerOf(dir); err != nil || int(owner) == uid {
		return err
	}
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		return os.Lchown(path, uid, -1)
	})
	return errors.Join(err, os.Chown(dir, uid, -1)) // the folder itself last: it says that all of it is done
}

// lock makes sure that there is one `up` for a directory. The children of one that was killed
// hold it too, until they have ended.
func (u *up) lock(ctx context.Context) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(u.runDir(), "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for start := time.Now(); ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if err != unix.EWOULDBLOCK || time.Since(start) > lockWait {
			f.Close()
			return nil, fmt.Errorf("--dir %s is in use by another larder up", u.dir)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

const lockWait = 10 * time.Second

// clean removes every mount of this directory.
func (u *up) clean() error {
	err := broker.RemoveDead(u.source())
	views, gerr := filepath.Glob(filepath.Join(u.runDir(), "view*")) // also those of tiers that it has no more
	for _, v := range views {
		err = errors.Join(err, broker.RemoveView(v))
	}
	return errors.Join(err, gerr)
}

func (u *up) masterTarget() string { return "unix://" + filepath.Join(u.runDir(), masterSocket) }

func (u *up) runMaster(ctx context.Context) error {
	m, err := master.New(master.Config{
		Dir: filepath.Join(u.dir, "master"), Listen: u.masterTarget(), ListenMode: 0o666,
		MetricsListen: u.metricsSocket("master"), Version: version, Tracer: u.tracer, Log: u.log.With("part", "master"),
	})
	if err != nil {
		return err
	}
	return m.Run(ctx)
}

func (u *up) metricsSocket(part string) string {
	return "unix://" + filepath.Join(u.runDir(), part+"-metrics.sock")
}

func (u *up) runCSI(ctx context.Context) error {
	m, err := client.New(client.Config{Target: u.masterTarget(), Tracer: u.tracer, Log: u.log})
	if err != nil {
		return err
	}
	defer m.Close()
	n, err := newNode(driver.Config{
		Endpoint: "unix://" + filepath.Join(u.dir, "csi.sock"), Version: version, Controller: true, Node: true,
		NodeID: u.nodeName, RunDir: u.runDir(), FileRoot: u.fileRoot, InlineEndpoints: u.endpoints,
		DriverCredentials: u.driverCredentials, STSEndpoints: u.stsEndpoints,
		Ready:  func(ctx context.Context) error { _, err := m.Status(ctx); return err },
		Tracer: u.tracer,
		Log:    u.log.With("part", "csi"),
	}, u.runDir(), m)
	if err != nil {
		return err
	}
	defer n.Close()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.srv.Run(ctx) })
	g.Go(func() error {
		own := listens{metrics: u.metricsSocket("csi")}
		return own.serve(ctx, "csi", telemetry.Probes{Ready: n.ready}, n.srv.Collector())
	})
	g.Go(func() error { return u.listens.serve(ctx, "up", telemetry.Probes{Ready: n.ready}, n.srv.Collector()) })
	return g.Wait()
}

func (u *up) runBroker(ctx context.Context) error {
	args := []string{"broker", "--run-dir", u.runDir(),
		"--worker-uid", fmt.Sprint(u.workerUID), "--mount-source", u.source(), "--takeover-deadline", u.deadline.String(),
		"--metrics-listen", u.metricsSocket("broker"), "--unmount-at-exit"}
	if u.listens.profiles != "" {
		args = append(args, "--pprof", "unix://"+filepath.Join(u.runDir(), "broker-pprof.sock"))
	}
	views := u.views()
	for i, dir := range u.tierDirs() {
		args = append(args, "--tier-dir", dir, "--view", views[i])
	}
	return u.keep(ctx, "broker", nil, nil, args...)
}

// runWorker passes directories by descriptor, so that a worker without rights needs none on
// their parents.
func (u *up) runWorker(ctx context.Context) error {
	if err := u.awaitBroker(ctx); err != nil { // which makes the view
		return err
	}
	var dirs []string
	const first = 5 // behind the standard ones, the lifeline and the lock
	at := func(dir string) string {
		dirs = append(dirs, dir)
		return fmt.Sprintf("/proc/self/fd/%d", first+len(dirs)-1)
	}
	run, views := at(u.runDir()), u.views()
	args := []string{"worker", "--run-dir", run,
		"--node-name", u.nodeName, "--master", "unix://" + run + "/" + masterSocket, "--listen", "127.0.0.1:0", "--metrics-listen", "unix://" + run + "/worker-metrics.sock"}
	for i, t := range u.tier.tiers {
		t.dir = at(t.dir)
		args = append(args, "--tier", t.String(), "--view", at(views[i]))
	}
	if u.fileRoot != "" {
		args = append(args, "--file-root", u.fileRoot, "--file-root-path", at(u.fileRoot))
	}
	if u.listens.profiles != "" {
		args = append(args, "--pprof", "unix://"+run+"/worker-pprof.sock")
	}
	if u.listens.trace.Endpoint != "" {
		args = append(args, "--trace-endpoint", u.listens.trace.Endpoint, "--trace-sample", fmt.Sprint(u.listens.trace.Sample))
	}
	if u.memory.bytes > 0 {
		args = append(args, "--memory", u.memory.String())
	}
	if u.minFree.bytes > 0 {
		args = append(args, "--min-free", u.minFree.String())
	}
	for flag, on := range map[string]bool{"--no-passthrough": u.features.NoPassthrough, "--no-resend": u.features.NoResend, "--no-splice": u.features.NoSplice} {
		if on {
			args = append(args, flag)
		}
	}
	return u.keep(ctx, "worker", u.upgrade, dirs, args...)
}

func (u *up) awaitBroker(ctx context.Context) error {
	for {
		c, err := brokerwire.Dial(ctx, filepath.Join(u.runDir(), brokerSocket))
		if err == nil {
			return c.Close()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// keep runs a child and runs it again when it dies, until ctx ends; then it is sent SIGTERM.
// upgrade, unless nil, has it replaced. A worker has another one in reserve.
func (u *up) keep(ctx context.Context, name string, upgrade <-chan os.Signal, dirs []string, args ...string) error {
	start := func(ctx context.Context, binary *os.File, more ...string) <-chan error {
		ended := make(chan error, 1)
		go func() { ended <- u.child(ctx, binary, dirs, slices.Concat(args, more)) }()
		return ended
	}
	run := func(binary *os.File) <-chan error { return start(ctx, binary) }
	spare := reserve{start: start, wanted: name == "worker"}
	defer spare.stop()
	var binary *os.File // nil is this process's own
	wait := minRestart
	began, ended := time.Now(), run(binary)
	spare.later()
	for {
		select {
		case <-upgrade:
			spare.stop() // it would have the cache before the new one
			binary, ended = u.replace(binary, ended, run)
			began = time.Now()
			spare.later()
		case <-spare.due:
			spare.run(ctx, binary)
		case err := <-spare.ended:
			spare.ended = nil
			if ctx.Err() == nil {
				u.log.Error("child in reserve died", "child", name, "err", err)
				spare.later()
			}
		case err := <-ended:
			if ctx.Err() != nil {
				return u.stopped(name, err)
			}
			if time.Since(began) > steady {
				wait = 0
			}
			if spare.ended != nil {
				u.log.Error("child died; the one in reserve takes over", "child", name, "err", err)
				began, ended = time.Now(), spare.take()
				continue
			}
			u.log.Error("child died; it is started again", "child", name, "err", err, "after", wait)
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(wait):
			}
			wait = min(max(2*wait, minRestart), maxRestart)
			began, ended = time.Now(), run(binary)
			spare.later()
		}
	}
}

// reserve is a worker that has started and waits for the cache. When the one before it dies it has that
// at once: to start a process takes longer than all the rest of a take-over.
type reserve struct {
	start  func(ctx context.Context, binary *os.File, more ...string) <-chan error
	wanted bool

	due    <-chan time.Time // when one is to be started; nil if none is
	ended  <-chan error     // nil without one
	cancel context.CancelFunc
}

// later has one started when the child that runs has shown that it does, and needs the CPU less.
func (r *reserve) later() {
	if r.wanted {
		r.due = time.After(steady)
	}
}

func (r *reserve) run(ctx context.Context, binary *os.File) {
	ctx, r.cancel = context.WithCancel(ctx)
	r.due, r.ended = nil, r.start(ctx, binary, "--standby")
}

// take makes it the child that runs, and has another one started.
func (r *reserve) take() (ended <-chan error) {
	ended, r.ended = r.ended, nil
	r.later()
	return ended
}

func (r *reserve) stop() {
	if r.due = nil; r.ended != nil {
		r.cancel()
		<-r.ended
		r.ended = nil
	}
}

// replace starts a worker from the binary on disk beside the one that runs, which hands over and
// ends. It returns what runs then: if the new one ends first, the old one, or its next start.
func (u *up) replace(old *os.File, ended <-chan error, run func(*os.File) <-chan error) (*os.File, <-chan error) {
	path, err := os.Executable()
	var binary *os.File
	if err == nil {
		binary, err = os.Open(path)
	}
	if err != nil {
		u.log.Error("replace the worker", "err", err)
		return old, ended
	}
	u.log.Info("replacing the worker", "binary", path)
	next := run(binary)
	select {
	case err := <-next:
		u.log.Error("the new worker ended; the old one stays", "err", err)
		binary.Close()
		return old, ended
	case err := <-ended:
		if err != nil { // not handed over: the new one takes over, but has not shown that it can
			u.log.Error("the old worker died", "err", err)
			return old, next
		}
		old.Close()
		return binary, next
	}
}

// stopped is how a child ended that was told to.
func (u *up) stopped(name string, err error) error {
	if err == nil || errors.Is(err, context.Canceled) {
		return nil
	}
	return fmt.Errorf("stop %s: %w", name, err)
}

const (
	minRestart = 10 * time.Millisecond
	maxRestart = 5 * time.Second
	steady     = time.Second      // a child that lived that long does not die at each start
	stopWait   = 20 * time.Second // from SIGTERM to SIGKILL
)

// child runs one process to its end. It holds one end of a pipe, so that it ends when this
// process is killed.
func (u *up) child(ctx context.Context, binary *os.File, dirs, args []string) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer w.Close()
	defer r.Close()
	files := []*os.File{r, u.held}
	defer func() { brokerwire.CloseFiles(files[2:]) }()
	for _, d := range dirs {
		f, err := os.OpenFile(d, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		files = append(files, f)
	}
	self := "/proc/self/exe" // by descriptor, hence reached whatever the worker's rights on the binary's folder
	if binary != nil {
		self = fmt.Sprintf("/proc/self/fd/%d", 3+len(files))
	}
	cmd := exec.CommandContext(ctx, self, slices.Concat(args, []string{"--lifeline-fd", "3"})...)
	cmd.Stderr, cmd.ExtraFiles = os.Stderr, files
	if binary != nil {
		cmd.ExtraFiles = append(slices.Clip(files), binary)
	}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = stopWait
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a Ctrl-C at the terminal is for the parent, which stops them in order
	start := cmd.Start
	if args[0] == "worker" {
		start = func() error { return startUnprivileged(cmd, uint32(u.workerUID)) }
	}
	if err := start(); err != nil {
		return err
	}
	defer context.AfterFunc(u.hurried, func() { cmd.Process.Kill() })()
	return cmd.Wait()
}

// quickBackoff is for peers on the same machine.
var quickBackoff = grpc.ConnectParams{
	Backoff:           backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, Jitter: 0.2, MaxDelay: 500 * time.Millisecond},
	MinConnectTimeout: 2 * time.Second,
}

func unixDialer(path string) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, _ string) (net.Conn, error) { return brokerwire.DialStream(ctx, path) }
}
