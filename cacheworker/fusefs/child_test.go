package fusefs

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/sanity/leak"
)

// The test process serves the mounts; whoever uses them is a child of it, which can be killed.
const roleEnv = "LARDER_FUSEFS_TEST_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(roleEnv) {
	case "user":
		useMounts()
	case "worker":
		serveMounts()
	default:
		os.Exit(leak.Run(m))
	}
}

// start runs this test binary in a role. It ends with this process.
func start(t *testing.T, role string, env ...string) (cmd *exec.Cmd, in io.WriteCloser, out io.Reader) {
	t.Helper()
	cmd = exec.Command("/proc/self/exe", "-test.run=^$")
	cmd.Env = append(os.Environ(), append(env, roleEnv+"="+role)...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	in, err := cmd.StdinPipe() // whose end is the role's end
	if err != nil {
		t.Fatal(err)
	}
	out, err = cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, in, out
}

// call asks a user to do something.
type call struct {
	ID    int
	Op    string
	Path  string `json:",omitempty"`
	To    string `json:",omitempty"`
	FD    int    `json:",omitempty"`
	Flags int    `json:",omitempty"`
	Off   int64  `json:",omitempty"`
	Len   int    `json:",omitempty"`
}

// answer is what came of it.
type answer struct {
	ID    int
	Errno syscall.Errno
	N     int64
	Data  []byte         `json:",omitempty"`
	Sum   string         `json:",omitempty"`
	Names []string       `json:",omitempty"`
	Stat  *unix.Stat_t   `json:",omitempty"`
	FS    *unix.Statfs_t `json:",omitempty"`
	Dir   []dirent       `json:",omitempty"`
}

type dirent struct {
	Name string
	Ino  uint64
	Off  int64
	Type uint8
}

// user is a process that uses mounts. Safe for concurrent use: each call has a goroutine there.
type user struct {
	t   *testing.T
	cmd *exec.Cmd

	mu    sync.Mutex // guards the fields below; held while writing to in
	in    io.WriteCloser
	next  int
	calls map[int]chan answer
	gone  bool
}

// newUser starts a process with that uid and gid.
func newUser(t *testing.T, uid int) *user {
	t.Helper()
	cmd, in, out := start(t, "user", "LARDER_UID="+strconv.Itoa(uid))
	u := &user{t: t, cmd: cmd, in: in, calls: map[int]chan answer{}}
	read := make(chan struct{})
	go func() {
		defer close(read)
		u.listen(out)
	}()
	t.Cleanup(func() {
		u.mu.Lock()
		in.Close()
		u.mu.Unlock()
		cmd.Process.Kill()
		<-read
		cmd.Wait()
	})
	return u
}

func (u *user) listen(out io.Reader) {
	d := json.NewDecoder(out)
	for {
		var a answer
		if err := d.Decode(&a); err != nil {
			break
		}
		u.mu.Lock()
		u.calls[a.ID] <- a
		delete(u.calls, a.ID)
		u.mu.Unlock()
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.gone = true
	for _, ch := range u.calls {
		close(ch)
	}
}

// ask sends a call; the answer comes through the channel, which is closed if the process ends.
func (u *user) ask(c call) <-chan answer {
	u.mu.Lock()
	defer u.mu.Unlock()
	ch := make(chan answer, 1)
	if u.gone {
		close(ch)
		return ch
	}
	u.next++
	c.ID = u.next
	u.calls[c.ID] = ch
	json.NewEncoder(u.in).Encode(c) // an error is seen as the process's end
	return ch
}

// patience is how long any call may take on a machine that has other things to do.
const patience = 60 * time.Second

func (u *user) do(c call) answer {
	u.t.Helper()
	return await(u.t, u.ask(c), c.Op+" "+c.Path)
}

func await(t *testing.T, ch <-chan answer, what string) answer {
	t.Helper()
	select {
	case a, ok := <-ch:
		if !ok {
			t.Fatalf("%s: the process has ended", what)
		}
		return a
	case <-time.After(patience):
		leak.Abort(os.TempDir())
		t.Fatalf("%s: no answer", what)
	}
	panic("not reached")
}

// must is do for what has to succeed.
func (u *user) must(c call) answer {
	u.t.Helper()
	a := u.do(c)
	if a.Errno != 0 {
		u.t.Fatalf("%s %s: %v", c.Op, c.Path, a.Errno)
	}
	return a
}

func (u *user) open(path string, flags ...int) int {
	u.t.Helper()
	c := call{Op: "open", Path: path}
	for _, f := range flags {
		c.Flags |= f
	}
	return int(u.must(c).N)
}

func (u *user) close(fd int) {
	u.t.Helper()
	u.must(call{Op: "close", FD: fd})
}

func (u *user) pread(fd int, off int64, n int) []byte {
	u.t.Helper()
	return u.must(call{Op: "pread", FD: fd, Off: off, Len: n}).Data
}

// sum is the SHA-256 of a whole file, opened, read and closed.
func (u *user) sum(path string) string {
	u.t.Helper()
	return u.must(call{Op: "sum", Path: path}).Sum
}

func (u *user) stat(path string) unix.Stat_t {
	u.t.Helper()
	return *u.must(call{Op: "stat", Path: path}).Stat
}

func sumOf(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

// useMounts is the main function of a user.
func useMounts() {
	if uid, err := strconv.Atoi(os.Getenv("LARDER_UID")); err == nil && uid != 0 {
		if err := errors.Join(syscall.Setgroups(nil), syscall.Setresgid(uid, uid, uid), syscall.Setresuid(uid, uid, uid)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	signal.Ignore(syscall.SIGPIPE)
	unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(syscall.SIGKILL), 0, 0, 0)
	out := json.NewEncoder(os.Stdout)
	var mu sync.Mutex
	in := json.NewDecoder(bufio.NewReader(os.Stdin))
	for {
		var c call
		if err := in.Decode(&c); err != nil {
			os.Exit(0)
		}
		go func() {
			a, err := c.run()
			a.ID = c.ID
			if err != nil && !errors.As(err, &a.Errno) {
				fmt.Fprintf(os.Stderr, "%s %s: %v\n", c.Op, c.Path, err)
				os.Exit(1)
			}
			mu.Lock()
			defer mu.Unlock()
			out.Encode(a)
		}()
	}
}

var mapped struct {
	sync.Mutex
	m [][]byte
}

func (c call) run() (a answer, err error) {
	switch c.Op {
	case "pid":
		a.N = int64(os.Getpid())
	case "open":
		fd, err := unix.Open(c.Path, c.Flags|unix.O_CLOEXEC, 0o666)
		return answer{N: int64(fd)}, err
	case "close":
		err = unix.Close(c.FD)
	case "pread":
		b := make([]byte, c.Len)
		n, err := preadFull(c.FD, b, c.Off)
		return answer{N: int64(n), Data: b[:n]}, err
	case "pwrite":
		n, err := unix.Pwrite(c.FD, make([]byte, c.Len), c.Off)
		return answer{N: int64(n)}, err
	case "sum":
		return sumFile(c.Path, c.Flags)
	case "stat":
		a.Stat = &unix.Stat_t{}
		err = unix.Lstat(c.Path, a.Stat)
	case "statfs":
		a.FS = &unix.Statfs_t{}
		err = unix.Statfs(c.Path, a.FS)
	case "getxattr":
		b := make([]byte, c.Len)
		n, err := unix.Getxattr(c.Path, c.To, b)
		return answer{N: int64(n), Data: b[:max(0, min(n, len(b)))]}, err
	case "listxattr":
		b := make([]byte, c.Len)
		n, err := unix.Listxattr(c.Path, b)
		return answer{N: int64(n), Data: b[:max(0, min(n, len(b)))]}, err
	case "getdents":
		return getdents(c.FD, c.Len)
	case "seek":
		a.N, err = unix.Seek(c.FD, c.Off, c.Flags)
	case "readdir":
		es, err := os.ReadDir(c.Path)
		for _, e := range es {
			a.Names = append(a.Names, e.Name())
		}
		return a, err
	case "mmap":
		b, err := unix.Mmap(c.FD, 0, c.Len, unix.PROT_READ, c.Flags)
		mapped.Lock()
		defer mapped.Unlock()
		mapped.m = append(mapped.m, b)
		return answer{N: int64(len(mapped.m) - 1)}, err
	case "load":
		return load(c.FD, c.Off, c.Len)
	case "random":
		mapped.Lock()
		defer mapped.Unlock()
		err = unix.Madvise(mapped.m[c.FD], unix.MADV_RANDOM)
	case "pelted":
		return c.pelted()
	case "torture":
		return c.torture()
	case "munmap":
		mapped.Lock()
		defer mapped.Unlock()
		err = unix.Munmap(mapped.m[c.FD])
	case "bind":
		err = bind(c.Path, c.To)
	case "umount":
		err = unix.Unmount(c.Path, 0)
	default:
		if read := readBy[c.Op]; read != nil {
			b := make([]byte, c.Len)
			n, err := read(c, b)
			return answer{N: int64(n), Data: b[:n]}, err
		}
		for _, m := range mutations {
			if m.name == c.Op {
				return a, m.do(c.Path)
			}
		}
		err = fmt.Errorf("no such call: %q", c.Op)
	}
	return a, err
}

func preadFull(fd int, b []byte, off int64) (n int, err error) {
	for n < len(b) {
		m, err := unix.Pread(fd, b[n:], off+int64(n))
		if err != nil {
			return n, err
		}
		if m == 0 {
			return n, nil
		}
		n += m
	}
	return n, nil
}

func sumFile(path string, flags int) (a answer, err error) {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return a, err
	}
	defer unix.Close(fd)
	h := sha256.New()
	b := make([]byte, 1<<20)
	for {
		n, err := unix.Pread(fd, b, a.N)
		if err != nil {
			return a, err
		}
		if n == 0 {
			a.Sum = hex.EncodeToString(h.Sum(nil))
			return a, nil
		}
		h.Write(b[:n])
		a.N += int64(n)
	}
}

// load reads from a mapping; a page that cannot be had is EFAULT.
func load(id int, off int64, n int) (a answer, err error) {
	mapped.Lock()
	b := mapped.m[id]
	mapped.Unlock()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if recover() != nil {
			err = syscall.EFAULT
		}
	}()
	a.Data = slices.Clone(b[off : off+int64(n)])
	return a, nil
}

func getdents(fd, size int) (a answer, err error) {
	b := make([]byte, size)
	n, err := unix.Getdents(fd, b)
	if err != nil {
		return a, err
	}
	for b = b[:n]; len(b) > 0; {
		var d unix.Dirent // linux_dirent64: ino, off, reclen, type, name
		size := binary.LittleEndian.Uint16(b[unsafe.Offsetof(d.Reclen):])
		a.Dir = append(a.Dir, dirent{
			Name: unix.ByteSliceToString(b[unsafe.Offsetof(d.Name):size]),
			Ino:  binary.LittleEndian.Uint64(b[unsafe.Offsetof(d.Ino):]),
			Off:  int64(binary.LittleEndian.Uint64(b[unsafe.Offsetof(d.Off):])),
			Type: b[unsafe.Offsetof(d.Type)],
		})
		b = b[size:]
	}
	return a, nil
}

// pelted opens and reads a file in a thread that gets a signal every 50 ms.
func (c call) pelted() (a answer, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1)
	pid, tid := unix.Getpid(), unix.Gettid()
	done, over := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(over)
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				unix.Tgkill(pid, tid, syscall.SIGUSR1)
				a.N++
			case <-done:
				return
			}
		}
	}()
	defer func() { <-over }()
	defer close(done)
	fd, err := syscall.Open(c.Path, c.Flags|syscall.O_CLOEXEC, 0) // not retried after EINTR
	if err != nil {
		return a, err
	}
	defer syscall.Close(fd)
	a.Data = make([]byte, c.Len)
	n, err := syscall.Pread(fd, a.Data, c.Off)
	if err != nil {
		return a, err
	}
	a.Data = a.Data[:n]
	return a, nil
}

// bind shows a file or folder at another place.
func bind(from, to string) error {
	fd, err := unix.OpenTree(unix.AT_FDCWD, from, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.MoveMount(fd, "", unix.AT_FDCWD, to, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// mutations would change something.
var mutations = []struct {
	name string
	do   func(path string) error
}{
	{"open to write", func(p string) error { return openClose(p, unix.O_WRONLY) }},
	{"open to read and write", func(p string) error { return openClose(p, unix.O_RDWR) }},
	{"open to append", func(p string) error { return openClose(p, unix.O_WRONLY|unix.O_APPEND) }},
	{"open to truncate", func(p string) error { return openClose(p, unix.O_RDONLY|unix.O_TRUNC) }},
	{"create", func(p string) error { return openClose(p+"-new", unix.O_CREAT|unix.O_WRONLY) }},
	{"create exclusively", func(p string) error { return openClose(p+"-new", unix.O_CREAT|unix.O_EXCL|unix.O_RDWR) }},
	{"truncate", func(p string) error { return unix.Truncate(p, 0) }},
	{"chmod", func(p string) error { return unix.Chmod(p, 0o777) }},
	{"chown", func(p string) error { return unix.Lchown(p, 1, 1) }},
	{"utime", func(p string) error {
		return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{{Sec: 1}, {Sec: 1}}, 0)
	}},
	{"unlink", func(p string) error { return unix.Unlink(p) }},
	{"rename", func(p string) error { return unix.Rename(p, p+"-new") }},
	{"link", func(p string) error { return unix.Link(p, p+"-new") }},
	{"symlink", func(p string) error { return unix.Symlink("x", p+"-new") }},
	{"mkdir", func(p string) error { return unix.Mkdir(p+"-new", 0o755) }},
	{"rmdir", func(p string) error { return unix.Rmdir(strings.TrimSuffix(filepath.Dir(p), "/folder") + "/folder") }},
	{"mkfifo", func(p string) error { return unix.Mkfifo(p+"-new", 0o644) }},
	{"bind a socket", bindSocket},
	{"set an attribute", func(p string) error { return unix.Setxattr(p, "user.x", []byte("x"), 0) }},
	{"remove an attribute", func(p string) error { return unix.Removexattr(p, "user.larder.version") }},
}

func openClose(path string, flags int) error {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o666)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if flags&unix.O_ACCMODE == unix.O_RDONLY {
		return nil
	}
	_, err = unix.Write(fd, []byte("overwritten"))
	return err
}

func bindSocket(p string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Bind(fd, &unix.SockaddrUnix{Name: p + "-new"})
}

const (
	mapShared  = unix.MAP_SHARED
	mapPrivate = unix.MAP_PRIVATE
)
