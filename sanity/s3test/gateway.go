package s3test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	command    = "github.com/versity/versitygw/cmd/versitygw"
	healthPath = "/larder-health"
)

// build returns the gateway's binary. It is built once per user and go.sum: test binaries
// that run at the same time wait for each other at a file lock.
func build(ctx context.Context, cfg Config) (string, error) {
	module := cfg.Module
	if module == "" {
		_, source, _, _ := runtime.Caller(0)
		module = filepath.Join(filepath.Dir(source), "gateway")
	}
	name, err := binaryName(module)
	if err != nil {
		return "", err
	}
	dir := cfg.CacheDir
	if dir == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return "", err
		}
		dir = filepath.Join(cache, "larder")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	binary := filepath.Join(dir, name)
	unlock, err := lock(ctx, binary+".lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(binary); err == nil {
		return binary, nil
	}
	return binary, compile(ctx, module, binary, cfg.Log)
}

func compile(ctx context.Context, module, binary string, log io.Writer) error {
	fmt.Fprintf(log, "building %s, once: %s\n", command, binary)
	partial := binary + ".partial"
	cmd := exec.CommandContext(ctx, "go", "build", "-C", module, "-o", partial, command)
	cmd.Env = append(os.Environ(), "GOFLAGS=", "GOWORK=off")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("go build %s: %w\n%s", command, err, out)
	}
	return os.Rename(partial, binary)
}

var required = regexp.MustCompile(`github\.com/versity/versitygw (v\S+)`)

func binaryName(module string) (string, error) {
	mod, err := os.ReadFile(filepath.Join(module, "go.mod"))
	if err != nil {
		return "", fmt.Errorf("find the gateway's module: %w", err)
	}
	sum, err := os.ReadFile(filepath.Join(module, "go.sum"))
	if err != nil {
		return "", fmt.Errorf("find the gateway's module: %w", err)
	}
	version := required.FindSubmatch(mod)
	if version == nil {
		return "", fmt.Errorf("%s/go.mod requires no versitygw", module)
	}
	return fmt.Sprintf("versitygw-%s-%x", version[1], sha256.Sum256(sum))[:40], nil
}

// lock takes an exclusive lock on path, which it makes, and waits for it as long as ctx lets it.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			f.Close()
			return nil, fmt.Errorf("wait for the lock %s: %w", path, err)
		}
	}
}

// process is a child that dies with us.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended; err is set before
	err  error
}

// startProcess starts cmd from a thread that lives as long as the child: Pdeathsig is sent
// when the thread that forked ends, not when the process does.
func startProcess(cmd *exec.Cmd) (*process, error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p := &process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer close(p.done)
		err := cmd.Start()
		started <- err
		if err == nil {
			p.err = cmd.Wait()
		}
	}()
	return p, <-started
}

func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.done
}

// startGateway starts the gateway on a free loopback port and returns when it answers.
// Another process may take the port between our finding it and the gateway's binding it: then
// the gateway ends, and we try the next.
func startGateway(ctx context.Context, binary string, env []string, log io.Writer, args func(addr string) []string) (*process, string, error) {
	var failures []error
	for range 5 {
		addr, err := freeAddr()
		if err != nil {
			return nil, "", err
		}
		cmd := exec.Command(binary, args(addr)...)
		cmd.Env, cmd.Stdout, cmd.Stderr = env, log, log
		p, err := startProcess(cmd)
		if err != nil {
			return nil, "", err
		}
		err = answers(ctx, p, "http://"+addr+healthPath)
		if err == nil {
			return p, "http://" + addr, nil
		}
		p.kill()
		if ctx.Err() != nil {
			return nil, "", err
		}
		failures = append(failures, err)
	}
	return nil, "", errors.Join(failures...)
}

func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// answers polls, because a process gives no other sign that it listens.
func answers(ctx context.Context, p *process, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-p.done:
			return fmt.Errorf("the gateway ended: %v", p.err)
		default:
		}
		if err := pause(ctx, 10*time.Millisecond); err != nil {
			return fmt.Errorf("wait for the gateway: %w", err)
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// supportsXattr tells whether the gateway can keep metadata beside the objects in dir.
func supportsXattr(dir string) bool {
	const name = "user.larder.probe"
	if unix.Setxattr(dir, name, []byte("1"), 0) != nil {
		return false
	}
	return unix.Removexattr(dir, name) == nil
}
