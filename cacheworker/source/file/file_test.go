package file

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
	"github.com/larderfs/larder/cacheworker/source/sourcetest"
	"github.com/larderfs/larder/sanity/leak"
)

func TestMain(m *testing.M) { os.Exit(leak.Run(m)) }

func open(t *testing.T, root string) *Source {
	t.Helper()
	s, err := New(Config{Root: root, NodeKey: []byte("node")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// put replaces a file at once, as a rename does.
func put(t *testing.T, root, key string, data []byte) {
	t.Helper()
	path := filepath.Join(root, key)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	temp := filepath.Join(t.TempDir(), "new")
	if err := os.WriteFile(temp, data, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(temp, path); err != nil {
		t.Fatal(err)
	}
}

func TestConformance(t *testing.T) {
	sourcetest.Test(t, func(t *testing.T) sourcetest.Store {
		root := t.TempDir()
		return sourcetest.Store{
			Open: func(t *testing.T) source.Source { return open(t, root) },
			Put:  func(t *testing.T, key string, data []byte) { put(t, root, key, data) },
			Delete: func(t *testing.T, key string) {
				if err := os.Remove(filepath.Join(root, key)); err != nil {
					t.Fatal(err)
				}
			},
		}
	})
}

func names(t *testing.T, s *Source, in source.ListInput) (out []string, hidden int) {
	t.Helper()
	p, err := s.List(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range p.Objects {
		out = append(out, o.Key)
	}
	for _, f := range p.Folders {
		out = append(out, in.Prefix+f+"/")
	}
	return out, p.Hidden
}

func symlink(t *testing.T, target, path string) {
	t.Helper()
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}

func TestNothingOutsideTheRootCanBeNamed(t *testing.T) {
	outside := t.TempDir()
	put(t, outside, "secret", []byte("secret"))
	root := t.TempDir()
	put(t, root, "d/inside", []byte("inside"))
	symlink(t, "d/inside", filepath.Join(root, "good"))
	symlink(t, "../d", filepath.Join(root, "d/self"))
	symlink(t, filepath.Join(outside, "secret"), filepath.Join(root, "bad-file"))
	symlink(t, outside, filepath.Join(root, "bad-dir"))
	symlink(t, "../../../../../../../../"+outside, filepath.Join(root, "d/bad-up"))
	symlink(t, "loop", filepath.Join(root, "loop"))
	symlink(t, "nothing", filepath.Join(root, "dangling"))
	s := open(t, root)

	if got, hidden := names(t, s, source.ListInput{}); !slices.Equal(got, []string{"good", "d/"}) || hidden != 4 {
		t.Errorf("root: %q, %d hidden", got, hidden)
	}
	if got, hidden := names(t, s, source.ListInput{Prefix: "d/"}); !slices.Equal(got, []string{"d/inside", "d/self/"}) || hidden != 1 {
		t.Errorf("d/: %q, %d hidden", got, hidden)
	}
	if _, err := s.Head(t.Context(), "d/self/inside"); err != nil {
		t.Errorf("a link within the root: %v", err)
	}
	for _, key := range []string{"bad-file", "bad-dir/secret", "d/bad-up/secret", "loop", "dangling"} {
		if _, err := s.Head(t.Context(), key); !errors.Is(err, object.ErrNotFound) {
			t.Errorf("head %s: %v", key, err)
		}
		o := object.Object{Key: key, Version: "v", Size: 6}
		if _, err := s.Get(t.Context(), o, 0, 6); !errors.Is(err, object.ErrNotFound) {
			t.Errorf("get %s: %v", key, err)
		}
	}
	for _, prefix := range []string{"bad-dir/", "d/bad-up/", "loop/"} {
		if p, err := s.List(t.Context(), source.ListInput{Prefix: prefix}); !errors.Is(err, object.ErrNotFound) {
			t.Errorf("list %s: %+v, %v", prefix, p, err)
		}
	}
}

func TestOnlyFilesAndFoldersAreShown(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{"empty", "full"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	put(t, root, "full/a", nil)
	if err := unix.Mkfifo(filepath.Join(root, "fifo"), 0o644); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(root, "sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := open(t, root)
	if got, hidden := names(t, s, source.ListInput{}); !slices.Equal(got, []string{"empty/", "full/"}) || hidden != 2 {
		t.Errorf("list: %q, %d hidden", got, hidden)
	}
	if got, _ := names(t, s, source.ListInput{Prefix: "empty/"}); len(got) != 0 {
		t.Errorf("the empty folder has %q", got)
	}
	for _, key := range []string{"fifo", "sock", "empty"} { // a get of a fifo must not wait for a writer
		if _, err := s.Head(t.Context(), key); !errors.Is(err, object.ErrNotFound) {
			t.Errorf("head %s: %v", key, err)
		}
		if _, err := s.Get(t.Context(), object.Object{Key: key, Version: "v", Size: 1}, 0, 1); !errors.Is(err, object.ErrNotFound) {
			t.Errorf("get %s: %v", key, err)
		}
	}
}

// A file that is written in place, which no rename protects.
func TestFileWrittenInPlaceIsChanged(t *testing.T) {
	root := t.TempDir()
	put(t, root, "a", make([]byte, 1<<20))
	s := open(t, root)
	for name, write := range map[string]func(*os.File) error{
		"overwrite": func(f *os.File) error { _, err := f.WriteAt([]byte("x"), 1<<19); return err },
		"append":    func(f *os.File) error { _, err := f.WriteAt([]byte("x"), 1<<20); return err },
		"truncate":  func(f *os.File) error { return f.Truncate(1 << 19) },
	} {
		o, err := s.Head(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		r, err := s.Get(t.Context(), o, 0, o.Size)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(r, make([]byte, 4096)); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(filepath.Join(root, "a"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(write(f), f.Close()); err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, r); n != 0 || !errors.Is(err, object.ErrChanged) {
			t.Errorf("%s: %d more bytes, %v", name, n, err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Two writes within one tick of the clock that stamps files may leave one version behind. So
// a Get of a file that was just written waits until a further write must show.
func TestGetOfAFreshFileWaitsForTheNextTick(t *testing.T) {
	root := t.TempDir()
	put(t, root, "a", []byte("x"))
	s := open(t, root)
	for i := range 5 {
		written := time.Now()
		if err := os.WriteFile(filepath.Join(root, "a"), []byte{byte(i)}, 0o644); err != nil {
			t.Fatal(err)
		}
		o, err := s.Head(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		r, err := s.Get(t.Context(), o, 0, 1)
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		if age := time.Since(written); age < tick/2 { // the file's own time is up to 10 ms older
			t.Errorf("reads a file %v after it was written", age)
		}
	}
}

func read(t *testing.T, s *Source, o object.Object) (string, error) {
	t.Helper()
	r, err := s.Get(t.Context(), o, 0, o.Size)
	if err != nil {
		return "", err
	}
	defer r.Close()
	got, err := io.ReadAll(r)
	return string(got), err
}

func TestFolderChangedBetweenPagesIsReadAnew(t *testing.T) {
	root := t.TempDir()
	for _, k := range []string{"a", "b", "d", "e"} {
		put(t, root, k, nil)
	}
	s := open(t, root)
	p, err := s.List(t.Context(), source.ListInput{Max: 2})
	if err != nil {
		t.Fatal(err)
	}
	put(t, root, "c", nil)
	if err := os.Remove(filepath.Join(root, "d")); err != nil {
		t.Fatal(err)
	}
	if got, _ := names(t, s, source.ListInput{After: p.Next}); !slices.Equal(got, []string{"c", "e"}) {
		t.Errorf("second page: %q", got)
	}
}

func TestRootIsOpenedByDescriptorAndNamedByPath(t *testing.T) {
	root := t.TempDir()
	put(t, root, "a", []byte("x"))
	d, err := os.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	s, err := New(Config{Root: fmt.Sprintf("/proc/self/fd/%d", d.Fd()), Name: "/data/set/", NodeKey: []byte("n")})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	o, err := s.Head(t.Context(), "a")
	if err != nil || o.Store != "file:///data/set" {
		t.Errorf("%v, %v", o, err)
	}
}

func TestUnusableConfigIsRefused(t *testing.T) {
	for _, c := range []struct {
		cfg  Config
		want error
	}{
		{Config{Root: "relative", NodeKey: []byte("n")}, object.ErrInvalid},
		{Config{Root: t.TempDir()}, object.ErrInvalid},
		{Config{Root: t.TempDir() + "/none", NodeKey: []byte("n")}, object.ErrNotFound},
	} {
		if _, err := New(c.cfg); !errors.Is(err, c.want) {
			t.Errorf("%+v: %v", c.cfg, err)
		}
	}
}

func TestErrnosBecomeDecisions(t *testing.T) {
	for errno, want := range map[syscall.Errno]error{
		unix.EACCES: object.ErrDenied, unix.EPERM: object.ErrDenied, unix.ENOENT: object.ErrNotFound,
		unix.ESTALE: object.ErrChanged, unix.EIO: object.ErrUnavailable, unix.ETIMEDOUT: object.ErrUnavailable,
	} {
		err := sentinel(&os.PathError{Op: "open", Path: "a", Err: errno})
		if !errors.Is(err, want) || !errors.Is(err, errno) {
			t.Errorf("%v becomes %v", errno, err)
		}
	}
}

func TestRequestsAreObserved(t *testing.T) {
	root := t.TempDir()
	put(t, root, "a", make([]byte, 1000))
	var c source.Counter
	s, err := New(Config{Root: root, NodeKey: []byte("n"), Observer: &c})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	o, err := s.Head(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := read(t, s, o); err != nil {
		t.Fatal(err)
	}
	names(t, s, source.ListInput{})
	s.Head(t.Context(), "none")
	if c.Heads.Load() != 2 || c.Gets.Load() != 1 || c.Lists.Load() != 1 || c.Bytes.Load() != 1000 || c.Failures.Load() != 0 {
		t.Errorf("heads %d gets %d lists %d bytes %d failures %d", c.Heads.Load(), c.Gets.Load(), c.Lists.Load(), c.Bytes.Load(), c.Failures.Load())
	}
}
