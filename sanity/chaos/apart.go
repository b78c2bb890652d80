package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/driver/broker"
	"github.com/larderfs/larder/sanity/leak"
	"github.com/larderfs/larder/sanity/stack"
)

// apart is every part as a process of its own, as in Kubernetes: master, controller, node
// service with the broker, and a worker without rights. What dies is started again.
type apart struct {
	dir     string
	binary  int // descriptor of the program: the worker may not enter the folder that it is in
	tier    int64
	log     *os.File
	kubelet *stack.Kubelet

	keepers sync.WaitGroup
	stop    context.CancelFunc

	mu   sync.Mutex // guards pids
	pids map[string]int
}

// nobody is whom the worker runs as.
const nobody = 65534

func startApart(ctx context.Context, dir, binary string, tier int64) (_ *node, err error) {
	a := &apart{dir: dir, tier: tier, pids: map[string]int{}}
	if err := a.prepare(binary); err != nil {
		return nil, err
	}
	a.kubelet = stack.NewKubelet(filepath.Join(dir, "kubelet"), filepath.Join(a.runDir(), "ctl.sock"), filepath.Join(a.runDir(), "node.sock"))
	n := newNode(a, a.kubelet)
	life, stop := context.WithCancel(context.WithoutCancel(ctx))
	a.stop = stop
	for _, part := range []string{masterPart, brokerPart, workerPart, controllerPart} {
		if part == workerPart {
			err = eventually(ctx, "the view is mounted", func() bool { return len(leak.Mounts(a.view())) > 0 })
		}
		a.keepers.Go(func() { a.keep(life, part) })
	}
	ready, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err = errors.Join(err, n.WaitReady(ready)); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

func (a *apart) runDir() string { return filepath.Join(a.dir, "run") }
func (a *apart) view() string   { return filepath.Join(a.runDir(), "view") }
func (a *apart) cache() string  { return filepath.Join(a.dir, "cache") }
func (a *apart) Log() string    { return filepath.Join(a.dir, "larder.log") }
func (a *apart) Abort() error   { return leak.Abort(a.dir) }

func (a *apart) prepare(binary string) (err error) {
	f, err := os.Open(binary)
	if err != nil {
		return err
	}
	defer f.Close()
	const behind = 100 // the descriptors that a child is given
	if a.binary, err = unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, behind); err != nil {
		return err
	}
	for _, d := range []string{a.runDir(), a.cache(), filepath.Join(a.dir, "tmp")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	a.log, err = os.Create(a.Log())
	return errors.Join(err, os.Chown(a.cache(), nobody, nobody), os.Chown(a.runDir(), 0, nobody), os.Chmod(a.runDir(), os.ModeSticky|0o771))
}

func (a *apart) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "TMPDIR="+filepath.Join(a.dir, "tmp"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

func (a *apart) pid(part string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.pids[part]
}

// keep runs a part, again and again, until ctx ends; then it is asked to end.
func (a *apart) keep(ctx context.Context, part string) {
	for ctx.Err() == nil {
		if err := a.once(ctx, part); err != nil {
			fmt.Fprintf(a.log, "chaos: %s: %v\n", part, err)
		}
		pause(ctx, 10*time.Millisecond)
	}
}

func (a *apart) once(ctx context.Context, part string) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer w.Close() // its end is the end of the child, should we be killed
	defer r.Close()
	cmd := a.Command(ctx, fmt.Sprintf("/proc/self/fd/%d", a.binary), append(a.args(part), "--lifeline-fd", "3")...)
	dirs, err := a.dirs(part)
	if err != nil {
		return err
	}
	defer func() {
		for _, d := range dirs {
			d.Close()
		}
	}()
	cmd.Stderr, cmd.ExtraFiles = a.log, append([]*os.File{r}, dirs...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	if part == workerPart {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	a.set(part, cmd.Process.Pid)
	err = cmd.Wait()
	a.set(part, 0)
	return err
}

// dirs are what a part gets by descriptor: the worker may not enter what is above them. They
// follow the lifeline.
func (a *apart) dirs(part string) (files []*os.File, err error) {
	if part != workerPart {
		return nil, nil
	}
	for _, dir := range []string{a.runDir(), a.cache(), a.view()} {
		f, err := os.Open(dir)
		if err != nil {
			return files, err
		}
		files = append(files, f)
	}
	return files, nil
}

func (a *apart) set(part string, pid int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.pids[part] = pid
}

func (a *apart) args(part string) []string {
	in := func(name string) string { return "unix://" + filepath.Join(a.runDir(), name) }
	switch part {
	case masterPart:
		return []string{"master", "--dir", filepath.Join(a.dir, "master"), "--listen", in("master.sock"), "--metrics-listen", ""}
	case controllerPart:
		return []string{"csi", "controller", "--endpoint", in("ctl.sock"), "--master", in("master.sock"), "--metrics-listen", ""}
	case brokerPart:
		return []string{"csi", "node", "--endpoint", in("node.sock"), "--run-dir", a.runDir(), "--tier-dir", a.cache(), "--view", a.view(),
			"--worker-uid", fmt.Sprint(nobody), "--node-name", "n1", "--metrics-listen", ""}
	}
	const run, cache, view = "/proc/self/fd/4", "/proc/self/fd/5", "/proc/self/fd/6" // see dirs
	return []string{"worker", "--run-dir", run, "--tier", fmt.Sprintf("%s:%d", cache, a.tier), "--view", view,
		"--node-name", "n1", "--master", "unix://" + run + "/master.sock", "--metrics-listen", ""}
}

// Close ends all parts. The worker keeps the mounts until its end; there are none.
func (a *apart) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	err := errors.Join(a.kubelet.UnpublishAll(ctx), a.kubelet.Close())
	a.stop()
	a.keepers.Wait()
	err = errors.Join(err, broker.RemoveView(a.view()))
	for _, m := range leak.Mounts(a.dir) {
		err = errors.Join(err, fmt.Errorf("%s (%s) is still mounted", m.Point, m.Type))
	}
	return errors.Join(err, a.log.Close(), unix.Close(a.binary), leak.Clean(a.dir))
}
