package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func (c *cluster) up(ctx context.Context, args []string) error {
	nodes := 2
	if len(args) > 0 {
		var err error
		if nodes, err = strconv.Atoi(args[0]); err != nil || nodes < 1 || nodes > maxNodes {
			return fmt.Errorf("%q nodes: 1 to %d", args[0], maxNodes)
		}
	}
	if running, err := c.nodes(); err != nil {
		return err
	} else if len(running) > 0 {
		return fmt.Errorf("%s holds a cluster of %v: run down first", c.dir, running)
	}
	dirs, err := c.build(ctx)
	if err != nil {
		return err
	}
	start := time.Now()
	say := func(what string) {
		fmt.Fprintf(os.Stderr, "%5.1fs %s\n", time.Since(start).Seconds(), what)
	}
	if err := each(func() error { return c.link(dirs) }, func() error { return c.makePKI(nodes) }, c.makeImages); err != nil {
		return err
	}
	for i := range nodes {
		if err := c.startNode(fmt.Sprintf("n%d", i+1)); err != nil {
			return err
		}
	}
	say("processes started")
	for i := range nodes {
		name := fmt.Sprintf("n%d", i+1)
		if err := c.awaitReady(ctx, name); err != nil {
			return err
		}
		say("node " + name + " is ready")
	}
	return nil
}

// startNode starts a node's first process in namespaces of its own and connects it, unless it runs.
func (c *cluster) startNode(name string) error {
	i, err := index(name)
	if err != nil {
		return err
	}
	if pid, err := c.pid(name); err == nil && c.alive(name, pid) {
		return nil
	}
	dir := c.nodeDir(name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(dir, "init.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command("/proc/self/exe", "-dir", c.dir, "-cache", c.cache, "node", name, strconv.Itoa(i))
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET |
		syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC}
	if err := cmd.Start(); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "pid"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o644); err != nil {
		return errors.Join(err, cmd.Process.Kill())
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	err = awaitFor(20*time.Second, func() bool { // the node has made its network before it listens
		conn, err := net.Dial("unix", c.control(name))
		if err == nil {
			conn.Close()
		}
		return err == nil || len(ended) > 0
	})
	if err == nil && len(ended) > 0 {
		err = <-ended
	}
	if err != nil {
		return fmt.Errorf("start node %s: %w; see %s", name, err, log.Name())
	}
	if err := c.join(name); err != nil {
		return errors.Join(err, c.killNode(name))
	}
	return nil
}

func (c *cluster) awaitReady(ctx context.Context, name string) error {
	kubectl := func(args ...string) error {
		cmd := exec.CommandContext(ctx, filepath.Join(c.bin(), "kubectl"), append([]string{"--kubeconfig", c.kubeconfig("admin")}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, out)
		}
		return nil
	}
	// The API server answers before the node's programs that start after it do.
	if err := await(func() bool { return c.ask(name, "status", "kubelet") == nil || ctx.Err() != nil }); err != nil {
		return fmt.Errorf("kubelet of %s: %w; logs are in %s", name, err, c.nodeDir(name))
	}
	if err := kubectl("wait", "--for=create", "node/"+name, "--timeout=120s"); err != nil {
		return err
	}
	return kubectl("wait", "--for=condition=Ready", "node/"+name, "--timeout=120s")
}

// pid is that of a node's first process.
func (c *cluster) pid(node string) (int, error) {
	text, err := os.ReadFile(filepath.Join(c.nodeDir(node), "pid"))
	if err != nil {
		return 0, fmt.Errorf("node %s: %w", node, err)
	}
	return strconv.Atoi(string(text))
}

// killNode ends everything in a node, as the end of a PID namespace's first process does, and removes its
// cgroups: a kubelet spends three seconds on each that a runtime does not know, before it registers.
func (c *cluster) killNode(node string) error {
	pid, err := c.pid(node)
	if err != nil {
		return err
	}
	if c.alive(node, pid) {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
			return err
		}
		if err := awaitFor(30*time.Second, func() bool { return !c.alive(node, pid) }); err != nil {
			return fmt.Errorf("%s, process %d: %w", node, pid, err)
		}
	}
	if awaitFor(20*time.Second, func() bool { err = removeCgroups(node); return err == nil }) != nil {
		return err
	}
	return nil
}

// alive tells whether pid is still the node's first process, and not a zombie or another's.
func (c *cluster) alive(node string, pid int) bool {
	args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return err == nil && strings.Contains(string(args), "\x00"+c.dir+"\x00") && strings.Contains(string(args), "\x00node\x00"+node+"\x00")
}

func (c *cluster) down() error {
	nodes, err := c.nodes()
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range nodes {
		if err := c.killNode(n); !errors.Is(err, fs.ErrNotExist) { // one that was never started
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if _, err := net.InterfaceByName(hostLink); err == nil {
		errs = append(errs, ip("link del %s", hostLink))
	}
	for _, n := range nodes {
		errs = append(errs, os.RemoveAll(c.nodeDir(n)))
	}
	errs = append(errs, os.RemoveAll(c.pki("")), os.RemoveAll(c.bin()), os.RemoveAll(c.images("")))
	if err := os.Remove(c.dir); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTEMPTY) { // others' files stay
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// exec replaces this process by a command inside a node.
func (c *cluster) exec(node string, command []string) error {
	pid, err := c.pid(node)
	if err != nil {
		return err
	}
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		return err
	}
	args := append([]string{"nsenter", "-t", strconv.Itoa(pid), "-m", "-u", "-i", "-n", "-p", "--"}, command...)
	if err := os.Setenv("PATH", c.bin()+":"+os.Getenv("PATH")); err != nil {
		return err
	}
	return syscall.Exec(nsenter, args, os.Environ())
}

// ask sends a node's first process a command.
func (c *cluster) ask(node, verb, program string) error {
	conn, err := net.Dial("unix", c.control(node))
	if err != nil {
		return err
	}
	defer conn.Close()
	fmt.Fprintln(conn, verb, program)
	answer, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return fmt.Errorf("%s %s in %s: %w", verb, program, node, err)
	}
	if answer = strings.TrimSpace(answer); answer != "ok" {
		return fmt.Errorf("%s %s in %s: %s", verb, program, node, answer)
	}
	return nil
}

// load imports archives now, and keeps them for nodes that are started again.
func (c *cluster) load(ctx context.Context, archives []string) error {
	nodes, err := c.nodes()
	if err != nil {
		return err
	}
	for _, a := range archives {
		kept := c.images(filepath.Base(a))
		if err := copyFile(kept, a, 0o644); err != nil {
			return err
		}
		for _, n := range nodes {
			pid, err := c.pid(n)
			if err != nil {
				return err
			}
			cmd := exec.CommandContext(ctx, "nsenter", "-t", strconv.Itoa(pid), "-m", "-u", "-i", "-n", "-p", "--",
				filepath.Join(c.bin(), "ctr"), "-n", "k8s.io", "images", "import", "--local", kept)
			if out, err := cmd.CombinedOutput(); err != nil {
				return fmt.Errorf("import %s into %s: %w: %s", a, n, err, out)
			}
		}
	}
	return nil
}
