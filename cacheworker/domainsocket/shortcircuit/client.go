// Package shortcircuit reads a Larder volume through the domain socket of its node's worker:
// files that the cache has completely by their descriptor, at the speed of the local page
// cache and without the worker's CPU, others by bytes in the replies.
//
//	path, err := shortcircuit.Find("/mnt/dataset/domain")
//	c, err := shortcircuit.Dial(ctx, path)
//	f, err := c.Open(ctx, "2026/part-0.parquet")
//	n, err := f.ReadAt(p, off)
//
// A worker that is restarted is not noticed: requests wait for the next one, leases are asked
// for again, and a descriptor in hand goes on working. What a [File] reads is one version of
// the object; where that version is gone, reads end with object.ErrChanged. Errors wrap the
// sentinels of package object.
//
// The package imports the standard library, x/sys and leaves of this module only.
package shortcircuit

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/larderfs/larder/cacheworker/domainsocket/internal/wire"
	"github.com/larderfs/larder/cacheworker/object"
)

// ErrVersion means that this client and the worker have no version of the protocol in common.
var ErrVersion = wire.ErrVersion

// Entry is one file or folder.
type Entry struct {
	Name        string // its last segment; "" for the root
	Folder      bool
	Size        int64     // bytes; 0 for a folder
	Version     string    // of the object; "" for a folder
	ModTime     time.Time // zero where the store gives none
	CachedBytes int64     // of Size, in the worker's cache at that moment
}

// Status is what a worker says of itself.
type Status struct {
	Volume        string // CSI volume id
	Worker        string // its UUID, the name of the socket
	CachedBytes   int64  // of the worker's whole cache
	CapacityBytes int64
	Connections   uint32 // of clients to this volume
	Leases        uint32 // of all clients of this volume
}

// Find gives the path of the socket in the domain folder of a mount, MOUNT/domain: the one
// socket that is named by a UUID. object.ErrNotFound if there is none.
func Find(dir string) (string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	var found []string
	for _, e := range entries {
		if e.Type()&os.ModeType == os.ModeSocket && isUUID(e.Name()) {
			found = append(found, filepath.Join(dir, e.Name()))
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return "", fmt.Errorf("no domain socket in %s: %w", dir, object.ErrNotFound)
	}
	return "", fmt.Errorf("%w: %d domain sockets in %s", object.ErrInvalid, len(found), dir)
}

func isUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i, r := range []byte(s) {
		dash := i == 8 || i == 13 || i == 18 || i == 23
		hex := r >= '0' && r <= '9' || r >= 'a' && r <= 'f' || r >= 'A' && r <= 'F'
		if dash && r != '-' || !dash && !hex {
			return false
		}
	}
	return true
}

// Client is a connection to the worker, made again when it breaks. All methods are safe for
// concurrent use; requests share the connection and do not wait for each other.
type Client struct {
	path    string
	life    context.Context // ends with Close: for what no caller waits for
	end     context.CancelFunc
	dialing chan struct{} // of one: holds who dials
	running sync.WaitGroup

	mu     sync.Mutex // guards the fields below; not held across I/O
	cur    *conn      // nil, or dead, until somebody dials
	files  map[*File]struct{}
	closed bool
}

// Dial connects to the socket at path, however long that is. While the worker is away it
// waits for the next one, until ctx ends.
func Dial(ctx context.Context, path string) (*Client, error) {
	c := newClient(path)
	if _, err := c.conn(ctx); err != nil {
		c.end()
		return nil, err
	}
	return c, nil
}

func newClient(path string) *Client {
	c := &Client{path: path, dialing: make(chan struct{}, 1), files: map[*File]struct{}{}}
	c.life, c.end = context.WithCancel(context.Background())
	return c
}

// Close closes the connection, which gives up all leases. Files that have a descriptor can
// be read until they are closed themselves.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closed = true
	cur := c.cur
	c.mu.Unlock()
	c.end()
	if cur != nil {
		cur.uc.Close()
	}
	c.running.Wait()
	return nil
}

// Stat says what is at path. "" is the root of the volume's data.
func (c *Client) Stat(ctx context.Context, path string) (Entry, error) {
	e, err := c.stat(ctx, path)
	if err != nil {
		return Entry{}, fmt.Errorf("stat %.300q: %w", path, err)
	}
	return e, nil
}

func (c *Client) stat(ctx context.Context, path string) (Entry, error) {
	if err := wire.CheckPath(path); err != nil {
		return Entry{}, err
	}
	r, _, err := c.call(ctx, wire.Stat, wire.AppendString(wire.Frame(), path))
	if err != nil {
		return Entry{}, err
	}
	defer r.drop()
	d := wire.NewDecoder(r.payload)
	return Entry(d.Entry()), d.Err()
}

// List gives at most limit entries of a folder behind the name after ("" = from the start), in key
// order, and whether there are more; 0 means as many as the worker likes to give at a time.
// It gives at least one, unless there are none.
func (c *Client) List(ctx context.Context, path, after string, limit int) (entries []Entry, more bool, err error) {
	entries, more, err = c.list(ctx, path, after, limit)
	if err != nil {
		return nil, false, fmt.Errorf("list %.300q: %w", path, err)
	}
	return entries, more, nil
}

func (c *Client) list(ctx context.Context, path, after string, limit int) ([]Entry, bool, error) {
	err := wire.CheckPath(path)
	if err == nil && after != "" {
		err = wire.CheckName(after)
	}
	if err != nil {
		return nil, false, err
	}
	n := uint32(min(max(limit, 0), 1<<20))
	frame := wire.AppendString(wire.AppendString(wire.AppendUint32(wire.Frame(), n), after), path)
	r, _, err := c.call(ctx, wire.List, frame)
	if err != nil {
		return nil, false, err
	}
	defer r.drop()
	d := wire.NewDecoder(r.payload)
	more := d.Uint8() != 0
	var entries []Entry
	for n := d.Uint32(); n > 0 && d.Err() == nil; n-- {
		entries = append(entries, Entry(d.Entry()))
	}
	if err := d.Err(); err != nil {
		return nil, false, err
	}
	return entries, more, nil
}

// Status asks the worker how it is.
func (c *Client) Status(ctx context.Context) (Status, error) {
	r, _, err := c.call(ctx, wire.Status, wire.Frame())
	if err != nil {
		return Status{}, fmt.Errorf("status: %w", err)
	}
	defer r.drop()
	d := wire.NewDecoder(r.payload)
	return Status(d.State()), d.Err()
}

// call asks the worker, again if the connection breaks: every request may be repeated.
func (c *Client) call(ctx context.Context, t wire.Type, frame []byte) (reply, *conn, error) {
	for try := 1; ; try++ {
		cn, err := c.conn(ctx)
		if err != nil {
			return reply{}, nil, err
		}
		r, err := cn.call(ctx, t, frame)
		if err == nil || !again(err, try) {
			return r, cn, err
		}
	}
}

// again says whether a request whose connection broke is tried on a new one. That may break
// too: a worker that is told to end has accepted it.
func again(err error, try int) bool { return errors.Is(err, errLost) && try < 3 }

// conn is the connection in use; it dials if there is none. Several callers dial once.
func (c *Client) conn(ctx context.Context) (*conn, error) {
	if cn, err := c.live(); cn != nil || err != nil {
		return cn, err
	}
	select {
	case c.dialing <- struct{}{}:
		defer func() { <-c.dialing }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if cn, err := c.live(); cn != nil || err != nil {
		return cn, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(c.life, func() { cancel(net.ErrClosed) })()
	cn, err := dial(ctx, c.path)
	for try := 1; err != nil && again(err, try); try++ { // a worker that ended had accepted us
		cn, err = dial(ctx, c.path)
	}
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", c.path, err)
	}
	return cn, c.use(cn)
}

// live is the connection in use if it is any.
func (c *Client) live() (*conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, net.ErrClosed
	}
	if c.cur != nil && c.cur.alive() {
		return c.cur, nil
	}
	return nil, nil
}

func (c *Client) use(cn *conn) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		cn.uc.Close()
		return net.ErrClosed
	}
	c.cur = cn
	c.running.Go(func() {
		cn.run()
		cn.abandoned.Wait()
		c.restore(cn)
	})
	return nil
}

// restore asks for the leases again that were lost with a connection, so that the files
// stay in the cache. Where that fails, the next read of each file tries itself.
func (c *Client) restore(lost *conn) {
	if !lost.answered {
		return // whatever answers there ends connections: not in a loop
	}
	c.mu.Lock()
	var files []*File
	for f := range c.files {
		files = append(files, f)
	}
	c.mu.Unlock()
	for _, f := range files {
		if err := f.renew(c.life); errors.Is(err, object.ErrUnavailable) || c.life.Err() != nil {
			return
		}
	}
}
