package sanity

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/domainsocket/shortcircuit"
	"github.com/larderfs/larder/sanity/s3test"
)

// sidecar starts a worker as a container of a user's pod would be: no privilege, a cache that only
// it writes, seen a second time read-only, a folder for its socket, credentials in the environment.
func sidecar(t *testing.T, store *s3test.Server, args ...string) (dir string, cmd *exec.Cmd, log *bytes.Buffer) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "sidecar-") // its user may not enter the tests' own
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	in := func(name string) string { return filepath.Join(dir, name) }
	for _, d := range []string{"cache", "view", "domain", "run"} {
		if err := os.Mkdir(in(d), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(in(d), 185, 185); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(in("cache"), in("view"), "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(in("view"), 0); err != nil {
			t.Error(err)
		}
	})
	if err := unix.Mount("", in("view"), "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	binary, err := os.Open(larderBinary) // user 185 may not enter its folder
	if err != nil {
		t.Fatal(err)
	}
	defer binary.Close()
	log = &bytes.Buffer{}
	cmd = exec.Command("/proc/self/fd/3", append([]string{"worker", "--socket-dir", in("domain"), "--tier", in("cache") + ":1GiB", "--view", in("view"),
		"--metrics-listen", "unix://" + in("run/probe"),
		"--parameter", "source=s3://" + store.Bucket + "/ds", "--parameter", "endpoint=" + store.Endpoint}, args...)...)
	cmd.ExtraFiles, cmd.Stderr = []*os.File{binary}, log
	cmd.Env = []string{"AWS_ACCESS_KEY_ID=" + store.AccessKey, "AWS_SECRET_ACCESS_KEY=" + store.SecretKey}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 185, Gid: 185}}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return dir, cmd, log
}

func TestSidecarServesItsSocketWithoutPrivilege(t *testing.T) {
	store := s3test.Start(t)
	objects := dataset()
	put(t, store, objects)
	dir, cmd, log := sidecar(t, store)
	probe := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, "run/probe"))
	}}}
	eventually(t, "the sidecar is ready", func() bool {
		r, err := probe.Get("http://larder/readyz")
		if err != nil {
			return false
		}
		defer r.Body.Close()
		return r.StatusCode == http.StatusOK
	})
	path, err := shortcircuit.Find(filepath.Join(dir, "domain"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := shortcircuit.Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const name = "year=2026/p0.bin"
	local := false
	eventually(t, "the cached file comes as a descriptor", func() bool {
		f, err := c.Open(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		got, err := io.ReadAll(io.NewSectionReader(f, 0, f.Size()))
		if err != nil || !bytes.Equal(got, objects["ds/"+name]) {
			t.Fatalf("%d bytes, %v; or others than the source's", len(got), err)
		}
		local = f.Local()
		return local
	})
	if _, err := c.Open(t.Context(), "../elsewhere/secret"); err == nil {
		t.Error("the socket names something outside its volume")
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("ended with %v\n%s", err, log)
	}
	if _, err := os.Lstat(path); err == nil {
		t.Error("the socket is left behind")
	}
	if strings.Contains(log.String(), store.SecretKey) {
		t.Error("the log has the key in it")
	}
}

func TestSidecarSaysWhatIsWrong(t *testing.T) {
	store := s3test.Start(t)
	for _, c := range []struct{ arg, want string }{
		{"--parameter=sourc=s3://x", "the nearest known one is source"},
		{"--parameter=binding=node", "binding"},
		{"--parameter=source=s3://no-such-bucket/x", "no-such-bucket"},
	} {
		_, cmd, log := sidecar(t, store, c.arg)
		err := cmd.Wait()
		if err == nil || !strings.Contains(log.String(), c.want) {
			t.Errorf("%s: %v, %s; want %q", c.arg, err, log, c.want)
		}
	}
	out, err := exec.Command(larderBinary, "worker", "--parameter", "source=s3://x").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "--socket-dir") {
		t.Errorf("without a socket: %v %s", err, out)
	}
}

// eventually asks until a deadline: no event tells of another process's state.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(fmt.Sprint("waited in vain until ", what))
		}
	}
}
