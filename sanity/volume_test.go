package sanity

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
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

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/larderfs/larder/cacheworker/domainsocket/shortcircuit"
	"github.com/larderfs/larder/sanity/leak"
	"github.com/larderfs/larder/sanity/s3test"
	"github.com/larderfs/larder/sanity/stack"
)

// shell runs a reader as a child process, which may be killed if a mount hangs.
func shell(t *testing.T, script string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", script)
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func mustShell(t *testing.T, script string) string {
	t.Helper()
	out, err := shell(t, script)
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return out
}

func sum(b []byte) string { h := sha256.Sum256(b); return hex.EncodeToString(h[:]) }

func dataset() map[string][]byte {
	return map[string][]byte{
		"ds/a.csv":            []byte("x,y\n1,2\n"),
		"ds/empty":            {},
		"ds/year=2026/p0.bin": pattern(3<<20+1, 1),
		"ds/year=2026/p1.bin": pattern(1<<20, 2),
		"ds/deep/er/file.txt": []byte("deep\n"),
		"ds/with space/ü":     []byte("name\n"),
		"elsewhere/secret":    []byte("not in the volume\n"),
	}
}

// The main path, with all processes under `larder up` and with each on its own.
func TestVolumeIsReadEveryWay(t *testing.T) {
	store := s3test.Start(t)
	objects := dataset()
	put(t, store, objects)
	for _, form := range []struct {
		name  string
		start func(*testing.T) *stack.Kubelet
	}{
		{"up", func(t *testing.T) *stack.Kubelet { return up(t, "--inline-endpoint", store.Endpoint).Kubelet }},
		{"processes", func(t *testing.T) *stack.Kubelet { return startApart(t, store.Endpoint).Kubelet }},
	} {
		t.Run(form.name, func(t *testing.T) {
			k := form.start(t)
			for _, way := range []struct {
				name string
				in   stack.PublishInput
			}{
				{"claim", bucket(store, "claim", "ds")},
				{"data layout", bucket(store, "data", "ds", "layout", "data")},
				{"inline", inlineOf(bucket(store, "inline", "ds"))},
			} {
				t.Run(way.name, func(t *testing.T) {
					v, target := publish(t, k, way.in)
					checkDataset(t, target, way.in.Parameters["layout"] == "data", objects)
					if err := k.Unpublish(t.Context(), v); err != nil {
						t.Error(err)
					}
					if _, err := os.Lstat(target); err == nil {
						t.Errorf("target %s is still there", target)
					}
				})
			}
		})
	}
}

func inlineOf(in stack.PublishInput) stack.PublishInput { in.Inline = true; return in }

func checkDataset(t *testing.T, target string, dataOnly bool, objects map[string][]byte) {
	t.Helper()
	data := target
	if !dataOnly {
		data += "/data"
		checkSocket(t, target, objects)
	}
	var want []string
	for key, b := range objects {
		if rel, ok := strings.CutPrefix(key, "ds/"); ok {
			want = append(want, sum(b)+"  ./"+rel)
		}
	}
	for range 3 { // cold, complete, passed through
		got := strings.Split(strings.TrimSpace(mustShell(t, "cd '"+data+"' && find . -type f -print0 | xargs -0 sha256sum")), "\n")
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Fatalf("read\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	for _, script := range []string{"echo x > '%s/new'", "echo x >> '%s/a.csv'", "rm -f '%s/a.csv'", "mkdir '%s/new'"} {
		if out, err := shell(t, fmt.Sprintf(script, data)); err == nil || !strings.Contains(out, "Read-only file system") {
			t.Errorf("%s: %v %s", script, err, out)
		}
	}
}

func checkSocket(t *testing.T, target string, objects map[string][]byte) {
	t.Helper()
	path, err := shortcircuit.Find(filepath.Join(target, "domain"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := shortcircuit.Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 2 { // by replies, then by descriptor
		f, err := c.Open(t.Context(), "year=2026/p0.bin")
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(io.NewSectionReader(f, 0, f.Size()))
		if err != nil || !bytes.Equal(got, objects["ds/year=2026/p0.bin"]) {
			t.Errorf("socket gives %d bytes, %v; or others than the source's", len(got), err)
		}
		f.Close()
	}
	if _, err := c.Open(t.Context(), "../elsewhere/secret"); err == nil {
		t.Error("the socket names something outside its volume")
	}
}

// apart is every process on its own, with the sockets in one run directory.
type apart struct {
	*stack.Kubelet
	dir    string
	inline string              // the endpoint that inline volumes may name
	more   map[string][]string // arguments of one process; {dir} stands for dir
	binary map[string]string   // of one process, if not larderBinary
	procs  map[string]*exec.Cmd
	t      *testing.T
}

func startApart(t *testing.T, inlineEndpoint string, more ...string) *apart {
	t.Helper()
	dir, err := os.MkdirTemp("", "apart-")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"run", "tier"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	a := &apart{dir: dir, inline: inlineEndpoint, procs: map[string]*exec.Cmd{}, t: t}
	a.more, a.binary = map[string][]string{}, map[string]string{}
	for i := 0; i < len(more); i += 2 { // process, argument
		a.more[more[i]] = append(a.more[more[i]], more[i+1])
	}
	a.Kubelet = stack.NewKubelet(filepath.Join(dir, "kubelet"), filepath.Join(dir, "run", "ctl.sock"), filepath.Join(dir, "run", "node.sock"))
	t.Cleanup(a.close)
	for _, name := range []string{"master", "node", "worker", "controller"} {
		a.start(name)
	}
	if err := a.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *apart) start(name string) {
	run := filepath.Join(a.dir, "run")
	master := "unix://" + filepath.Join(run, "master.sock")
	args := map[string][]string{
		"master":     {"master", "--dir", filepath.Join(a.dir, "master"), "--listen", master, "--metrics-listen", ""},
		"controller": {"csi", "controller", "--endpoint", "unix://" + filepath.Join(run, "ctl.sock"), "--master", master, "--metrics-listen", ""},
		"node": {"csi", "node", "--endpoint", "unix://" + filepath.Join(run, "node.sock"), "--run-dir", run, "--tier-dir", filepath.Join(a.dir, "tier"),
			"--view", filepath.Join(run, "view"), "--node-name", "n1", "--metrics-listen", "", "--inline-endpoint", a.inline},
		"worker": {"worker", "--run-dir", run, "--view", filepath.Join(run, "view"),
			"--node-name", "n1", "--master", master, "--metrics-listen", "unix://" + filepath.Join(run, "worker-metrics.sock")},
	}[name]
	if name == "worker" { // as its init container would: the view has to be there
		if !slices.ContainsFunc(a.more[name], func(arg string) bool { return strings.HasPrefix(arg, "--tier=") }) {
			args = append(args, "--tier="+filepath.Join(a.dir, "tier")+":4GiB")
		}
		a.await(func() bool { return exec.Command("mountpoint", "-q", filepath.Join(run, "view")).Run() == nil })
	}
	for _, arg := range a.more[name] {
		args = append(args, strings.ReplaceAll(arg, "{dir}", a.dir))
	}
	cmd := exec.Command(cmp.Or(a.binary[name], larderBinary), args...)
	log, err := os.OpenFile(filepath.Join(a.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		a.t.Fatal(err)
	}
	defer log.Close()
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		a.t.Fatal(err)
	}
	a.procs[name] = cmd
}

func (a *apart) await(cond func() bool) {
	for deadline := time.Now().Add(20 * time.Second); !cond(); time.Sleep(5 * time.Millisecond) { // no event tells of a mount
		if time.Now().After(deadline) {
			a.t.Fatal("waited 20 s in vain")
		}
	}
}

func (a *apart) end(name string, sig syscall.Signal) {
	if cmd := a.procs[name]; cmd != nil {
		cmd.Process.Signal(sig)
		cmd.Wait()
		delete(a.procs, name)
	}
}

func (a *apart) close() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := a.UnpublishAll(ctx); err != nil {
		a.t.Error(err)
	}
	a.Kubelet.Close()
	for _, name := range []string{"controller", "node", "worker", "master"} {
		a.end(name, syscall.SIGTERM)
	}
	if a.t.Failed() {
		log, _ := os.ReadFile(filepath.Join(a.dir, "log"))
		a.t.Logf("%s", log[max(0, len(log)-4<<10):])
	}
	if err := leak.Clean(a.dir); err != nil {
		a.t.Error(err)
	}
}

// A worker or a node plugin that is stopped or killed leaves the mounts to the other; the
// master is not on the path of a read.
func TestEachProcessMayGo(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"ds/f": pattern(2<<20, 7), "ds/g": pattern(2<<20, 8)})
	a := startApart(t, store.Endpoint)
	_, target := publish(t, a.Kubelet, bucket(store, "v", "ds"))
	want := sum(pattern(2<<20, 7))
	for _, name := range []string{"worker", "node", "master", "controller"} {
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
			a.end(name, sig)
			if name != "worker" {
				if got := mustShell(t, "sha256sum < "+target+"/data/f"); !strings.HasPrefix(got, want) {
					t.Errorf("without %s: read %s", name, got)
				}
			}
			a.start(name)
			if got := mustShell(t, "cat "+target+"/data/g > /dev/null; sha256sum < "+target+"/data/f"); !strings.HasPrefix(got, want) {
				t.Errorf("after %s came back: read %s", name, got)
			}
			if err := a.WaitReady(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// A master that has lost everything learns the workers and the published volumes again.
func TestMasterForgetsEverything(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"ds/f": pattern(1<<20, 7)})
	a := startApart(t, store.Endpoint)
	v, _ := publish(t, a.Kubelet, bucket(store, "v", "ds"))
	a.end("master", syscall.SIGKILL)
	if err := os.RemoveAll(filepath.Join(a.dir, "master")); err != nil {
		t.Fatal(err)
	}
	a.start("master")
	if err := a.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctl, err := a.Controller()
	if err != nil {
		t.Fatal(err)
	}
	a.await(func() bool {
		r, err := ctl.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
		return err == nil && len(r.GetEntries()) == 1 && r.GetEntries()[0].GetVolume().GetVolumeId() == v.ID
	})
	again, err := a.CreateVolume(t.Context(), v.PublishInput) // what a provisioner that was restarted asks
	if err != nil || again.ID != v.ID {
		t.Errorf("create again: %v, %v; want volume %s", again, err, v.ID)
	}
}

// Stopped and started again on the same directory, what was published can be unpublished.
func TestRestartOnTheSameDirectory(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"ds/f": pattern(2<<20, 7)})
	s := up(t)
	v, target := publish(t, s.Kubelet, bucket(store, "v", "ds"))
	mustShell(t, "cat "+target+"/data/f > /dev/null")
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if m := leak.Mounts(filepath.Dir(s.Dir())); len(m) != 0 {
		t.Errorf("larder up left mounts: %v", m)
	}
	if err := s.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Unpublish(t.Context(), v); err != nil {
		t.Error(err)
	}
	store.ResetCounts()
	_, target = publish(t, s.Kubelet, bucket(store, "w", "ds"))
	if got := mustShell(t, "sha256sum < "+target+"/data/f"); !strings.HasPrefix(got, sum(pattern(2<<20, 7))) {
		t.Errorf("read %s", got)
	}
	if n := store.Counts().Get; n != 0 {
		t.Errorf("%d GETs of what was cached before the restart", n)
	}
}
