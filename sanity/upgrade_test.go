package sanity

import (
	"bufio"
	"bytes"
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

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/sanity/s3test"
	"github.com/larderfs/larder/sanity/stack"
)

// What the next release may do that this one does not know: ask the kernel for more, speak another
// version, say more in a message, and note more of a mount.
var nextRelease = map[string][][2]string{
	"cacheworker/brokerwire/wire.go": {
		{"Version = 1 //", "Version = 2 //"},
		{"type Message struct {\n", "type Message struct {\n\tNext []int `json:\"next,omitempty\"`\n"},
		{"func encode(m Message) ([]byte, error) {\n", `func encode(m Message) ([]byte, error) {
	m.Next = []int{1, 2}
	if m.Volume != nil {
		v := *m.Volume
		v.Next = "of the next release"
		m.Volume = &v
	}
`},
	},
	"cacheworker/brokerwire/volume.go": {
		{"type Volume struct {\n", "type Volume struct {\n\tNext string `json:\"next,omitempty\"`\n"},
	},
	"cacheworker/brokerwire/state.go": {
		{"type State struct {\n", "type State struct {\n\tNext []string `json:\"next,omitempty\"`\n"},
		{"func WriteState(f *os.File, s State) error {\n", "func WriteState(f *os.File, s State) error {\n\ts.Next = []string{\"more\"}\n"},
	},
	"cacheworker/fusefs/serve.go": {
		{"maxRequest    = 1 << 20", "maxRequest    = 2 << 20"},
		{"ExtraCapabilities: fuse.CAP_HAS_RESEND", "ExtraCapabilities: fuse.CAP_HAS_EXPIRE_ONLY | fuse.CAP_HAS_RESEND"},
	},
	"cacheworker/fusefs/table.go": { // a record of a kind that this release does not know, behind each node's
		{"\treturn seal(b, start)\n}\n\nfunc countRecord", "\treturn countRecord(seal(b, start), 'Z', n.id, 7)\n}\n\nfunc countRecord"},
	},
}

// nextBinary is made once; see buildNext.
var nextBinary string

// buildNext compiles the next release: this one's source with those changes.
func buildNext(t *testing.T) string {
	t.Helper()
	if nextBinary != "" {
		return nextBinary
	}
	dir := filepath.Dir(larderBinary)
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	overlay := map[string]string{}
	for name, changes := range nextRelease {
		b, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		src := string(b)
		for _, c := range changes {
			if strings.Count(src, c[0]) != 1 {
				t.Fatalf("%s: %q is there %d times", name, c[0], strings.Count(src, c[0]))
			}
			src = strings.Replace(src, c[0], c[1], 1)
		}
		changed := filepath.Join(dir, strings.ReplaceAll(name, "/", "-"))
		if err := os.WriteFile(changed, []byte(src), 0o644); err != nil {
			t.Fatal(err)
		}
		overlay[filepath.Join(root, name)] = changed
	}
	b, err := json.Marshal(map[string]any{"Replace": overlay})
	if err != nil {
		t.Fatal(err)
	}
	file, binary := filepath.Join(dir, "overlay.json"), filepath.Join(dir, "larder-next")
	if err := os.WriteFile(file, b, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := stack.Build(t.Context(), binary, "-overlay", file, "-ldflags", "-X main.version=next"); err != nil {
		t.Fatal(err)
	}
	nextBinary = binary
	return binary
}

// holderEnv makes this binary a process that holds on to what it has once opened.
const holderEnv = "LARDER_SANITY_HOLDER"

const (
	heldBytes = 8 << 20
	manyFiles = 300
)

func heldContent(name string) []byte { return pattern(heldBytes, uint64(name[0])) }

func manyName(i int) string { return fmt.Sprintf("%04d-%s", i, strings.Repeat("n", i%50)) }

// holder is an open file, one that is passed through, mappings of both, a folder read in part, and
// a current directory.
type holder struct {
	open, pass int
	maps       map[string][]byte
	folder     int
	seen       []string
	at         int64 // bytes further on are still unread
}

func hold(data string) (*holder, error) {
	h := &holder{maps: map[string][]byte{}}
	for name, fd := range map[string]*int{"open": &h.open, "pass": &h.pass, "many": &h.folder} {
		var err error
		if *fd, err = unix.Open(filepath.Join(data, name), unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return nil, fmt.Errorf("open %s: %w", name, err)
		}
		if name == "many" {
			continue
		}
		if h.maps[name], err = unix.Mmap(*fd, 0, heldBytes, unix.PROT_READ, unix.MAP_SHARED); err != nil {
			return nil, fmt.Errorf("map %s: %w", name, err)
		}
	}
	return h, os.Chdir(filepath.Join(data, "cwd"))
}

// check reads on everywhere.
func (h *holder) check() error {
	const step = 200_000 // no read-ahead reaches that far
	if h.at += step; h.at+step > heldBytes {
		return fmt.Errorf("there is nothing unread left")
	}
	b := make([]byte, 5000)
	for name, fd := range map[string]int{"open": h.open, "pass": h.pass} {
		want := heldContent(name)[h.at : h.at+int64(len(b))]
		if n, err := unix.Pread(fd, b, h.at); err != nil || n != len(b) || !bytes.Equal(b, want) {
			return fmt.Errorf("read of %s at %d: %d bytes, %v, wrong ones: %v", name, h.at, n, err, !bytes.Equal(b, want))
		}
		off := h.at + step/2
		if want := heldContent(name)[off : off+int64(len(b))]; !bytes.Equal(h.maps[name][off:off+int64(len(b))], want) {
			return fmt.Errorf("mapping of %s at %d: wrong bytes", name, off)
		}
	}
	if got, err := os.ReadFile("file"); err != nil || string(got) != "in the current directory" {
		return fmt.Errorf("file in the current directory: %q, %v", got, err)
	}
	return h.readOn()
}

// readOn reads one buffer of the folder; at its end it must have seen all, once.
func (h *holder) readOn() error {
	b := make([]byte, 1<<10)
	n, err := unix.ReadDirent(h.folder, b)
	if err != nil {
		return fmt.Errorf("read the folder on: %w", err)
	}
	_, _, h.seen = unix.ParseDirent(b[:n], -1, h.seen)
	if n > 0 {
		return nil
	}
	return h.sawAll()
}

func (h *holder) sawAll() error {
	var want []string
	for i := range manyFiles {
		want = append(want, manyName(i))
	}
	slices.Sort(h.seen)
	if !slices.Equal(h.seen, want) {
		return fmt.Errorf("a folder that was read while its server was replaced: %d names, want %d", len(h.seen), len(want))
	}
	return nil
}

// runHolder is the main function of the holder. It answers each line with a line: what is wrong,
// or nothing. "end" reads the folder to its end.
func runHolder(data string) {
	h, err := hold(data)
	answer := func(err error) {
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println()
	}
	answer(err)
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		if in.Text() != "end" {
			answer(h.check())
			continue
		}
		seen := -1
		for err == nil && len(h.seen) > seen {
			seen = len(h.seen)
			err = h.readOn()
		}
		answer(err)
	}
	os.Exit(0)
}

// held is the test's end of it.
type held struct {
	t   *testing.T
	in  io.Writer
	out *bufio.Reader
}

func startHolder(t *testing.T, data string) *held {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^$")
	cmd.Env = append(os.Environ(), holderEnv+"="+data)
	cmd.Stderr = os.Stderr
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
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	h := &held{t, in, bufio.NewReader(out)}
	h.answer("opened")
	return h
}

func (h *held) answer(when string) {
	h.t.Helper()
	line, err := h.out.ReadString('\n')
	if err != nil || line != "\n" {
		h.t.Fatalf("%s: %s %v", when, line, err)
	}
}

func (h *held) check(when string) {
	h.t.Helper()
	fmt.Fprintln(h.in, "check")
	h.answer(when)
}

func (h *held) end() {
	h.t.Helper()
	fmt.Fprintln(h.in, "end")
	h.answer("at the end")
}

// Worker and broker are replaced one after the other by the next release, and back, after a kill
// and as planned: readers see neither an error nor wrong bytes, whichever pair is at work.
func TestUpgradeAndBack(t *testing.T) {
	store := s3test.Start(t)
	objects := map[string][]byte{"ds/cwd/file": []byte("in the current directory"), "ds/open": heldContent("open"), "ds/pass": heldContent("pass")}
	for i := range manyFiles {
		objects["ds/many/"+manyName(i)] = nil
	}
	put(t, store, objects)
	next := buildNext(t)
	a := startApart(t, store.Endpoint)
	_, target := publish(t, a.Kubelet, bucket(store, "v", "ds", "complete", "never"))
	data := target + "/data"
	mustShell(t, "cat "+data+"/pass > /dev/null")
	a.await(func() bool {
		b := make([]byte, 32)
		n, err := unix.Getxattr(data+"/pass", "user.larder.cached", b)
		return err == nil && string(b[:n]) == fmt.Sprint(heldBytes)
	})
	h := startHolder(t, data)
	h.check("before")

	worker := func(binary string, planned bool) func() {
		return func() {
			a.binary["worker"] = binary
			elder := a.procs["worker"]
			if !planned {
				a.end("worker", syscall.SIGKILL)
				a.start("worker")
				return
			}
			a.start("worker")
			if err := elder.Wait(); err != nil {
				t.Errorf("the elder ends with %v", err)
			}
		}
	}
	broker := func(binary string) func() {
		return func() {
			a.binary["node"] = binary
			a.end("node", syscall.SIGKILL)
			a.start("node")
		}
	}
	for _, step := range []struct {
		name    string
		replace func()
	}{
		{"a newer worker", worker(next, false)},
		{"back to this one", worker("", false)},
		{"a newer broker", broker(next)},
		{"a newer worker, too", worker(next, false)},
		{"an older broker", broker("")},
		{"an older worker", worker("", false)},
		{"a newer worker, as planned", worker(next, true)},
		{"an older worker, as planned", worker("", true)},
	} {
		step.replace()
		serves(t, a, 1)
		h.check(step.name)
		v, other := publish(t, a.Kubelet, bucket(store, "w", "ds")) // a mount of this pair
		if got, err := os.ReadFile(other + "/data/cwd/file"); err != nil || !bytes.Equal(got, objects["ds/cwd/file"]) {
			t.Errorf("%s: a new volume: %q, %v", step.name, got, err)
		}
		if err := a.Unpublish(t.Context(), v); err != nil {
			t.Errorf("%s: %v", step.name, err)
		}
	}
	h.end()
}

// A mount that a newer worker has negotiated more for cannot go back to this one: as planned that
// is refused, and after a kill it waits until the newer one returns.
func TestWhatCannotGoBackStays(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"ds/f": pattern(2<<20, 7), "ds/g": pattern(2<<20, 8)})
	next := buildNext(t)
	a := startApart(t, store.Endpoint)
	_, old := publish(t, a.Kubelet, bucket(store, "v", "ds"))
	a.binary["worker"] = next
	a.end("worker", syscall.SIGKILL)
	a.start("worker")
	serves(t, a, 1)
	_, new := publish(t, a.Kubelet, bucket(store, "w", "ds"))
	f := open(t, new+"/data/f")

	elder := a.procs["worker"]
	a.binary["worker"] = ""
	a.start("worker")
	heir := a.procs["worker"]
	if err := heir.Wait(); err == nil {
		t.Error("a worker that was sent away ends as if all were well")
	}
	if err := elder.Wait(); err == nil {
		t.Error("the elder ends as if all were well")
	}
	a.start("worker") // whoever keeps it running starts the wrong one
	serves(t, a, 1)   // what it can
	if got := mustShell(t, "sha256sum < "+old+"/data/g"); !strings.HasPrefix(got, sum(pattern(2<<20, 8))) {
		t.Errorf("read %s", got)
	}
	a.binary["worker"] = next
	a.end("worker", syscall.SIGTERM)
	a.start("worker")
	serves(t, a, 2)
	if got, err := f.read(); err != nil || !strings.HasPrefix(got, sum(pattern(2<<20, 7))) {
		t.Errorf("a file that was open: %q, %v", got, err)
	}
	log, err := os.ReadFile(filepath.Join(a.dir, "log"))
	if err != nil || !strings.Contains(string(log), "negotiated was") {
		t.Errorf("the log does not say why the older worker cannot serve it: %v", err)
	}
}

// SIGHUP to larder up takes the binary that is on disk, if that can take over.
func TestUpTakesTheBinaryOnDisk(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"ds/f": pattern(2<<20, 7)})
	next := buildNext(t)
	binary := filepath.Join(t.TempDir(), "larder")
	install := func(from string) { // as a package manager does: another file by the same name
		t.Helper()
		mustShell(t, fmt.Sprintf("cp %s %s.new && mv %s.new %s", from, binary, binary, binary))
	}
	install(larderBinary)
	s, err := stack.Start(t.Context(), stack.Config{Binary: binary})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	_, target := publish(t, s.Kubelet, bucket(store, "v", "ds"))
	logged := func(text string) func() bool {
		return func() bool {
			log, err := os.ReadFile(s.Log())
			return err == nil && strings.Contains(string(log), text)
		}
	}

	install("/bin/false")
	before, _ := serving(t, s.Dir())
	if err := syscall.Kill(s.PID(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new worker has failed", logged("the old one stays"))
	if pid, volumes := serving(t, s.Dir()); pid != before || volumes != 1 {
		t.Errorf("process %d serves %d volumes, want %d and 1", pid, volumes, before)
	}
	install(next)
	if err := syscall.Kill(s.PID(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	isNext := func() bool {
		st := workerStatus(t, s.Dir())
		return st.GetVersion() == "next" && len(st.GetVolumes()) == 1
	}
	eventually(t, "the next release serves", isNext)
	install(larderBinary) // not told, it does not come back
	after, _ := serving(t, s.Dir())
	if err := syscall.Kill(after, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is started again", func() bool { pid, _ := serving(t, s.Dir()); return pid != after && isNext() })
	if got := mustShell(t, "sha256sum < "+target+"/data/f"); !strings.HasPrefix(got, sum(pattern(2<<20, 7))) {
		t.Errorf("read %s", got)
	}
}

// serves waits until the worker that was started last serves so many volumes and is connected.
func serves(t *testing.T, a *apart, volumes int) {
	t.Helper()
	want := "dev"
	if a.binary["worker"] != "" {
		want = "next"
	}
	eventually(t, "the last worker serves", func() bool {
		st := workerStatus(t, a.dir)
		return st.GetVersion() == want && int(st.GetPid()) == a.procs["worker"].Process.Pid && len(st.GetVolumes()) == volumes
	})
	if volumes > 1 {
		return
	}
	if err := a.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
}
