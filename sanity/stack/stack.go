// Package stack is a running Larder, `larder up`, and a kubelet that asks it for volumes,
// under one directory.
//
// Whatever [Start] and the calls on a [Stack] make — mounts, processes, files — is gone
// after [Stack.Close], also if larder hangs or was killed. A path below a target may block
// for ever while larder is broken: let a child process read it, with a deadline.
package stack

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/larderfs/larder/sanity/leak"
)

// Config says what to start. The zero value works within the module.
type Config struct {
	Dir    string        // all there is, short because of sockets in it; "" means a new temporary one
	Binary string        // larder; "" builds it into Dir
	Args   []string      // more arguments of larder up, behind --dir
	Env    []string      // more environment of larder, "KEY=VALUE"
	Grace  time.Duration // from SIGTERM to SIGKILL in Close and Stop; 0 means 20s
}

// Stack is a running larder up and its kubelet.
type Stack struct {
	*Kubelet
	Binary string // the larder that runs

	dir string
	cfg Config
	up  *child // nil between Stop or Kill and Restart
}

// Start starts larder and waits until its Probe says ready. On an error nothing is left.
func Start(ctx context.Context, cfg Config) (_ *Stack, err error) {
	if cfg.Grace == 0 {
		cfg.Grace = 20 * time.Second
	}
	dir, err := scratch(cfg.Dir)
	if err != nil {
		return nil, err
	}
	s := &Stack{dir: dir, cfg: cfg, Binary: cfg.Binary}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if s.Binary == "" {
		s.Binary = filepath.Join(dir, "bin", "larder")
		if err := Build(ctx, s.Binary); err != nil {
			return nil, err
		}
	}
	s.Kubelet = NewKubelet(filepath.Join(dir, "kubelet"), s.Socket())
	return s, s.Restart(ctx)
}

// scratch makes the folders of a stack. The path is free of symbolic links, so that it is
// how the kernel's mount table spells it.
func scratch(dir string) (string, error) {
	if dir == "" {
		var err error
		if dir, err = os.MkdirTemp("", "stack"); err != nil {
			return "", err
		}
	}
	if err := os.MkdirAll(filepath.Join(dir, "tmp"), 0o700); err != nil {
		return "", err
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(dir)
}

// Build compiles larder of the module in which this process runs.
func Build(ctx context.Context, binary string, flags ...string) error {
	args := append([]string{"build", "-o", binary}, flags...)
	cmd := exec.CommandContext(ctx, "go", append(args, "github.com/larderfs/larder/cmd/larder")...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build larder: %w\n%s", err, out)
	}
	return nil
}

// Dir is the --dir of larder up.
func (s *Stack) Dir() string { return filepath.Join(s.dir, "l") }

// Socket is where larder up serves CSI.
func (s *Stack) Socket() string { return filepath.Join(s.Dir(), "csi.sock") }

// Log is the file that holds what larder wrote to its standard error, over all restarts.
func (s *Stack) Log() string { return filepath.Join(s.dir, "larder.log") }

// PID is that of larder up; 0 while it does not run.
func (s *Stack) PID() int {
	if s.up == nil {
		return 0
	}
	return s.up.pid
}

// Restart starts larder up on the directory again, after Stop or Kill, and waits until its
// Probe says ready.
func (s *Stack) Restart(ctx context.Context) error {
	log, err := os.OpenFile(s.Log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(s.Binary, append([]string{"up", "--dir", s.Dir()}, s.cfg.Args...)...)
	cmd.Env = append(os.Environ(), append(s.cfg.Env, "TMPDIR="+s.tmp())...)
	cmd.Stdout, cmd.Stderr = log, log
	if s.up, err = start(cmd); err != nil {
		return fmt.Errorf("start larder: %w", err)
	}
	if err := s.ready(ctx); err != nil {
		return fmt.Errorf("larder up: %w\n%s", err, s.Tail())
	}
	return nil
}

// ready waits for the Probe, or for the end of larder.
func (s *Stack) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	probed := make(chan error, 1)
	go func() { probed <- s.Kubelet.WaitReady(ctx) }()
	select {
	case err := <-probed:
		return err
	case <-s.up.exited:
		cancel()
		<-probed
		return fmt.Errorf("ended: %w", s.up.err)
	}
}

func (s *Stack) tmp() string { return filepath.Join(s.dir, "tmp") }

// Tail is the end of the log, for an error.
func (s *Stack) Tail() string {
	b, _ := os.ReadFile(s.Log())
	lines := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}

// Stop sends SIGTERM and waits. Published volumes stay published for the next Restart.
func (s *Stack) Stop() error {
	if s.up == nil {
		return nil
	}
	up := s.up
	s.up = nil
	syscall.Kill(up.pid, syscall.SIGTERM)
	select {
	case <-up.exited:
		return up.err
	case <-time.After(s.cfg.Grace):
		syscall.Kill(up.pid, syscall.SIGKILL)
		<-up.exited
		return fmt.Errorf("larder up did not stop within %v of SIGTERM\n%s", s.cfg.Grace, s.Tail())
	}
}

// Kill ends larder up and all its children with SIGKILL.
func (s *Stack) Kill() error {
	if s.up == nil {
		return nil
	}
	up := s.up
	s.up = nil
	syscall.Kill(up.pid, syscall.SIGKILL) // first, or it would restart the others
	err := leak.Kill(s.tmp())
	<-up.exited
	return err
}

// Close unpublishes the volumes that still are, stops larder, and removes everything. It
// reports what larder left behind for it to remove.
func (s *Stack) Close() error {
	var errs []error
	if s.up != nil {
		ctx, cancel := context.WithTimeout(context.Background(), s.cfg.Grace)
		errs = append(errs, s.Kubelet.UnpublishAll(ctx))
		cancel()
		errs = append(errs, s.Stop())
		for _, m := range leak.Mounts(s.dir) {
			errs = append(errs, fmt.Errorf("larder up left %s (%s) mounted", m.Point, m.Type))
		}
	}
	if s.Kubelet != nil {
		errs = append(errs, s.Kubelet.Close())
	}
	errs = append(errs, leak.Abort(s.dir), leak.Kill(s.tmp()), leak.Clean(s.dir))
	return errors.Join(errs...)
}

// Abort ends every FUSE connection of the stack: whoever waits in a read gets an error.
func (s *Stack) Abort() error { return leak.Abort(s.dir) }

// Command is a program that reads volumes of the stack. When ctx ends it is killed; where a
// broken mount keeps it from dying the FUSE connections are aborted. Close ends it too.
func (s *Stack) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "TMPDIR="+s.tmp())
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a Ctrl-C at the terminal is for us alone
	cmd.Cancel = func() error {
		pid := cmd.Process.Pid
		time.AfterFunc(5*time.Second, func() {
			if syscall.Kill(pid, 0) == nil {
				s.Abort()
			}
		})
		return syscall.Kill(-pid, syscall.SIGKILL)
	}
	return cmd
}

// Status is what `larder status -o json` says.
type Status struct {
	PID          int             `json:"pid"` // of the worker
	CachedBytes  int64           `json:"cachedBytes"`
	Complete     int             `json:"completeObjects"`
	AheadBytes   int64           `json:"aheadBytes"`     // fetched before anybody asked
	AheadRead    int64           `json:"aheadReadBytes"` // of them, read since
	ReadRequests int64           `json:"readRequests"`   // FUSE READs that reached the worker
	Takeovers    int64           `json:"takeovers"`
	Mounts       json.RawMessage `json:"mounts"`
}

// Status asks the running larder.
func (s *Stack) Status(ctx context.Context) (Status, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var out, diag bytes.Buffer
	cmd := s.Command(ctx, s.Binary, "status", "--dir", s.Dir(), "-o", "json")
	cmd.Stdout, cmd.Stderr = &out, &diag
	if err := cmd.Run(); err != nil {
		return Status{}, fmt.Errorf("larder status: %w: %s", err, bytes.TrimSpace(diag.Bytes()))
	}
	var st Status
	if err := json.Unmarshal(out.Bytes(), &st); err != nil {
		return Status{}, fmt.Errorf("larder status: %w", err)
	}
	return st, nil
}

// child is a started process. err is its end, to be read after exited is closed.
type child struct {
	pid    int
	exited chan struct{}
	err    error
}

// start starts cmd in a process group of its own, so that a Ctrl-C at the terminal reaches
// only us, and so that it is told to stop (SIGTERM) if this process dies. The kernel means
// by that the thread which started it: that one waits for the child and does nothing else.
func start(cmd *exec.Cmd) (*child, error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	c := &child{exited: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := cmd.Start()
		if err == nil {
			c.pid = cmd.Process.Pid
		}
		started <- err
		if err == nil {
			c.err = cmd.Wait()
			close(c.exited)
		}
	}()
	return c, <-started
}
