package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/sanity/stack"
)

// Parts of a node that are killed.
const (
	workerPart     = "worker"
	brokerPart     = "broker" // with the node service, where each part is a process of its own
	masterPart     = "master" // likewise, as the controller
	controllerPart = "controller"
)

// larder is what runs: all in `larder up`, or each part on its own.
type larder interface {
	Command(ctx context.Context, name string, args ...string) *exec.Cmd
	Abort() error
	Log() string
	Close() error
	runDir() string
	pid(part string) int // 0 while it is dead
}

// node is a running larder with its kubelet.
type node struct {
	larder
	*stack.Kubelet
	broker *brokerwire.Client
}

func newNode(l larder, k *stack.Kubelet) *node {
	return &node{larder: l, Kubelet: k, broker: brokerwire.NewClient(filepath.Join(l.runDir(), "broker.sock"))}
}

func (n *node) Close() error { return errors.Join(n.broker.Close(), n.larder.Close()) }

// up is `larder up`: master and CSI services in one process, which is not killed; worker and
// broker are its children.
type up struct{ *stack.Stack }

func startUp(ctx context.Context, cfg stack.Config, tier int64) (*node, error) {
	cfg.Args = []string{"--tier", fmt.Sprintf("%s:%d", filepath.Join(cfg.Dir, "l", "cache"), tier)}
	s, err := stack.Start(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return newNode(up{s}, s.Kubelet), nil
}

func (u up) runDir() string { return filepath.Join(u.Dir(), "run") }

func (u up) pid(part string) int {
	entries, _ := os.ReadDir("/proc")
	for _, e := range slices.Backward(entries) {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || parent(pid) != u.PID() {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if args := bytes.Split(cmdline, []byte{0}); len(args) < 2 || string(args[1]) != part {
			continue
		}
		if part != workerPart || hasTier(pid) { // else it is in reserve
			return pid
		}
	}
	return 0
}

// hasTier reports whether a worker has the lock of its cache directory: it locks nothing else.
func hasTier(pid int) bool {
	b, _ := os.ReadFile("/proc/locks")
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line) // one who waits has an arrow in the second place
		if len(f) > 4 && f[1] == "FLOCK" && f[4] == strconv.Itoa(pid) {
			return true
		}
	}
	return false
}

func parent(pid int) int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])) // behind the name, which may hold anything
	if len(f) < 2 {
		return 0
	}
	ppid, _ := strconv.Atoi(f[1])
	return ppid
}

// process is a part that can be signalled without hitting another one.
type process struct{ pid, fd int }

// find waits for the part, if it is being restarted; other is a process that it must not be.
func (n *node) find(ctx context.Context, part string, other int) (process, error) {
	var p process
	err := eventually(ctx, part+" is started again", func() bool {
		if p.pid = n.pid(part); p.pid == 0 || p.pid == other {
			return false
		}
		var err error
		p.fd, err = unix.PidfdOpen(p.pid, 0)
		return err == nil
	})
	return p, err
}

func (p process) signal(sig unix.Signal) error { return unix.PidfdSendSignal(p.fd, sig, nil, 0) }

// awaitEnd waits for the end of the process.
func (p process) awaitEnd(ctx context.Context) error {
	return eventually(ctx, fmt.Sprintf("process %d ends", p.pid), func() bool {
		fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
		k, _ := unix.Poll(fds, 50)
		return k == 1
	})
}

func (p process) close() { unix.Close(p.fd) }

// privileges of a process: its user, and the sum of the capability sets that it has or can hand on.
func (p process) privileges() (uid int, capabilities uint64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		switch name {
		case "Uid":
			uid, err = strconv.Atoi(strings.Fields(value)[1])
		case "CapInh", "CapPrm", "CapEff", "CapAmb":
			var set uint64
			set, err = strconv.ParseUint(strings.TrimSpace(value), 16, 64)
			capabilities |= set
		}
		if err != nil {
			return 0, 0, err
		}
	}
	return uid, capabilities, nil
}

// mounts are what the broker holds, by volume.
func (n *node) mounts(ctx context.Context) (map[string]brokerwire.Mount, error) {
	list, err := n.broker.Mounts(ctx)
	if err != nil {
		return nil, err
	}
	out := map[string]brokerwire.Mount{}
	for _, m := range list {
		out[m.VolumeID] = m
	}
	return out, nil
}
