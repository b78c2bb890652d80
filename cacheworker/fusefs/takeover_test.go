package fusefs

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/cachestore"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
	filesource "github.com/larderfs/larder/cacheworker/source/file"
	"github.com/larderfs/larder/cacheworker/tiers"
)

// serveMounts is the main function of a worker. It prints a line when it is connected and when
// it begins to hang, and answers each line that it reads.
func serveMounts() {
	unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0)
	dir := os.Getenv("LARDER_DIR")
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	src, err := filesource.New(filesource.Config{Root: filepath.Join(dir, "root"), Name: "/root", NodeKey: []byte("key")})
	fail(err)
	w := &testWorker{log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})), src: src, features: allFeatures}
	w.features.Resend = os.Getenv("LARDER_NO_RESEND") == ""
	out := json.NewEncoder(os.Stdout)
	if os.Getenv("LARDER_HANG") != "" { // the first worker; its table is compacted again and again
		w.compact = 50_000
		w.src = hanging{src, func() { out.Encode("hanging") }}
	}
	fail(w.connect(filepath.Join(dir, "broker.sock"), tiers.Tier{Store: cachestore.Config{Dir: filepath.Join(dir, "tier"), ViewDir: filepath.Join(dir, "view")}}))
	fail(out.Encode("connected"))
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		switch in.Text() {
		case "reads":
			fail(out.Encode(fmt.Sprint(w.counters.Reads.Load())))
		case "resent":
			fail(out.Encode(fmt.Sprint(w.counters.Resent.Load())))
		case "nodes":
			nodes := 0
			for _, s := range w.all() {
				nodes, _ = s.Stats()
			}
			fail(out.Encode(fmt.Sprint(nodes)))
		case "let go": // and stay
			fail(w.store.HandOver())
			for _, s := range w.all() {
				fail(s.Detach())
			}
			fail(AwaitReaders(context.Background()))
			fail(w.peer.Close())
			fail(out.Encode("gone"))
		case "end":
			for _, s := range w.all() {
				fail(s.Detach())
			}
			os.Exit(0)
		}
	}
	os.Exit(0)
}

// hanging never gives the bytes of a file named hang.
type hanging struct {
	source.Source
	tell func()
}

func (h hanging) Get(ctx context.Context, obj object.Object, off, n int64) (io.ReadCloser, error) {
	if !strings.HasSuffix(obj.Key, "hang") {
		return h.Source.Get(ctx, obj, off, n)
	}
	h.tell()
	<-ctx.Done()
	return nil, ctx.Err()
}

// process is a worker in a process of its own.
type process struct {
	t     *testing.T
	cmd   *exec.Cmd
	in    io.Writer
	lines chan string
	once  sync.Once
}

func (w *world) startWorker(env ...string) *process {
	w.t.Helper()
	cmd, in, out := start(w.t, "worker", append(env, "LARDER_DIR="+w.dir)...)
	p := &process{t: w.t, cmd: cmd, in: in, lines: make(chan string, 100)}
	go func() {
		defer close(p.lines)
		for d := json.NewDecoder(out); ; {
			var line string
			if d.Decode(&line) != nil {
				return
			}
			p.lines <- line
		}
	}()
	w.t.Cleanup(func() { p.kill() })
	p.expect("connected")
	return p
}

func (p *process) expect(want string) {
	p.t.Helper()
	if got := p.line(); got != want {
		p.t.Fatalf("the worker says %q, want %q", got, want)
	}
}

func (p *process) line() string {
	p.t.Helper()
	select {
	case l := <-p.lines:
		return l
	case <-time.After(patience):
		p.t.Fatal("the worker says nothing")
	}
	panic("not reached")
}

// ask sends a line and returns the answer.
func (p *process) ask(what string) string {
	p.t.Helper()
	fmt.Fprintln(p.in, what)
	return p.line()
}

func (p *process) kill() {
	p.once.Do(func() {
		p.cmd.Process.Kill()
		p.cmd.Wait()
	})
}

// end has it let go of its mounts and end.
func (p *process) end() {
	p.once.Do(func() {
		fmt.Fprintln(p.in, "end")
		p.cmd.Wait()
	})
}

// letGo has it let go of its mounts and live on.
func (p *process) letGo() {
	fmt.Fprintln(p.in, "let go")
	p.expect("gone")
}

// takeoverWorld is a volume on real files, served by processes.
type takeoverWorld struct {
	*world
	u    *user
	want map[string][]byte
	big  []string
}

func newTakeover(t *testing.T) *takeoverWorld {
	w := &takeoverWorld{world: newWorld(t, options{noWorker: true}), want: map[string][]byte{}}
	root := filepath.Join(w.dir, "root")
	for i, name := range []string{"open", "mapped", "pass", "hang", "cold"} {
		w.want[name] = bytesOf(uint64(i), 4<<20+int(3*i))
		w.write(filepath.Join(root, name), w.want[name])
	}
	for i := range many {
		name := fmt.Sprintf("%04d-%s", i, bytes.Repeat([]byte("n"), i%60))
		w.write(filepath.Join(root, "big", name), nil)
		w.big = append(w.big, name)
	}
	t.Cleanup(w.unmount)
	w.u = newUser(t, 0)
	return w
}

func (w *takeoverWorld) write(name string, data []byte) {
	w.t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(name, data, 0o644); err != nil {
		w.t.Fatal(err)
	}
}

// passThrough reads a file until the kernel reads it alone.
func (w *takeoverWorld) passThrough(p *process, name string) {
	w.t.Helper()
	w.u.sum(w.data(name))
	eventually(w.t, name+" is passed through", func() bool {
		before := p.ask("reads")
		w.u.sum(w.data(name))
		return p.ask("reads") == before
	})
}

// forgetAll has the kernel forget what is not in use, and waits until the worker knows: what it has read of
// that and not noted when it is killed is lost, and the nodes stay for ever.
func (w *takeoverWorld) forgetAll(p *process) {
	w.t.Helper()
	eventually(w.t, "the worker is told what the kernel forgets", func() bool {
		w.forget()
		return len(p.ask("nodes")) <= 2
	})
}

func TestReadersDoNotNoticeThatTheWorkerIsReplaced(t *testing.T) {
	for name, replace := range map[string]func(*process){"killed": (*process).kill, "ended": (*process).end, "let go": (*process).letGo} {
		t.Run(name, func(t *testing.T) {
			w := newTakeover(t)
			first := w.startWorker("LARDER_HANG=1")
			w.mountVolume(brokerwire.Volume{Source: "file:///"})
			w.passThrough(first, "pass")

			u, at := w.u, 100_000
			part := func(name string) []byte { at += 4096; return w.want[name][at-4096 : at] }
			open, pass := u.open(w.data("open")), u.open(w.data("pass"))
			mapped := u.open(w.data("mapped"))
			m := int(u.must(call{Op: "mmap", FD: mapped, Len: len(w.want["mapped"]), Flags: mapShared}).N)
			pm := int(u.must(call{Op: "mmap", FD: pass, Len: len(w.want["pass"]), Flags: mapShared}).N)
			big, forgotten := u.open(w.data("big"), unix.O_DIRECTORY), u.open(w.data("big"), unix.O_DIRECTORY)
			_, seen2 := u.entries(big, 4096, 500), u.entries(forgotten, 4096, 900)
			u.close(big) // so that its handle's number is free
			big = u.open(w.data("big"), unix.O_DIRECTORY)
			seen := u.entries(big, 4096, 500)

			check := func(when string) {
				t.Helper()
				want := part("open")
				if got := u.pread(open, int64(at-4096), 4096); !bytes.Equal(got, want) {
					t.Errorf("%s: an open file reads wrong bytes", when)
				}
				want = part("mapped")
				if got := u.must(call{Op: "load", FD: m, Off: int64(at - 4096), Len: 4096}).Data; !bytes.Equal(got, want) {
					t.Errorf("%s: a mapping has wrong bytes", when)
				}
				want = part("pass")
				if got := u.pread(pass, int64(at-4096), 4096); !bytes.Equal(got, want) {
					t.Errorf("%s: a passthrough file reads wrong bytes", when)
				}
				want = part("pass")
				if got := u.must(call{Op: "load", FD: pm, Off: int64(at - 4096), Len: 4096}).Data; !bytes.Equal(got, want) {
					t.Errorf("%s: a passthrough mapping has wrong bytes", when)
				}
			}
			check("before")
			w.forgetAll(first)
			blocked := u.ask(call{Op: "pread", FD: u.open(w.data("hang")), Off: 1 << 20, Len: 5000})
			first.expect("hanging")

			if n := first.ask("resent"); n != "0" {
				t.Errorf("%s requests of the first worker count as delivered again", n)
			}
			replace(first)
			looking := u.ask(call{Op: "stat", Path: w.data("cold")}) // while there is no worker
			second := w.startWorker()
			if a := await(t, blocked, "the blocked read"); a.Errno != 0 || !bytes.Equal(a.Data, w.want["hang"][1<<20:1<<20+5000]) {
				t.Errorf("the blocked read: %d bytes, %v", len(a.Data), a.Errno)
			}
			if second.ask("resent") == "0" {
				t.Error("the blocked read is not counted as delivered again")
			}
			if a := await(t, looking, "the look-up"); a.Errno != 0 || a.Stat.Size != int64(len(w.want["cold"])) {
				t.Errorf("the look-up without a worker: %v", a.Errno)
			}
			check("after")
			fresh := u.open(w.data("big"), unix.O_DIRECTORY) // the new worker's first
			u.entries(fresh, 4096, 1000)
			u.close(fresh)
			seen = append(seen, u.entries(big, 4096, 500)...)
			w.forgetAll(second)

			second.kill()
			third := w.startWorker()
			check("after the second time")
			seen = append(seen, u.entries(big, 4096, many)...)
			isAll(t, "a folder", names(seen), w.big)
			isAll(t, "a folder whose entries were forgotten", names(append(seen2, u.entries(forgotten, 4096, many)...)), w.big)

			reads := third.ask("reads")
			check("passed through")
			for _, f := range []string{"pass", "open", "mapped", "hang", "cold"} {
				if got := u.sum(w.data(f)); got != sumOf(w.want[f]) {
					t.Errorf("%s: wrong bytes", f)
				}
			}
			if third.ask("reads") == reads {
				t.Error("READs are not counted")
			}
			reads = third.ask("reads")
			readEverywhere(u, w.data("pass"), w.want["pass"])
			if got := third.ask("reads"); got != reads {
				t.Errorf("a file that was passed through before is not any more: %s READs, before %s", got, reads)
			}
			for _, fd := range []int{open, pass, mapped, big, forgotten} {
				u.close(fd)
			}
			for _, id := range []int{m, pm} {
				u.must(call{Op: "munmap", FD: id})
			}
			w.forgetAll(third)
			if ms, err := w.client.Mounts(t.Context()); err != nil || len(ms) != 1 || ms[0].Takeovers != 2 || !ms[0].Served {
				t.Errorf("the broker lists %+v, %v", ms, err)
			}
		})
	}
}

// A worker that has let go of its mounts and lives on takes no request any more: on a kernel that
// delivers none again it would be lost.
func TestAWorkerThatHasLetGoTakesNoRequest(t *testing.T) {
	w := newTakeover(t)
	first := w.startWorker("LARDER_NO_RESEND=1")
	w.mountVolume(brokerwire.Volume{Source: "file:///"})
	for range 5 {
		w.u.must(call{Op: "stat", Path: w.data("cold")})
		first.letGo()
		var asked []<-chan answer
		for i := range 20 {
			asked = append(asked, w.u.ask(call{Op: "stat", Path: w.data(fmt.Sprint("none-", i))}))
		}
		next := w.startWorker("LARDER_NO_RESEND=1")
		for _, a := range asked {
			if got := await(t, a, "a look-up"); got.Errno != unix.ENOENT {
				t.Errorf("a look-up of what is not there: %v", got.Errno)
			}
		}
		first.kill()
		first = next
	}
}
