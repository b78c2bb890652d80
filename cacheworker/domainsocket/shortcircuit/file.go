package shortcircuit

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/domainsocket/internal/wire"
	"github.com/larderfs/larder/cacheworker/object"
)

// File is one version of one object, open for reading under a lease: the worker keeps its
// bytes until Close. All methods are safe for concurrent use.
type File struct {
	c        *Client
	path     string
	opened   wire.Opened   // size, version and time of the version that was opened; Lease is not kept up
	renewing chan struct{} // of one: holds who asks for the lease again

	mu      sync.Mutex // guards the fields below; not held across I/O
	fd      *os.File   // nil: read by requests. Once set it stays until Close
	conn    *conn      // that the lease is held on
	lease   uint64
	changed bool
	closed  bool
	mapped  []byte
}

// Open opens a file: by its descriptor if the worker has all of it, else by requests.
func (c *Client) Open(ctx context.Context, path string) (*File, error) {
	f, err := c.open(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("open %.300q: %w", path, err)
	}
	return f, nil
}

func (c *Client) open(ctx context.Context, path string) (*File, error) {
	if err := wire.CheckPath(path); err != nil {
		return nil, err
	}
	g, err := c.ask(ctx, path, 0)
	if err != nil {
		return nil, err
	}
	f := &File{c: c, path: path, opened: g.opened, fd: g.fd, conn: g.conn, lease: g.opened.Lease, renewing: make(chan struct{}, 1)}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.files[f] = struct{}{}
	return f, nil
}

// grant is a lease, with a descriptor or without.
type grant struct {
	opened wire.Opened
	fd     *os.File
	conn   *conn
}

func (g grant) giveUp() {
	if g.fd != nil {
		g.fd.Close()
	}
	g.conn.release(g.opened.Lease)
}

// ask asks for a lease and checks what comes.
func (c *Client) ask(ctx context.Context, path string, flags uint8) (grant, error) {
	r, cn, err := c.call(ctx, wire.Open, wire.AppendString(append(wire.Frame(), flags), path))
	if err != nil {
		return grant{}, err
	}
	d := wire.NewDecoder(r.payload)
	g := grant{opened: d.Opened(), fd: r.fd, conn: cn}
	r.fd = nil
	r.drop()
	if err := d.Err(); err != nil {
		if g.fd != nil {
			g.fd.Close()
		}
		return grant{}, err
	}
	if err := check(g.fd, g.opened.Size); err != nil {
		g.giveUp()
		return grant{}, err
	}
	return g, nil
}

// check says whether a descriptor is what a worker gives: a regular file of the right size.
func check(fd *os.File, size int64) error {
	if fd == nil {
		return nil
	}
	fi, err := fd.Stat()
	if err != nil {
		return err
	}
	if !fi.Mode().IsRegular() || fi.Size() != size {
		return fmt.Errorf("descriptor of a %v of %d bytes for an object of %d: %w", fi.Mode(), fi.Size(), size, wire.ErrProtocol)
	}
	return nil
}

// Size is the size of the object in bytes.
func (f *File) Size() int64 { return f.opened.Size }

// Version is the version of the object that was opened.
func (f *File) Version() string { return f.opened.Version }

// ModTime is when the store says that the object was written.
func (f *File) ModTime() time.Time { return f.opened.ModTime }

// Local reports whether reads go to a descriptor, past the worker.
func (f *File) Local() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.fd != nil
}

// ReadAt is [File.ReadAtContext] that waits for ever.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	return f.ReadAtContext(context.Background(), p, off)
}

// ReadAtContext reads as io.ReaderAt does. ctx bounds how long it waits for the worker.
func (f *File) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read %.300q: %w: negative offset", f.path, object.ErrInvalid)
	}
	f.mu.Lock()
	fd, closed := f.fd, f.closed
	f.mu.Unlock()
	if closed {
		return 0, fmt.Errorf("read %.300q: %w", f.path, os.ErrClosed)
	}
	if fd != nil {
		return fd.ReadAt(p, off)
	}
	for n := 0; ; {
		if n == len(p) {
			return n, nil
		}
		if off+int64(n) >= f.opened.Size {
			return n, io.EOF
		}
		got, err := f.read(ctx, p[n:], off+int64(n))
		if err == nil && got == 0 {
			err = io.ErrUnexpectedEOF
		}
		if n += got; err != nil {
			return n, fmt.Errorf("read %.300q at %d: %w", f.path, off+int64(n), err)
		}
	}
}

// read reads what one request gives, or the descriptor if there is one by now.
func (f *File) read(ctx context.Context, p []byte, off int64) (int, error) {
	for try := 1; ; try++ {
		if err := f.renew(ctx); err != nil {
			return 0, err
		}
		f.mu.Lock()
		cn, lease, fd, closed, changed := f.conn, f.lease, f.fd, f.closed, f.changed
		f.mu.Unlock()
		switch {
		case closed:
			return 0, os.ErrClosed
		case fd != nil:
			n, err := fd.ReadAt(p, off)
			if err == io.EOF && n > 0 {
				err = nil
			}
			return n, err
		case changed:
			return 0, object.ErrChanged
		}
		n, err := cn.read(ctx, lease, p, off)
		if err == nil || !again(err, try) {
			return n, err
		}
	}
}

func (c *conn) read(ctx context.Context, lease uint64, p []byte, off int64) (int, error) {
	n := min(len(p), c.maxRead)
	b := wire.AppendUint64(wire.Frame(), lease)
	b = wire.AppendUint64(b, uint64(off))
	r, err := c.call(ctx, wire.Read, wire.AppendUint32(b, uint32(n)))
	if err != nil {
		return 0, err
	}
	defer r.drop()
	if len(r.payload) > n {
		return 0, fmt.Errorf("%d bytes for a read of %d: %w", len(r.payload), n, wire.ErrProtocol)
	}
	return copy(p, r.payload), nil
}

// renew asks for the lease again if its connection is gone, and takes the descriptor if
// there was none yet. Another version is object.ErrChanged, for good, unless there is a
// descriptor, which goes on working.
func (f *File) renew(ctx context.Context) error {
	if done, err := f.held(); done {
		return err
	}
	select {
	case f.renewing <- struct{}{}:
		defer func() { <-f.renewing }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	done, err := f.held()
	if done {
		return err
	}
	var flags uint8
	if f.Local() {
		flags = wire.OpenNoDescriptor
	}
	g, err := f.c.ask(ctx, f.path, flags)
	if err != nil {
		return err
	}
	return f.take(g)
}

// held says whether there is nothing to renew, and why.
func (f *File) held() (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.closed:
		return true, os.ErrClosed
	case f.changed && f.fd == nil:
		return true, object.ErrChanged
	}
	return f.changed || f.conn.alive(), nil
}

func (f *File) take(g grant) error {
	same := g.opened.Version == f.opened.Version && g.opened.Size == f.opened.Size
	f.mu.Lock()
	closed := f.closed
	if !closed && same {
		f.conn, f.lease = g.conn, g.opened.Lease
		if f.fd == nil {
			f.fd, g.fd = g.fd, nil
		}
	}
	f.changed = f.changed || !same
	f.mu.Unlock()
	switch {
	case closed:
		g.giveUp()
		return os.ErrClosed
	case !same:
		g.giveUp()
		if !f.Local() {
			return object.ErrChanged
		}
	case g.fd != nil:
		g.fd.Close()
	}
	return nil
}

// Mmap maps the file; object.ErrIncomplete if it has no descriptor. The slice is the same on
// each call and must be neither written to nor used after Close.
func (f *File) Mmap() ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.closed:
		return nil, fmt.Errorf("map %.300q: %w", f.path, os.ErrClosed)
	case f.mapped != nil:
		return f.mapped, nil
	case f.fd == nil:
		return nil, fmt.Errorf("map %.300q: %w", f.path, object.ErrIncomplete)
	case f.opened.Size == 0:
		return []byte{}, nil
	case int64(int(f.opened.Size)) != f.opened.Size:
		return nil, fmt.Errorf("map %.300q: %w: larger than the address space", f.path, object.ErrInvalid)
	}
	raw, err := f.fd.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("map %.300q: %w", f.path, err)
	}
	var b []byte
	cerr := raw.Control(func(fd uintptr) {
		b, err = unix.Mmap(int(fd), 0, int(f.opened.Size), unix.PROT_READ, unix.MAP_SHARED)
	})
	if cerr != nil || err != nil {
		return nil, fmt.Errorf("map %.300q: %w", f.path, firstOf(cerr, err))
	}
	f.mapped = b
	return b, nil
}

func firstOf(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// Close gives the lease up and unmaps the file. It does not wait for the worker.
func (f *File) Close() error {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return fmt.Errorf("close %.300q: %w", f.path, os.ErrClosed)
	}
	f.closed = true
	mapped, fd, cn, lease := f.mapped, f.fd, f.conn, f.lease
	f.mapped, f.fd = nil, nil
	f.mu.Unlock()

	f.c.mu.Lock()
	delete(f.c.files, f)
	f.c.mu.Unlock()
	cn.release(lease)
	var err error
	if mapped != nil {
		err = unix.Munmap(mapped)
	}
	if fd != nil {
		err = firstOf(err, fd.Close())
	}
	return err
}
