package sanity

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/workerpb"
	"github.com/larderfs/larder/sanity/s3test"
	"github.com/larderfs/larder/sanity/stack"
)

var handovers = flag.Int("handovers", 0, "planned hand-overs in a row, and as long a time without; 0 is a few")

// loopsEnv makes this binary a process of readers.
const loopsEnv = "LARDER_SANITY_LOOPS"

// gaps is the longest that one operation of each reader took, since they were asked last.
type gaps map[string]time.Duration

// loop is a reader that does one thing again and again.
type loop struct {
	name string
	once func(data string, n int) error

	mu      sync.Mutex // guards the fields below
	began   time.Time  // of the operation under way
	longest time.Duration
}

// readers are the loops of the process; each operation is checked against what the file must hold.
func readers() []*loop {
	return []*loop{
		{name: "open", once: func(data string, n int) error { // and read, and close
			i := n % warmFiles
			return expect(filepath.Join(data, warmName(i)), 0, pattern(warmBytes, uint64(i)), 0)
		}},
		{name: "worker", once: func(data string, n int) error { // each READ goes to the worker and is in its cache
			off := n * 7 * 4096 % (coldBytes / 2) &^ 4095
			return expect(filepath.Join(data, "half"), unix.O_DIRECT, coldContent()[off:off+4096], int64(off))
		}},
		{name: "readdir", once: func(data string, _ int) error {
			es, err := os.ReadDir(data)
			if err == nil && len(es) != warmFiles+2 {
				err = fmt.Errorf("%d entries in %s, want %d", len(es), data, warmFiles+2)
			}
			return err
		}},
		{name: "stat", once: func(data string, n int) error { // of what is not there: each goes to the worker
			if _, err := os.Lstat(filepath.Join(data, fmt.Sprint("none-", n))); !os.IsNotExist(err) {
				return fmt.Errorf("look up what is not there: %v", err)
			}
			return nil
		}},
	}
}

const (
	warmFiles = 40
	warmBytes = 300 << 10
	coldBytes = 8 << 20
)

func warmName(i int) string { return fmt.Sprintf("warm-%02d", i) }

var coldContent = sync.OnceValue(func() []byte { return pattern(coldBytes, 77) })

func expect(path string, flags int, want []byte, off int64) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	b := aligned(len(want))
	for n := 0; n < len(b); {
		k, err := unix.Pread(fd, b[n:], off+int64(n))
		if err != nil || k == 0 {
			return fmt.Errorf("read %s at %d: %d bytes, %v", path, off+int64(n), k, err)
		}
		n += k
	}
	if !bytes.Equal(b, want) {
		return fmt.Errorf("%s at %d: wrong bytes", path, off)
	}
	return nil
}

// aligned is a buffer for O_DIRECT.
func aligned(n int) []byte {
	b := make([]byte, n+4096)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & 4095
	return b[skip : skip+n]
}

func (l *loop) run(data string, failed func(error)) {
	n := 0
	for range time.Tick(time.Millisecond) { // all at full speed would measure the scheduler
		n++
		start := time.Now()
		l.mu.Lock()
		l.began = start
		l.mu.Unlock()
		err := l.once(data, n)
		l.mu.Lock()
		l.longest = max(l.longest, time.Since(start))
		l.began = time.Time{}
		l.mu.Unlock()
		if err != nil {
			failed(fmt.Errorf("%s: %w", l.name, err))
			return
		}
	}
}

// take is the longest operation since the last call; one under way counts as far as it is.
func (l *loop) take() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	d := l.longest
	if !l.began.IsZero() {
		d = max(d, time.Since(l.began))
	}
	l.longest = 0
	return d
}

// runLoops is the main function of the readers. It answers each byte on its standard input with
// the gaps since the one before, and ends with it.
func runLoops(data string) {
	loops := readers()
	for _, l := range loops {
		go l.run(data, func(err error) {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		})
	}
	out := json.NewEncoder(os.Stdout)
	for b := make([]byte, 1); ; {
		if _, err := os.Stdin.Read(b); err != nil {
			os.Exit(0)
		}
		g := gaps{}
		for _, l := range loops {
			g[l.name] = l.take()
		}
		out.Encode(g)
	}
}

// loops is the test's end of them.
type loops struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *json.Decoder
}

func startLoops(t *testing.T, data string) *loops {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^$")
	cmd.Env = append(os.Environ(), loopsEnv+"="+data)
	var diag bytes.Buffer
	cmd.Stderr = &diag
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	l := &loops{t, cmd, in, json.NewDecoder(out)}
	t.Cleanup(func() {
		in.Close()
		cmd.Process.Kill()
		cmd.Wait()
		if diag.Len() > 0 {
			t.Errorf("readers: %s", diag.String())
		}
	})
	return l
}

func (l *loops) take() gaps {
	l.t.Helper()
	fmt.Fprint(l.in, ".")
	var g gaps
	if err := l.out.Decode(&g); err != nil {
		l.t.Fatalf("the readers have ended: %v", err)
	}
	return g
}

func putLoops(t *testing.T, store *s3test.Server) {
	t.Helper()
	objects := map[string][]byte{"ds/half": coldContent(), "ds/later": pattern(coldBytes, 99)}
	for i := range warmFiles {
		objects["ds/"+warmName(i)] = pattern(warmBytes, uint64(i))
	}
	put(t, store, objects)
}

// publishLoops publishes what the loops read and fills the cache as they want it.
func publishLoops(t *testing.T, store *s3test.Server, k *stack.Kubelet) (data string) {
	t.Helper()
	_, target := publish(t, k, bucket(store, "v", "ds", "complete", "never", "freshness", "1h"))
	data = target + "/data"
	mustShell(t, fmt.Sprintf("cd %s && cat warm-* warm-* >/dev/null && head -c %d half >/dev/null && cat warm-* >/dev/null", data, coldBytes/2))
	return data
}

// A worker that is replaced as planned: readers see no error, and nearly no stall.
func TestPlannedHandOver(t *testing.T) {
	store := s3test.Start(t)
	putLoops(t, store)
	s := up(t)
	data := publishLoops(t, store, s.Kubelet)
	rounds := *handovers
	if rounds == 0 {
		rounds = 5
	}
	l := startLoops(t, data)
	var quiet, handed []gaps
	for range rounds {
		pid, _ := serving(t, s.Dir())
		l.take()
		if err := syscall.Kill(s.PID(), syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		eventually(t, "another worker serves", func() bool {
			now, volumes := serving(t, s.Dir())
			return now != 0 && now != pid && volumes == 1
		})
		took := time.Since(start)
		handed = append(handed, l.take())
		<-time.After(took) // the same time without: what the machine alone does
		quiet = append(quiet, l.take())
	}
	for _, name := range []string{"open", "worker", "readdir", "stat"} {
		t.Logf("longest %-8s over %d hand-overs %s; without %s", name, rounds, quantiles(of(handed, name)), quantiles(of(quiet, name)))
	}
	st, err := s.Status(t.Context())
	if err != nil || st.Takeovers != int64(rounds) {
		t.Errorf("%d take-overs, want %d: %v", st.Takeovers, rounds, err)
	}
	log, err := os.ReadFile(s.Log())
	if err != nil || strings.Contains(string(log), "level=ERROR") {
		t.Errorf("errors in the log: %v", err)
	}
	var stalls []time.Duration
	for _, m := range regexp.MustCompile(`msg=take-over .* stall=(\S+)`).FindAllStringSubmatch(string(log), -1) {
		d, err := time.ParseDuration(m[1])
		if err != nil {
			t.Error(err)
		}
		stalls = append(stalls, d)
	}
	t.Logf("from the end of one process to the answers of the other: %s", quantiles(stalls))
}

// What dies or hangs in the middle of a hand-over costs no mount and no reader an error. The broker
// is stopped, so that the middle lasts.
func TestHandOverThatFails(t *testing.T) {
	store := s3test.Start(t)
	putLoops(t, store)
	a := startApart(t, store.Endpoint)
	data := publishLoops(t, store, a.Kubelet)
	l := startLoops(t, data)
	for _, c := range []struct {
		name string
		do   func(t *testing.T, elder, heir *exec.Cmd)
	}{
		{"the heir is killed", func(t *testing.T, elder, heir *exec.Cmd) {
			a.end("worker", syscall.SIGKILL)
			a.signal("node", syscall.SIGCONT)
			if err := elder.Wait(); err == nil {
				t.Error("the elder ends as if all were well")
			}
			a.start("worker")
		}},
		{"the elder is killed", func(t *testing.T, elder, heir *exec.Cmd) {
			elder.Process.Kill()
			elder.Wait()
			a.signal("node", syscall.SIGCONT)
		}},
		{"the elder is stopped in order", func(t *testing.T, elder, heir *exec.Cmd) {
			elder.Process.Signal(syscall.SIGTERM)
			elder.Wait()
			a.signal("node", syscall.SIGCONT)
		}},
		{"the broker is killed", func(t *testing.T, elder, heir *exec.Cmd) {
			a.end("node", syscall.SIGKILL)
			a.start("node")
			if err := elder.Wait(); err != nil {
				t.Errorf("the elder ends with %v", err)
			}
		}},
		{"the broker and the heir are killed", func(t *testing.T, elder, heir *exec.Cmd) {
			a.end("node", syscall.SIGKILL)
			a.end("worker", syscall.SIGKILL)
			a.start("node") // to which the elder gives back what it holds before it ends
			if err := elder.Wait(); err == nil {
				t.Error("the elder ends as if all were well")
			}
			a.start("worker")
		}},
		{"the broker and the elder are killed", func(t *testing.T, elder, heir *exec.Cmd) {
			elder.Process.Signal(syscall.SIGSTOP)
			a.signal("node", syscall.SIGCONT)
			eventually(t, "the heir is fed", func() bool { return descriptors(heir.Process.Pid, "/dev/fuse") == 2 }) // received, and where INIT came from
			a.end("node", syscall.SIGKILL)
			elder.Process.Kill()
			elder.Wait()
			eventually(t, "the heir serves without a broker", func() bool {
				_, volumes := serving(t, a.dir)
				return volumes == 1
			})
			a.start("node")
		}},
		{"nothing", func(t *testing.T, elder, heir *exec.Cmd) {
			a.signal("node", syscall.SIGCONT)
			if err := elder.Wait(); err != nil {
				t.Errorf("the elder ends with %v", err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			eventually(t, "the worker is connected to its broker", func() bool { return ready(a.dir) })
			elder := a.procs["worker"]
			a.signal("node", syscall.SIGSTOP)
			t.Cleanup(func() { a.signal("node", syscall.SIGCONT) })
			a.start("worker")
			heir := a.procs["worker"]
			eventually(t, "the heir has the cache", func() bool {
				pid, _ := serving(t, a.dir)
				return pid == heir.Process.Pid
			})
			c.do(t, elder, heir)
			eventually(t, "the last worker serves", func() bool {
				pid, volumes := serving(t, a.dir)
				return pid == a.procs["worker"].Process.Pid && volumes == 1
			})
			l.take()
			mustShell(t, "cd "+data+" && cat later half warm-* > /dev/null")
		})
	}
}

// A worker that has handed over and is started again, as a kubelet does until its pod is deleted, does
// not ask for the cache back. It waits for the end of the other one.
func TestTheElderDoesNotComeBack(t *testing.T) {
	store := s3test.Start(t)
	putLoops(t, store)
	a := startApart(t, store.Endpoint, "worker", "--instance=old")
	data := publishLoops(t, store, a.Kubelet)
	elder := a.procs["worker"]
	a.more["worker"] = []string{"--instance=new"}
	a.start("worker")
	if err := elder.Wait(); err != nil {
		t.Errorf("the elder ends with %v", err)
	}
	heir := a.procs["worker"]
	eventually(t, "the heir is ready", func() bool { return ready(a.dir) })
	a.more["worker"] = []string{"--instance=old"}
	a.start("worker")
	eventually(t, "the elder is refused", func() bool {
		log, err := os.ReadFile(filepath.Join(a.dir, "log"))
		return err == nil && strings.Contains(string(log), "has handed over to this one")
	})
	if pid, volumes := serving(t, a.dir); pid != heir.Process.Pid || volumes != 1 {
		t.Errorf("process %d serves %d volumes, want %d and 1", pid, volumes, heir.Process.Pid)
	}
	heir.Process.Kill()
	heir.Wait()
	mustShell(t, "cat "+data+"/later > /dev/null") // the elder serves
}

// ready asks the worker's readiness.
func ready(dir string) bool {
	r, err := askWorker(dir, "/readyz")
	if err != nil {
		return false
	}
	r.Body.Close()
	return r.StatusCode == http.StatusOK
}

// askWorker asks the worker over HTTP.
func askWorker(dir, path string) (*http.Response, error) {
	c := http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return brokerwire.DialStream(ctx, filepath.Join(dir, "run", "worker-metrics.sock"))
		}}}
	return c.Get("http://worker" + path)
}

func descriptors(pid int, path string) (n int) {
	dir := fmt.Sprintf("/proc/%d/fd/", pid)
	fds, _ := os.ReadDir(dir)
	for _, fd := range fds {
		if to, _ := os.Readlink(dir + fd.Name()); to == path {
			n++
		}
	}
	return n
}

func (a *apart) signal(name string, sig syscall.Signal) {
	a.t.Helper()
	if err := a.procs[name].Process.Signal(sig); err != nil {
		a.t.Fatal(err)
	}
}

func of(all []gaps, name string) (ds []time.Duration) {
	for _, g := range all {
		ds = append(ds, g[name])
	}
	return ds
}

func quantiles(ds []time.Duration) string {
	slices.Sort(ds)
	if len(ds) == 0 {
		return "unknown"
	}
	return fmt.Sprintf("p50 %v, max %v", ds[len(ds)/2].Round(100*time.Microsecond), ds[len(ds)-1].Round(100*time.Microsecond))
}

// serving asks the worker that the run directory leads to who it is and how many volumes it serves; 0 and 0 while
// there is none.
func serving(t *testing.T, dir string) (pid, volumes int) {
	t.Helper()
	st := workerStatus(t, dir)
	return int(st.GetPid()), len(st.GetVolumes())
}

// workerStatus is nil while there is no worker.
func workerStatus(t *testing.T, dir string) *workerpb.WorkerStatus {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///worker", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return brokerwire.DialStream(ctx, filepath.Join(dir, "run", "worker.sock"))
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	st, err := workerpb.NewWorkerClient(conn).Status(t.Context(), &workerpb.StatusRequest{})
	if err != nil {
		return nil
	}
	return st
}
