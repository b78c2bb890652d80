package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// node is the first process of a node's namespaces. It starts the node's programs, reaps whatever
// is reparented to it, and obeys its control socket.
type node struct {
	*cluster
	name  string
	index int
	dir   string
	log   *os.File

	mu      sync.Mutex // held while a process is started, so that it is known before it is reaped
	running map[string]*os.Process
	ended   map[int]chan struct{} // by pid; closed when it has been reaped
	spawned chan struct{}         // holds one value when a process was started
}

func (c *cluster) runNode(name string, index int) error {
	n := &node{cluster: c, name: name, index: index, dir: c.nodeDir(name), running: map[string]*os.Process{}, ended: map[int]chan struct{}{},
		spawned: make(chan struct{}, 1), log: os.Stderr}
	err := each(
		func() error { return unix.Sethostname([]byte(name)) },
		func() error { return makeMounts(n.dir) },
		func() error { return makeCgroups(name) },
		func() error { return makeNetwork(index) },
		n.writeConfigs,
		func() error { return os.Setenv("PATH", c.bin()+":"+os.Getenv("PATH")) },
	)
	if err != nil {
		return fmt.Errorf("set up %s: %w", name, err)
	}
	control, err := n.listen()
	if err != nil {
		return err
	}
	go n.reap()
	go n.obey(control)
	if err := n.startAll(); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	fmt.Fprintln(n.log, "started")
	select {}
}

func (c *cluster) control(node string) string { return filepath.Join(c.nodeDir(node), "control") }

func (n *node) listen() (net.Listener, error) {
	path := n.control(n.name)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	return net.Listen("unix", path)
}

func (n *node) startAll() error {
	programs := []string{"containerd"}
	if n.index == 1 {
		programs = append([]string{"etcd", "kube-apiserver"}, programs...)
	}
	for _, p := range programs {
		if err := n.start(p); err != nil {
			return err
		}
	}
	if err := await(func() bool { _, err := os.Stat(containerdSocket); return err == nil }); err != nil {
		return fmt.Errorf("containerd: %w", err)
	}
	if err := n.importImages(); err != nil {
		return err
	}
	// Controllers exit when they ask before the API server has made their roles.
	ready, err := n.apiReady()
	if err != nil {
		return err
	}
	if err := await(ready); err != nil {
		return fmt.Errorf("API server: %w", err)
	}
	programs = []string{"kubelet", "kube-proxy"}
	if n.index == 1 {
		programs = append([]string{"kube-controller-manager", "kube-scheduler", "coredns"}, programs...)
	}
	for _, p := range programs {
		if err := n.start(p); err != nil {
			return err
		}
	}
	return nil
}

// apiReady returns what asks whether the API server serves and has its bootstrap roles.
func (n *node) apiReady() (func() bool, error) {
	ca, err := os.ReadFile(n.pki("ca.crt"))
	if err != nil {
		return nil, err
	}
	cert, err := tls.LoadX509KeyPair(n.pki(n.name+".crt"), n.pki(n.name+".key"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	client := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}}}}
	url := fmt.Sprintf("https://%s:%d/readyz", address(1), apiPort)
	return func() bool {
		r, err := client.Get(url)
		if err != nil {
			return false
		}
		r.Body.Close()
		return r.StatusCode == http.StatusOK
	}, nil
}

// await asks until it is answered yes. What it waits for gives no event.
func await(eventually func() bool) error { return awaitFor(2*time.Minute, eventually) }

func awaitFor(limit time.Duration, eventually func() bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !eventually() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("not there after %v", limit)
		}
	}
	return nil
}

// start starts a program of the node; its output goes to log/NAME.log.
func (n *node) start(name string) error {
	n.mu.Lock()
	p := n.running[name]
	n.mu.Unlock()
	if p != nil {
		return fmt.Errorf("%s is running", name)
	}
	p, _, err := n.spawn(name, n.arguments(name)...)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.running[name] = p
	return nil
}

func (n *node) spawn(name string, args ...string) (*os.Process, <-chan struct{}, error) {
	log, err := os.OpenFile(filepath.Join(n.dir, "log", name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, nil, err
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, nil, err
	}
	defer null.Close()
	n.mu.Lock()
	defer n.mu.Unlock()
	p, err := os.StartProcess(filepath.Join(n.bin(), name), append([]string{name}, args...), &os.ProcAttr{
		Files: []*os.File{null, log, log}, Sys: &unix.SysProcAttr{Setsid: true}})
	if err != nil {
		return nil, nil, err
	}
	ended := make(chan struct{})
	n.ended[p.Pid] = ended
	select {
	case n.spawned <- struct{}{}:
	default:
	}
	return p, ended, nil
}

// stop ends a program by SIGTERM.
func (n *node) stop(name string) error {
	n.mu.Lock()
	p := n.running[name]
	var ended chan struct{}
	if p != nil {
		ended = n.ended[p.Pid]
	}
	n.mu.Unlock()
	if p == nil {
		return fmt.Errorf("%s is not running", name)
	}
	if err := unix.Kill(p.Pid, unix.SIGTERM); err != nil && err != unix.ESRCH {
		return err
	}
	if ended != nil {
		<-ended
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.running, name)
	return nil
}

// reap waits for every child, our own and those that lost their parent.
func (n *node) reap() {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if err != nil { // ECHILD: there is none
			<-n.spawned
			continue
		}
		n.mu.Lock()
		for name, p := range n.running {
			if p.Pid == pid {
				fmt.Fprintf(n.log, "%s ended: exit %d, signal %d\n", name, status.ExitStatus(), status.Signal())
				delete(n.running, name)
			}
		}
		if ended := n.ended[pid]; ended != nil {
			close(ended)
			delete(n.ended, pid)
		}
		n.mu.Unlock()
	}
}

// obey answers lines "stop kubelet", "start kubelet", "restart kubelet".
func (n *node) obey(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			fmt.Fprintln(n.log, "control socket:", err)
			return
		}
		line, err := bufio.NewReader(c).ReadString('\n')
		verb, name, _ := strings.Cut(strings.TrimSpace(line), " ")
		if err == nil {
			err = n.do(verb, name)
		}
		answer := "ok"
		if err != nil {
			answer = err.Error()
		}
		fmt.Fprintln(c, answer)
		c.Close()
	}
}

func (n *node) do(verb, name string) error {
	switch verb {
	case "status":
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.running[name] == nil {
			return fmt.Errorf("%s does not run", name)
		}
		return nil
	case "stop":
		return n.stop(name)
	case "start":
		return n.start(name)
	case "restart":
		return errors.Join(n.stop(name), n.start(name))
	}
	return fmt.Errorf("no verb %q", verb)
}

// importImages loads the archives of the cluster's image directory.
func (n *node) importImages() error {
	archives, err := filepath.Glob(n.images("*.tar"))
	if err != nil {
		return err
	}
	for _, a := range archives {
		_, ended, err := n.spawn("ctr", "-n", "k8s.io", "images", "import", "--local", a)
		if err != nil {
			return err
		}
		<-ended
	}
	return nil
}
