package sanity

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/sanity/leak"
	"github.com/larderfs/larder/sanity/s3test"
)

// opened is a child process that has a file open and reads it to its end when it is told to.
type opened struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func open(t *testing.T, file string) *opened {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "sh", "-c", `exec 3< "$0"; echo open; read _; sha256sum <&3`, file)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	o := &opened{cmd, in, bufio.NewReader(out)}
	if line, err := o.out.ReadString('\n'); err != nil || line != "open\n" {
		t.Fatalf("open %s: %q, %v", file, line, err)
	}
	return o
}

func (o *opened) read() (string, error) {
	fmt.Fprintln(o.in)
	line, _ := o.out.ReadString('\n')
	return line, o.cmd.Wait()
}

// Passthrough handles keep reading, and close, while no worker runs at all.
func TestPassthroughReaderNeedsNoWorker(t *testing.T) {
	store := s3test.Start(t)
	big := make([]byte, 1<<30)
	copy(big, pattern(1<<20, 5))
	for n := 1 << 20; n < len(big); n *= 2 {
		copy(big[n:], big[:n])
	}
	want := sum(big)
	put(t, store, map[string][]byte{"ds/big": big})
	a := startApart(t, store.Endpoint)
	_, target := publish(t, a.Kubelet, bucket(store, "v", "ds"))
	mustShell(t, "cat "+target+"/data/big > /dev/null; cat "+target+"/data/big > /dev/null")
	a.await(func() bool { // what was read is written to the cache a little later
		b := make([]byte, 32)
		n, err := unix.Getxattr(target+"/data/big", "user.larder.cached", b)
		return err == nil && string(b[:n]) == fmt.Sprint(len(big))
	})
	o := open(t, target+"/data/big")
	a.end("worker", syscall.SIGKILL)
	if got, err := o.read(); err != nil || !strings.HasPrefix(got, want) {
		t.Errorf("read without a worker: %q, %v", got, err)
	}
	a.start("worker")
	if err := a.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// Both holders of a mount's descriptors die: the mount is dead by nature. A new reader is
// served within five seconds, and nothing is stacked or leaked.
func TestBothHoldersDie(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"ds/f": pattern(2<<20, 7)})
	want := sum(pattern(2<<20, 7))
	a := startApart(t, store.Endpoint)
	v, target := publish(t, a.Kubelet, bucket(store, "v", "ds"))
	rounds := 100
	if testing.Short() {
		rounds = 3
	}
	before := mountsOf(t, a.dir)
	var worst time.Duration
	for range rounds {
		mustShell(t, "cat "+target+"/data/f > /dev/null")
		a.end("node", syscall.SIGKILL)
		a.end("worker", syscall.SIGKILL)
		start := time.Now()
		a.start("node")
		a.start("worker")
		if err := a.WaitReady(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := a.PublishPod(t.Context(), v, "v"); err != nil { // the kubelet's republish
			t.Fatal(err)
		}
		if got := mustShell(t, "sha256sum < "+target+"/data/f"); !strings.HasPrefix(got, want) {
			t.Fatalf("read %s", got)
		}
		worst = max(worst, time.Since(start))
	}
	t.Logf("%d rounds; a new reader was served after at most %v", rounds, worst)
	if worst > 5*time.Second {
		t.Errorf("a new reader was served after %v", worst)
	}
	if after := mountsOf(t, a.dir); after != before {
		t.Errorf("mounts before:\n%s\nafter:\n%s", before, after)
	}
}

func mountsOf(t *testing.T, dir string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for line := range strings.SplitSeq(string(b), "\n") {
		if f := strings.Fields(line); len(f) > 5 && strings.Contains(line, dir) {
			out = append(out, f[3]+" "+f[4]+" "+f[5])
		}
	}
	return strings.Join(out, "\n")
}

// status is what larder status says of who holds the mounts.
type status struct {
	UUID           string
	BrokerPID      int
	ResentRequests int
	Mounts         []struct {
		Worker              string
		WorkerPID           int
		Since, WorkerSince  time.Time
		Served              bool
		Takeovers           int
		LongestStallSeconds float64
		Without             []string
	}
}

func (a *apart) status() (s status) {
	a.t.Helper()
	out, err := exec.CommandContext(a.t.Context(), larderBinary, "status", "--run-dir", filepath.Join(a.dir, "run"), "-o", "json").Output()
	if err == nil {
		err = json.Unmarshal(out, &s)
	}
	if err != nil {
		a.t.Fatalf("larder status: %v: %s", err, out)
	}
	return s
}

// A worker that never returns: reads end with an error after the deadline, readers that were
// killed meanwhile end, and the volume is unpublished.
func TestWorkerNeverReturns(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"ds/f": pattern(2<<20, 7), "ds/g": pattern(2<<20, 8)})
	a := startApart(t, store.Endpoint, "node", "--takeover-deadline=2s")
	v, target := publish(t, a.Kubelet, bucket(store, "v", "ds"))
	mustShell(t, "cat "+target+"/data/f > /dev/null")
	a.end("worker", syscall.SIGKILL)
	killed := exec.Command("cat", target+"/data/g")
	if err := killed.Start(); err != nil {
		t.Fatal(err)
	}
	if err := killed.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	out, err := shell(t, "cat "+target+"/data/g")
	if err == nil || strings.Contains(err.Error(), "killed") {
		t.Errorf("a read without a worker: %v; want an I/O error after the deadline", err)
	}
	t.Logf("the read ended with: %s", out)
	killed.Wait() // does not return while it is blocked in the mount
	if err := a.UnpublishPod(t.Context(), v, target); err != nil {
		t.Error(err)
	}
	if err := a.Unstage(t.Context(), v); err != nil {
		t.Error(err)
	}
	if m := leak.Mounts(filepath.Join(a.dir, "kubelet")); len(m) > 0 {
		t.Errorf("left mounted: %v", m)
	}
	a.start("worker")
	if err := a.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// metric is the value of one of the worker's.
func metric(t *testing.T, dir, name string) (value float64) {
	t.Helper()
	r, err := askWorker(dir, "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	for lines := bufio.NewScanner(r.Body); lines.Scan(); {
		if n, _ := fmt.Sscanf(lines.Text(), name+" %g", &value); n == 1 {
			return value
		}
	}
	t.Fatalf("the worker has no metric %s", name)
	return 0
}

// A take-over is told: in the status, in the metrics and in the log.
func TestATakeOverIsTold(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"ds/f": pattern(2<<20, 7)})
	a := startApart(t, store.Endpoint)
	_, target := publish(t, a.Kubelet, bucket(store, "v", "ds"))
	store.SetHook(s3test.Times(1, s3test.Get, s3test.Stall(1)))
	read := make(chan string, 1)
	go func() {
		out, err := shell(t, "sha256sum < "+target+"/data/f")
		read <- fmt.Sprint(out, err)
	}()
	a.await(func() bool { // the READ is at the worker
		return slices.ContainsFunc(store.Requests(), func(r s3test.Request) bool { return r.Key == "ds/f" && r.Kind == s3test.Get })
	})
	a.end("worker", syscall.SIGKILL)
	if m := a.status().Mounts[0]; m.Served || m.Worker != "" || m.WorkerSince.IsZero() {
		t.Errorf("without a worker: %+v", m)
	}
	store.SetHook(nil)
	a.start("worker")
	if got := <-read; !strings.HasPrefix(got, sum(pattern(2<<20, 7))) {
		t.Errorf("the read ended with %s", got)
	}
	a.await(func() bool { return a.status().Mounts[0].Takeovers == 1 }) // the read goes on before it is noted
	s := a.status()
	if m := s.Mounts[0]; s.ResentRequests == 0 || !m.Served || m.Takeovers != 1 || m.LongestStallSeconds <= 0 || len(m.Without) != 0 {
		t.Errorf("after the take-over: %+v", s)
	}
	if got := metric(t, a.dir, "larder_resent_requests_total"); got != float64(s.ResentRequests) {
		t.Errorf("%v resent requests, the status says %d", got, s.ResentRequests)
	}
	log, err := os.ReadFile(filepath.Join(a.dir, "log"))
	for _, want := range []string{"msg=take-over process=node volume=", "answers what an earlier worker left"} {
		if err != nil || !strings.Contains(string(log), want) {
			t.Errorf("the log does not say %q: %v", want, err)
		}
	}
}

// Without RESEND a request in flight at a SIGKILL hangs until the deadline; everything else
// goes on, and the log says which guarantee is weaker.
func TestKernelWithoutResend(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"ds/f": pattern(2<<20, 7), "ds/g": pattern(2<<20, 8)})
	a := startApart(t, store.Endpoint, "worker", "--no-resend", "worker", "--no-passthrough", "node", "--takeover-deadline=5s")
	v, target := publish(t, a.Kubelet, bucket(store, "v", "ds"))
	f := open(t, target+"/data/f")
	a.end("worker", syscall.SIGKILL)
	a.start("worker")
	if got, err := f.read(); err != nil || !strings.HasPrefix(got, sum(pattern(2<<20, 7))) {
		t.Errorf("a file that was open: %q, %v", got, err)
	}
	a.await(func() bool { return a.status().Mounts[0].Takeovers == 1 }) // the read goes on before it is noted
	if s := a.status(); s.BrokerPID != a.procs["node"].Process.Pid || len(s.Mounts) != 1 {
		t.Errorf("status: %+v; the broker is %d", s, a.procs["node"].Process.Pid)
	} else if m := s.Mounts[0]; m.Worker != s.UUID || m.WorkerPID != a.procs["worker"].Process.Pid || m.Takeovers != 1 ||
		m.LongestStallSeconds <= 0 || m.WorkerSince.Before(m.Since) || !slices.Equal(m.Without, []string{"passthrough", "resend"}) {
		t.Errorf("after a take-over by %d: %+v", a.procs["worker"].Process.Pid, s)
	}
	held := make(chan error, 1)
	store.SetHook(s3test.Times(1, s3test.Get, s3test.Stall(1)))
	go func() {
		_, err := shell(t, "cat "+target+"/data/g")
		held <- err
	}()
	a.await(func() bool { // the READ is at the worker
		for _, r := range store.Requests() {
			if r.Key == "ds/g" {
				return true
			}
		}
		return false
	})
	a.end("worker", syscall.SIGKILL)
	store.SetHook(nil)
	a.start("worker")
	if got := mustShell(t, "sha256sum < "+target+"/data/f"); !strings.HasPrefix(got, sum(pattern(2<<20, 7))) {
		t.Errorf("beside a lost request: read %s", got)
	}
	select {
	case err := <-held:
		t.Fatalf("the lost request was answered before the deadline: %v", err)
	default:
	}
	if err := <-held; err == nil || strings.Contains(err.Error(), "killed") {
		t.Errorf("the lost request ended with %v; want an error when the mount is aborted", err)
	}
	if out, err := shell(t, "ls "+target+"/data"); err == nil {
		t.Errorf("the mount was not aborted: %s", out)
	}
	log, err := os.ReadFile(filepath.Join(a.dir, "log"))
	for _, want := range []string{"without resend", "without passthrough"} {
		if err != nil || !strings.Contains(string(log), want) {
			t.Errorf("the log does not say %q: %v", want, err)
		}
	}
	if _, err := a.PublishPod(t.Context(), v, "v"); err != nil { // as after the death of both
		t.Fatal(err)
	}
	if got := mustShell(t, "sha256sum < "+target+"/data/g"); !strings.HasPrefix(got, sum(pattern(2<<20, 8))) {
		t.Errorf("after a new publish: read %s", got)
	}
}
