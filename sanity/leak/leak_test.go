package leak

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// tests stands for a testing.M whose tests do what the function does and pass.
type tests func()

func (f tests) Run() int { f(); return 0 }

func TestRunPassesWhereNothingIsLeft(t *testing.T) {
	code := Run(tests(func() {
		dir, err := os.MkdirTemp("", "x")
		if err != nil {
			t.Error(err)
		}
		os.RemoveAll(dir)
	}))
	if code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
}

func TestRunFailsAndCleansUpWhatIsLeft(t *testing.T) {
	for name, leave := range map[string]func(t *testing.T, dir string) (gone func() bool){
		"file":    leaveFile,
		"mount":   leaveMount,
		"fuse":    leaveFUSE,
		"process": leaveOrphan,
	} {
		t.Run(name, func(t *testing.T) {
			var dir string
			var gone func() bool
			code := run(tests(func() {
				dir = os.Getenv("TMPDIR")
				gone = leave(t, dir)
			}), 0)
			if code != 1 {
				t.Errorf("exit code %d, want 1", code)
			}
			if !gone() {
				t.Errorf("the %s is still there", name)
			}
			if _, err := os.Lstat(dir); !os.IsNotExist(err) {
				t.Errorf("%s is still there: %v", dir, err)
			}
		})
	}
}

func leaveFile(t *testing.T, dir string) func() bool {
	if err := os.WriteFile(filepath.Join(dir, "f"), nil, 0o600); err != nil {
		t.Error(err)
	}
	return func() bool { return true } // with its folder
}

func leaveMount(t *testing.T, dir string) func() bool {
	at := filepath.Join(dir, "a b") // a space is escaped in the kernel's table
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Error(err)
	}
	if err := unix.Mount("none", at, "tmpfs", 0, ""); err != nil {
		t.Error(err)
	}
	if got := Find(dir); len(got) != 1 || got[0] != "mount "+at+" (tmpfs)" {
		t.Errorf("Find = %q", got)
	}
	return func() bool { return len(Mounts(dir)) == 0 }
}

// leaveFUSE leaves a mount whose server never answers, and somebody who waits in it.
func leaveFUSE(t *testing.T, dir string) func() bool {
	at := filepath.Join(dir, "m")
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Error(err)
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	opts := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)
	if err := unix.Mount("test", at, "fuse.larder-test", 0, opts); err != nil {
		t.Error(err)
	}
	blocked := make(chan error, 1)
	go func() {
		_, err := os.Stat(filepath.Join(at, "x"))
		blocked <- err
	}()
	return func() bool { return <-blocked != nil && len(Mounts(dir)) == 0 }
}

// leaveOrphan leaves a process that is nobody's child here.
func leaveOrphan(t *testing.T, dir string) func() bool {
	out, err := exec.Command("sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!").Output()
	if err != nil {
		t.Error(err)
	}
	pid := strings.TrimSpace(string(out))
	if got := Find(dir); len(got) != 1 || got[0] != "process "+pid+" (sleep)" {
		t.Errorf("Find = %q", got)
	}
	return func() bool { return len(processes(dir, false)) == 0 }
}

func TestChildrenCountWhateverTheirTMPDIR(t *testing.T) {
	child := exec.Command("sleep", "1000")
	child.Env = []string{}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("process %d (sleep)", child.Process.Pid)
	if got := Find(t.TempDir()); len(got) != 1 || got[0] != want {
		t.Errorf("Find = %q, want %q", got, want)
	}
	child.Process.Kill()
	child.Wait()
	if got := Find(t.TempDir()); len(got) != 0 {
		t.Errorf("Find = %q, want nothing", got)
	}
}

func TestMountsOfOthersAreNotOurs(t *testing.T) {
	const table = `24 1 254:0 / / rw - ext4 /dev/vda rw
30 24 0:41 / /tmp/t1/m rw shared:7 - fuse.larder larder rw
31 24 0:42 / /tmp/t10/m rw - fuse.larder larder rw
32 24 0:43 / /tmp/t1/m/a\040b rw - tmpfs none rw
`
	got := fmt.Sprint(parse(table, "/tmp/t1"))
	if want := "[{/tmp/t1/m/a b tmpfs 43} {/tmp/t1/m fuse.larder 41}]"; got != want {
		t.Errorf("parse = %s, want %s", got, want)
	}
}
