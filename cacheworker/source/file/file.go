// Package file reads a folder of this machine, which may be an NFS export.
//
// Nothing outside the folder can be named: paths are resolved below its descriptor, and a
// symbolic link that leads out of it does not exist. A byte that Get yields belongs to the
// version that was asked for: the file's times, inode and size are compared after each piece
// was read and before it is handed out. A writer through mmap escapes that, because the kernel
// does not stamp each of its writes.
package file

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

// Config of a source.
type Config struct {
	Root     string          // how to open the folder; may be /proc/self/fd/N
	Name     string          // its absolute path, for the store's identity; "" means Root
	NodeKey  []byte          // of the principal
	Observer source.Observer // nil means nobody
}

// Source is one folder, read as this process.
type Source struct {
	root      *os.Root
	store     object.Store
	principal object.Principal
	observer  source.Observer
	lists     lists
}

var _ source.Source = (*Source)(nil)

// New opens the folder. Call Close.
func New(cfg Config) (*Source, error) {
	if cfg.Name == "" {
		cfg.Name = cfg.Root
	}
	if !filepath.IsAbs(cfg.Root) || !filepath.IsAbs(cfg.Name) {
		return nil, fmt.Errorf("%w: root %q: want an absolute path", object.ErrInvalid, cfg.Name)
	}
	if len(cfg.NodeKey) == 0 {
		return nil, fmt.Errorf("%w: no node key", object.ErrInvalid)
	}
	if cfg.Observer == nil {
		cfg.Observer = source.Unobserved{}
	}
	s := &Source{
		store:     object.Store("file://" + filepath.Clean(cfg.Name)),
		principal: source.Ambient(cfg.NodeKey),
		observer:  cfg.Observer,
	}
	var err error
	if s.root, err = os.OpenRoot(cfg.Root); err != nil {
		return nil, fmt.Errorf("open %s: %w", s.store, sentinel(err))
	}
	return s, nil
}

// Close gives the folder up. Readers that are open go on.
func (s *Source) Close() error { return s.root.Close() }

// Store is the folder.
func (s *Source) Store() object.Store { return s.store }

// Principal is the worker itself.
func (s *Source) Principal() object.Principal { return s.principal }

// Head looks at one file.
func (s *Source) Head(ctx context.Context, key string) (_ object.Object, err error) {
	defer s.observe(source.Head, time.Now(), &err)
	if err := check(ctx, key); err != nil {
		return object.Object{}, err
	}
	info, err := s.root.Stat(key)
	if err != nil {
		return object.Object{}, s.wrap("head", key, err)
	}
	if !info.Mode().IsRegular() {
		return object.Object{}, fmt.Errorf("head %q in %s: %w: it is no file", key, s.store, object.ErrNotFound)
	}
	return s.object(key, info), nil
}

func check(ctx context.Context, key string) error {
	if err := source.CheckKey(key); err != nil {
		return err
	}
	return context.Cause(ctx)
}

func (s *Source) object(key string, info fs.FileInfo) object.Object {
	return object.Object{Store: s.store, Key: key, Version: version(info), Size: info.Size(), ModTime: info.ModTime().UTC()}
}

func version(info fs.FileInfo) string {
	st := info.Sys().(*syscall.Stat_t)
	return fmt.Sprintf("mtime:%x-%x-%x-%x", st.Mtim.Nano(), st.Ctim.Nano(), st.Ino, st.Size)
}

// Get reads a range of one version.
func (s *Source) Get(ctx context.Context, obj object.Object, off, n int64) (_ io.ReadCloser, err error) {
	defer s.observe(source.Get, time.Now(), &err)
	if err := check(ctx, obj.Key); err != nil {
		return nil, err
	}
	if err := source.CheckRange(obj, off, n); err != nil {
		return nil, err
	}
	f, err := s.open(obj.Key)
	if err != nil {
		return nil, s.wrap("get", obj.Key, err)
	}
	r := &reader{ctx: ctx, src: s, f: f, obj: obj, off: off, left: n}
	if err := r.settle(); err != nil {
		f.Close()
		return nil, err
	}
	return r, nil
}

// open opens a regular file; a fifo or a device is looked at first, for opening one may block
// or do something.
func (s *Source) open(key string) (*os.File, error) {
	info, err := s.root.Stat(key)
	if err == nil && !info.Mode().IsRegular() {
		err = unix.ENOENT
	}
	if err != nil {
		return nil, err
	}
	return s.root.OpenFile(key, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
}

// tick bounds how coarse the clock is that stamps files: two writes within it can leave the
// same times behind.
const tick = 20 * time.Millisecond

// reader is a range that is being read.
type reader struct {
	ctx  context.Context // of Get: a reader cannot be handed one with each Read
	src  *Source
	f    *os.File
	obj  object.Object
	off  int64
	left int64
}

// settle waits until a further write must leave another time behind, and checks the version.
func (r *reader) settle() error {
	info, err := r.f.Stat()
	if err != nil {
		return r.src.wrap("get", r.obj.Key, err)
	}
	age := time.Since(time.Unix(0, info.Sys().(*syscall.Stat_t).Ctim.Nano()))
	if age < tick {
		t := time.NewTimer(min(tick-age, tick))
		defer t.Stop()
		select {
		case <-t.C:
		case <-r.ctx.Done():
			return context.Cause(r.ctx)
		}
	}
	return r.same()
}

// same returns an error unless the file is still the version that is being read.
func (r *reader) same() error {
	info, err := r.f.Stat()
	if err != nil {
		return r.src.wrap("get", r.obj.Key, err)
	}
	if now := version(info); now != r.obj.Version || !info.Mode().IsRegular() {
		return fmt.Errorf("get %q in %s: %w: its version is now %q, not %q", r.obj.Key, r.src.store, object.ErrChanged, now, r.obj.Version)
	}
	return nil
}

func (r *reader) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	if err := context.Cause(r.ctx); err != nil {
		return 0, fmt.Errorf("get %q in %s: %w", r.obj.Key, r.src.store, err)
	}
	n, err := r.f.ReadAt(p[:min(int64(len(p)), r.left)], r.off)
	if same := r.same(); same != nil {
		return 0, same
	}
	if err != nil {
		return 0, r.src.wrap("get", r.obj.Key, err)
	}
	r.off += int64(n)
	r.left -= int64(n)
	r.src.observer.Received(n)
	return n, nil
}

func (r *reader) Close() error { return r.f.Close() }

func (s *Source) wrap(what, key string, err error) error {
	return fmt.Errorf("%s %q in %s: %w", what, key, s.store, sentinel(err))
}

// errnos is the whole mapping; other errnos are ErrUnavailable.
var errnos = []struct {
	errno syscall.Errno
	err   error
}{
	{unix.ENOENT, object.ErrNotFound},
	{unix.ENOTDIR, object.ErrNotFound},
	{unix.ELOOP, object.ErrNotFound},
	{unix.ENAMETOOLONG, object.ErrNotFound},
	{unix.EACCES, object.ErrDenied},
	{unix.EPERM, object.ErrDenied},
	{unix.ESTALE, object.ErrChanged}, // NFS: it was removed on the server
}

func sentinel(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		for _, e := range errnos {
			if e.errno == errno {
				return fmt.Errorf("%w: %w", e.err, err)
			}
		}
		return fmt.Errorf("%w: %w", object.ErrUnavailable, err)
	}
	var path *fs.PathError
	if errors.As(err, &path) { // os.Root's own: the path leads out of the folder
		return fmt.Errorf("%w: %w", object.ErrNotFound, err)
	}
	return fmt.Errorf("%w: %w", object.ErrUnavailable, err)
}

// observe reports a request that began at start and ended as *err says: what the file system
// refused is an answer, only that it could not be asked is not.
func (s *Source) observe(kind source.Kind, start time.Time, err *error) {
	how := source.OK
	switch {
	case errors.Is(*err, object.ErrUnavailable):
		how = source.NoAnswer
	case errors.Is(*err, object.ErrNotFound) || errors.Is(*err, object.ErrChanged):
		how = source.Absent
	case *err != nil:
		how = source.Refused
	}
	s.observer.Requested(kind, time.Since(start), how)
}

// local turns a prefix into a path that os.Root understands.
func local(prefix string) string {
	if prefix == "" {
		return "."
	}
	return strings.TrimSuffix(prefix, "/")
}
