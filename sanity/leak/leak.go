// Package leak finds what a test or a program left behind: mounts, processes, files.
//
// Everything that belongs to one run lives under one scratch directory, which is also the
// TMPDIR of every process of the run: a mount belongs to it by its mount point, a file by
// its path, a process (an orphan too) by the TMPDIR in its environment. Hence two runs at
// once never see each other's.
//
// Nothing here opens a path below a mount: where a FUSE server is gone that would block for
// ever. The kernel's tables say what is there, and fusectl ends it.
package leak

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// settle is how long what was told to end may take to do so.
const settle = 10 * time.Second

// Run runs the tests of m in a scratch directory of their own and returns the exit code
// for TestMain. If they passed but left something behind, it names that, removes it and
// returns 1.
//
//	func TestMain(m *testing.M) { os.Exit(leak.Run(m)) }
func Run(m interface{ Run() int }) int { return run(m, settle) }

func run(m interface{ Run() int }, settle time.Duration) int {
	dir, err := os.MkdirTemp("", "t") // short: paths of sockets are
	if err != nil {
		fmt.Fprintln(os.Stderr, "leak:", err)
		return 1
	}
	outer := os.TempDir()
	os.Setenv("TMPDIR", dir)
	code := m.Run()
	os.Setenv("TMPDIR", outer)
	if left := await(dir, settle); len(left) > 0 {
		for _, l := range left {
			fmt.Fprintln(os.Stderr, "leak: the tests left behind:", l)
		}
		code = max(code, 1)
	}
	if err := Clean(dir); err != nil {
		fmt.Fprintln(os.Stderr, "leak:", err)
		code = max(code, 1)
	}
	return code
}

// await is Find once it finds nothing, or after settle. Ending a process is no event for
// those who are not its parent, so it polls.
func await(dir string, settle time.Duration) []string {
	for end := time.Now().Add(settle); ; time.Sleep(20 * time.Millisecond) {
		left := Find(dir)
		if len(left) == 0 || time.Now().After(end) {
			return left
		}
	}
}

// Find lists what belongs to the run of dir: mounts at or below it, processes whose TMPDIR
// is at or below it and children of this process, and, if no mount is there, files below it.
func Find(dir string) []string {
	var left []string
	mounts := Mounts(dir)
	for _, m := range mounts {
		left = append(left, fmt.Sprintf("mount %s (%s)", m.Point, m.Type))
	}
	for _, p := range processes(dir, true) {
		left = append(left, fmt.Sprintf("process %d (%s)", p.pid, p.name))
	}
	if len(mounts) > 0 {
		return left
	}
	files, _ := os.ReadDir(dir)
	for _, f := range files {
		left = append(left, "file "+filepath.Join(dir, f.Name()))
	}
	return left
}

// Clean ends and removes all that belongs to the run of dir, and dir: it aborts FUSE
// connections, so that nobody stays blocked in them, kills processes, unmounts, and removes
// the files. Children of this process that have another TMPDIR are left alone.
func Clean(dir string) error {
	err := errors.Join(Abort(dir), Kill(dir), Unmount(dir))
	if left := Mounts(dir); len(left) > 0 {
		return errors.Join(err, fmt.Errorf("mount %s stays; nothing below %s was removed", left[0].Point, dir))
	}
	return errors.Join(err, os.RemoveAll(dir))
}

// Kill ends with SIGKILL every process whose TMPDIR is at or below dir, and those that they
// start meanwhile, and waits until they are gone. The zombies of this process's own children
// do not count: who started them waits for them.
func Kill(dir string) error {
	for end := time.Now().Add(settle); ; time.Sleep(time.Millisecond) {
		ps := processes(dir, false)
		if len(ps) == 0 {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("process %d (%s) does not end", ps[0].pid, ps[0].name)
		}
		for _, p := range ps {
			unix.Kill(p.pid, unix.SIGKILL)
		}
	}
}

// Mount is a line of the kernel's mount table.
type Mount struct {
	Point string
	Type  string // of the file system: "fuse.larder", "ext4", …
	Minor int    // of the device; for FUSE the number of the connection
}

// Mounts are those at or below dir, the youngest first: the order in which to unmount them.
func Mounts(dir string) []Mount {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	return parse(string(table), dir)
}

var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

func parse(mountinfo, dir string) []Mount {
	var all []Mount
	for line := range strings.Lines(mountinfo) {
		head, tail, ok := strings.Cut(line, " - ")
		f := strings.Fields(head)
		if !ok || len(f) < 5 {
			continue
		}
		point := unescape.Replace(f[4])
		if !Below(point, dir) {
			continue
		}
		_, minor, _ := strings.Cut(f[2], ":")
		n, _ := strconv.Atoi(minor)
		all = append(all, Mount{Point: point, Type: strings.Fields(tail)[0], Minor: n})
	}
	slices.Reverse(all)
	return all
}

// Below reports whether path is dir or below it. Both are clean and absolute.
func Below(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

// Unmount detaches every mount at or below dir, whoever still uses it.
func Unmount(dir string) error {
	var errs []error
	for _, m := range Mounts(dir) {
		err := unix.Unmount(m.Point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.EINVAL) { // gone meanwhile
			errs = append(errs, fmt.Errorf("unmount %s: %w", m.Point, err))
		}
	}
	return errors.Join(errs...)
}

// Abort ends every FUSE connection that is mounted at or below dir: whoever waits in it
// gets an error, now.
func Abort(dir string) error {
	var minors []int
	for _, m := range Mounts(dir) {
		if m.Type == "fuse" || strings.HasPrefix(m.Type, "fuse.") {
			minors = append(minors, m.Minor)
		}
	}
	if len(minors) == 0 {
		return nil
	}
	ctl, done, err := fusectl()
	if err != nil {
		return err
	}
	defer done()
	var errs []error
	for _, n := range slices.Compact(minors) {
		err := os.WriteFile(filepath.Join(ctl, strconv.Itoa(n), "abort"), []byte("1"), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("abort FUSE connection: %w", err))
		}
	}
	return errors.Join(errs...)
}

// fusectl is where the control files of FUSE connections are; it mounts them where nobody
// has. done undoes that.
func fusectl() (dir string, done func(), err error) {
	const (
		usual        = "/sys/fs/fuse/connections"
		fusectlMagic = 0x65735543
	)
	var st unix.Statfs_t
	if unix.Statfs(usual, &st) == nil && st.Type == fusectlMagic {
		return usual, func() {}, nil
	}
	return mountFusectl()
}

func mountFusectl() (string, func(), error) {
	dir, err := os.MkdirTemp("", "fusectl")
	if err != nil {
		return "", nil, err
	}
	if err := unix.Mount("fusectl", dir, "fusectl", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		os.Remove(dir)
		return "", nil, fmt.Errorf("mount fusectl: %w", err)
	}
	return dir, func() {
		unix.Unmount(dir, unix.MNT_DETACH)
		os.Remove(dir)
	}, nil
}

type process struct {
	pid  int
	name string
}

// processes are those whose TMPDIR is at or below dir, without this one; and, if asked for,
// this one's children, whatever their TMPDIR. A zombie is reaped by its parent and counts
// only where that is us.
func processes(dir string, children bool) []process {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	self := os.Getpid()
	var found []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == self {
			continue
		}
		p, ok := inspect(pid)
		if !ok {
			continue
		}
		if (children && p.parent == self) || (p.state != 'Z' && tmpdirBelow(pid, dir)) {
			found = append(found, process{pid, p.name})
		}
	}
	return found
}

type stat struct {
	name   string
	state  byte
	parent int
}

// inspect reads /proc/PID/stat: "PID (NAME) STATE PPID …", where NAME may hold anything.
func inspect(pid int) (stat, bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return stat{}, false
	}
	text := string(b)
	open, shut := strings.IndexByte(text, '('), strings.LastIndexByte(text, ')')
	if open < 0 || shut < open {
		return stat{}, false
	}
	f := strings.Fields(text[shut+1:])
	if len(f) < 2 {
		return stat{}, false
	}
	ppid, _ := strconv.Atoi(f[1])
	return stat{name: text[open+1 : shut], state: f[0][0], parent: ppid}, true
}

func tmpdirBelow(pid int, dir string) bool {
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return false
	}
	for kv := range strings.SplitSeq(string(env), "\x00") {
		if v, ok := strings.CutPrefix(kv, "TMPDIR="); ok {
			return Below(filepath.Clean(v), dir)
		}
	}
	return false
}
