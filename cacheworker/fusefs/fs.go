// Package fusefs serves a volume's mount: one FUSE connection whose root holds data/, the
// dataset, and domain/, the node's worker.
//
// A node id is one incarnation of a file: (object, mode, cache file). Page cache and
// passthrough belong to the kernel's inode, hence bytes of two versions never mix, kept
// pages are always right, and an open of an incarnation that the name no longer leads to is
// answered with ESTALE, upon which the kernel looks the name up again within the same open(2).
//
// The node table lives in the mount's memfd, which the broker holds too: a worker that dies
// is followed by one that knows the same nodes.
package fusefs

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/dataset"
	"github.com/larderfs/larder/cacheworker/metadata"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/telemetry"
)

// Broker is what a mount asks of the broker.
type Broker interface {
	// Register makes f the backing file of passthrough reads and returns its id in the kernel.
	Register(ctx context.Context, volumeID string, node uint64, f *os.File) (int32, error)
	Unregister(ctx context.Context, volumeID string, backing int32) error
	// Replace hands over a compacted memfd.
	Replace(ctx context.Context, volumeID string, memfd *os.File) error
}

// Features are what a kernel may have; one that is disabled is not asked for.
type Features struct {
	Passthrough bool
	Resend      bool
	Splice      bool
}

// Config of a mount.
type Config struct {
	Volume   brokerwire.Volume
	Dataset  *dataset.Dataset
	Broker   Broker
	Features Features // wanted; what was negotiated may be less
	Counters *Counters
	Tracer   *telemetry.Tracer
	Log      *slog.Logger

	logRequests bool // for tests that count them
	allowWrites bool // takes a lock off, for its test: open for writing is not refused
}

// errnos is the whole mapping; what it does not list is EIO.
var errnos = []struct {
	err   error
	errno fuse.Status
}{
	{object.ErrNotFound, fuse.ENOENT},
	{object.ErrChanged, fuse.Status(syscall.ESTALE)},
	{object.ErrDenied, fuse.EACCES},
	{context.Canceled, fuse.EINTR},
	{context.DeadlineExceeded, fuse.Status(syscall.ETIMEDOUT)},
	{object.ErrInvalid, fuse.EINVAL},
}

const (
	erofs  = fuse.Status(syscall.EROFS)
	estale = fuse.Status(syscall.ESTALE)

	maxName      = 255       // bytes
	attrTimeout  = time.Hour // of a node: an incarnation's attributes never change
	interruptLag = 2 * time.Second
)

// Mount is a volume's file system. It is a fuse.RawFileSystem.
type Mount struct {
	fuse.RawFileSystem // answers ENOSYS to what is not here
	cfg                Config
	table              *table
	data               atomic.Pointer[dataset.Dataset]
	pass               atomic.Bool // passthrough was negotiated, and this broker has not refused it since
	negotiated         bool        // passthrough was
	resend             bool        // RESEND was negotiated
	inherited          sync.Once   // an earlier worker's request was answered

	trouble trouble
	rows    rows
	orders  orders
	brought brought

	notify func(message []byte) error                               // tells the kernel; nil where it cannot expire names
	store  func(node uint64, offset int64, data []byte) fuse.Status // puts bytes into the kernel's page cache

	told map[uint32]uint64 // by thread: the node whose open was answered ESTALE; guarded by table.mu

	dirMu   sync.Mutex // guards dirs
	dirs    map[uint64]*dirStream
	nextDir uint64

	bindMu sync.Mutex // guards uuid
	uuid   string     // name of the socket that may be bound

	backMu     sync.Mutex     // guards ended
	ended      bool           // nothing is started in the background any more
	background sync.WaitGroup // requests to the broker that no caller waits for
	closed     context.Context
	close      context.CancelFunc
}

func newMount(cfg Config, log *os.File, uuid string) *Mount {
	m := &Mount{
		RawFileSystem: fuse.NewDefaultRawFileSystem(),
		cfg:           cfg,
		table:         newTable(log),
		told:          map[uint32]uint64{},
		dirs:          map[uint64]*dirStream{},
		nextDir:       uint64(time.Now().UnixNano()), // none of an earlier worker's, which the kernel may still have
		uuid:          uuid,
	}
	m.data.Store(cfg.Dataset)
	if cfg.Volume.Path == "" { // or it is one of those that the log has
		o, _ := cfg.Dataset.Origin("")
		m.table.setOrigins([]origin{{Origin: o}})
	}
	m.closed, m.close = context.WithCancel(context.Background())
	m.table.grown = func() { m.later(m.compact) }
	return m
}

// later runs f in the background, unless the mount has ended.
func (m *Mount) later(f func()) {
	m.backMu.Lock()
	defer m.backMu.Unlock()
	if !m.ended {
		m.background.Go(f)
	}
}

// finish waits for what runs in the background.
func (m *Mount) finish() {
	m.close()
	m.backMu.Lock()
	m.ended = true
	m.backMu.Unlock()
	m.background.Wait()
}

// compact makes the node table's log as small as what is alive, and hands it to the broker.
func (m *Mount) compact() {
	fresh, err := m.table.startCompaction()
	if err == nil {
		err = m.cfg.Broker.Replace(m.closed, m.cfg.Volume.ID, fresh)
		if m.closed.Err() != nil {
			return // the broker may have taken it or not: both logs are written to the end
		}
	}
	if err != nil {
		m.cfg.Log.Warn("compact node table", "volume", m.cfg.Volume.ID, "err", err)
	}
	m.table.settle(err == nil)
}

// SetDataset gives the mount new credentials, or what is mounted now at its path of the namespace. Files
// that are open are read to their end; the kernel asks again for the names where mounts began or begin.
func (m *Mount) SetDataset(d *dataset.Dataset) {
	before := m.data.Swap(d)
	if changed := d.Joined(before); len(changed) > 0 {
		m.later(func() { m.expire(changed) })
	}
}

// String is the name go-fuse shows.
func (m *Mount) String() string { return "larder" }

// status maps an error to what the kernel is told, and logs what no table foresaw.
func (m *Mount) status(op string, n *node, err error) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	for _, e := range errnos {
		if errors.Is(err, e.err) {
			if e.err == object.ErrDenied {
				m.trouble.note(err)
				m.logFailure(slog.LevelWarn, "denied", op, syscall.EACCES, err)
			}
			if e.err == object.ErrChanged || e.err == object.ErrNotFound {
				return e.errno
			}
			return m.cfg.Counters.failures.note(e.errno)
		}
	}
	m.trouble.note(err)
	m.logFailure(slog.LevelError, "a request failed", op, syscall.EIO, err)
	return m.cfg.Counters.failures.note(fuse.EIO)
}

// requestContext ends when the mount does, or two seconds after an INTERRUPT: a profiler's
// timer must not become an I/O error (DESIGN §4.3).
func (m *Mount) requestContext(cancel <-chan struct{}, op int) (context.Context, context.CancelFunc) {
	traced, span := m.cfg.Tracer.Start(m.closed, spans[op])
	span.Text("volume", m.cfg.Volume.ID)
	r := &request{Context: traced, interrupted: cancel}
	if !span.Recorded() {
		return r, r.end
	}
	return r, func() { r.end(); span.End(nil) }
}

// request is the context of one. Most are answered without waiting for anything: only who waits has it
// watched whether it is interrupted.
type request struct {
	context.Context // the mount's
	interrupted     <-chan struct{}

	mu      sync.Mutex      // guards the fields below
	watched context.Context // nil unless somebody has waited
	stop    context.CancelFunc
	ended   bool
}

// watch makes the context that ends with an INTERRUPT.
func (r *request) watch() context.Context {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.watched != nil {
		return r.watched
	}
	r.watched, r.stop = context.WithCancel(r.Context)
	if r.ended {
		r.stop()
		return r.watched
	}
	go func(ctx context.Context, stop context.CancelFunc) {
		select {
		case <-ctx.Done():
			return
		case <-r.interrupted:
		}
		t := time.NewTimer(interruptLag)
		defer t.Stop()
		select {
		case <-ctx.Done():
		case <-t.C:
			stop()
		}
	}(r.watched, r.stop)
	return r.watched
}

func (r *request) Done() <-chan struct{} { return r.watch().Done() }
func (r *request) Err() error            { return r.now().Err() }
func (r *request) Value(key any) any     { return r.now().Value(key) }

// now is the mount's as long as that says the same.
func (r *request) now() context.Context {
	r.mu.Lock()
	same := r.watched == nil && !r.ended
	r.mu.Unlock()
	if same {
		return r.Context
	}
	return r.watch()
}

func (r *request) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = true
	if r.stop != nil {
		r.stop()
	}
}

// Lookup implements fuse.RawFileSystem.
func (m *Mount) Lookup(cancel <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	parent := m.table.get(h.NodeId)
	if parent == nil {
		return estale
	}
	if len(name) > maxName {
		return fuse.Status(syscall.ENAMETOOLONG)
	}
	switch parent.kind {
	case rootKind, domainKind:
		return m.lookupFixed(parent, name, out)
	case dirKind:
	default:
		return fuse.ENOTDIR
	}
	ctx, stop := m.requestContext(cancel, opLookup)
	defer stop()
	d := m.data.Load()
	e, err := d.Lookup(ctx, parent.key, name, d.Freshness)
	if errors.Is(err, object.ErrNotFound) {
		return m.negative(out, e.At)
	}
	if err != nil {
		return m.status("lookup", parent, err)
	}
	m.table.mu.Lock()
	defer m.table.mu.Unlock()
	m.table.gather()
	defer m.table.flush()
	n, err := m.enter(d, parent, e)
	if err != nil {
		return m.status("lookup", parent, err)
	}
	m.entryOut(n, e.At, out)
	return fuse.OK
}

func (m *Mount) freshness() time.Duration { return m.data.Load().Freshness }

// negative tells the kernel that there is no such name, for as long as that may be believed.
func (m *Mount) negative(out *fuse.EntryOut, at time.Time) fuse.Status {
	valid := m.validFor(at)
	if valid <= 0 {
		return fuse.ENOENT
	}
	*out = fuse.EntryOut{}
	out.SetEntryTimeout(valid)
	return fuse.OK
}

func (m *Mount) validFor(at time.Time) time.Duration {
	if at.IsZero() {
		return 0
	}
	return max(0, m.freshness()-time.Since(at))
}

func (m *Mount) lookupFixed(parent *node, name string, out *fuse.EntryOut) fuse.Status {
	m.table.mu.Lock()
	defer m.table.mu.Unlock()
	n := m.table.names.get(parent, name)
	if n == nil {
		return fuse.ENOENT
	}
	m.entryOut(n, time.Time{}, out)
	out.SetEntryTimeout(attrTimeout) // connect() must not need a worker
	return fuse.OK
}

// enter is the node for what a name leads to now, as d has it. Requires table.mu.
func (m *Mount) enter(d *dataset.Dataset, parent *node, e metadata.Entry) (*node, error) {
	if e.Folder {
		return m.table.folder(parent, e.Name), nil
	}
	o, err := m.table.originOf(d, parent.key)
	if err != nil {
		return nil, err
	}
	id := e.Object.ID()
	n := m.table.incarnation(parent, o, e.Object, e.Name, m.wantedMode(e.Object.Size, func() object.ID { return id }), e.At, m.usable)
	n.file.ino = inode(id)
	return n, nil
}

// smallFile is the size up to which a file is not passed through: that would take a message to the broker and two calls of
// the kernel for each, and save a READ or two, after which its pages are cached anyway.
const smallFile = 64 << 10

// wantedMode is passthrough for what can be passed through now, and is worth it.
func (m *Mount) wantedMode(size int64, id func() object.ID) mode {
	if size > smallFile && m.pass.Load() && m.data.Load().Peek(id()).Complete {
		return passthrough
	}
	return cached
}

// usable reports whether a file's node goes on although a new one would be in the other mode:
// the kernel still holds the backing file of a passthrough node that was evicted.
func (m *Mount) usable(f *file) bool { return f.mode == passthrough && f.backing != 0 }

// entryOut fills in a reply that gives the kernel a reference. Requires table.mu.
func (m *Mount) entryOut(n *node, at time.Time, out *fuse.EntryOut) {
	m.table.referenced(n)
	if n.file != nil {
		n.file.looked = true
	}
	out.NodeId = n.id
	out.Generation = 1
	out.SetEntryTimeout(m.validFor(at))
	out.SetAttrTimeout(attrTimeout)
	m.attr(n, &out.Attr)
}

func (m *Mount) attr(n *node, a *fuse.Attr) {
	v := &m.cfg.Volume
	a.Owner = fuse.Owner{Uid: v.UID, Gid: v.GID}
	a.Nlink = 1
	a.Blksize = 1 << 20
	switch n.kind {
	case fileKind:
		a.Mode = syscall.S_IFREG | v.FileMode
		a.Size = uint64(n.file.size)
		a.Blocks = (a.Size + 511) / 512
		mtime := time.Unix(0, n.file.mtime)
		a.SetTimes(nil, &mtime, &mtime)
		if a.Ino = n.file.ino; a.Ino == 0 { // it was read from the log
			a.Ino = inode(m.table.objectOf(n).ID())
		}
	case socketKind:
		a.Mode = syscall.S_IFSOCK | 0o666
		a.Ino = n.id
	case rootKind, domainKind:
		a.Mode = syscall.S_IFDIR | 0o555
		a.Nlink = 2
		a.Ino = n.id
	default:
		a.Mode = syscall.S_IFDIR | v.DirMode
		a.Nlink = 2
		a.Ino = n.id
	}
}

// inode makes a number from a hash: the same for the same object, and never one of a folder.
func inode(id object.ID) uint64 {
	return binary.BigEndian.Uint64(id[:])&(1<<63-1) | 1<<62
}

// GetAttr implements fuse.RawFileSystem.
func (m *Mount) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	m.table.mu.RLock()
	defer m.table.mu.RUnlock()
	n := m.table.nodes.get(in.NodeId)
	if n == nil {
		return estale
	}
	m.attr(n, &out.Attr)
	out.SetTimeout(attrTimeout)
	return fuse.OK
}

// Forget implements fuse.RawFileSystem.
func (m *Mount) Forget(id, count uint64) {
	n := m.table.forget(id, count)
	if n != nil && n.file != nil {
		m.letGo(n)
	}
}

// letGo gives up what a node that has gone still held.
func (m *Mount) letGo(n *node) {
	m.table.mu.Lock()
	r, backing := n.file.reader, n.file.backing
	n.file.reader = nil
	if backing != 0 {
		m.table.setBacking(n, 0)
	}
	m.table.mu.Unlock()
	if r != nil {
		r.Close()
	}
	m.unregister(backing)
}

func (m *Mount) unregister(backing int32) {
	if backing == 0 {
		return
	}
	m.later(func() {
		if err := m.cfg.Broker.Unregister(m.closed, m.cfg.Volume.ID, backing); err != nil && m.closed.Err() == nil {
			m.cfg.Log.Warn("close backing file", "volume", m.cfg.Volume.ID, "backing", backing, "err", err)
		}
	})
}

// Evicted says that the cache file of an object was unlinked. Its passthrough nodes end;
// while one is open it goes on with the file that the kernel holds.
func (m *Mount) Evicted(id object.ID) {
	var backings []int32
	m.table.mu.Lock()
	if m.table.foreign { // CatchUp will see it
		m.table.mu.Unlock()
		return
	}
	for _, n := range slices.Clone(m.table.backed[id]) {
		n.file.evicted = true
		backings = append(backings, m.retire(n))
	}
	m.table.mu.Unlock()
	for _, b := range backings {
		m.unregister(b)
	}
}

// retire takes the backing file from a node whose cache file was evicted, once nobody has it
// open. It returns the id to unregister, 0 for none. Requires table.mu.
func (m *Mount) retire(n *node) int32 {
	f := n.file
	if !f.evicted || f.opens > 0 || f.backing == 0 {
		return 0
	}
	id := f.backing
	m.table.setBacking(n, 0)
	f.stale = true
	return id
}

// StatFs implements fuse.RawFileSystem. The size is the cache's: a dataset's own is not known
// without listing all of it.
func (m *Mount) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	total, used := m.data.Load().Capacity()
	const bsize = 4096
	out.Bsize, out.Frsize, out.NameLen = bsize, bsize, maxName
	out.Blocks = uint64(total / bsize)
	out.Bfree = uint64(max(0, total-used) / bsize)
	return fuse.OK // Bavail is 0: nobody can write here
}

// Access implements fuse.RawFileSystem; the kernel checks (default_permissions).
func (m *Mount) Access(<-chan struct{}, *fuse.AccessIn) fuse.Status { return fuse.ENOSYS }

// Mknod lets the broker, and nobody else, bind the worker's socket.
func (m *Mount) Mknod(_ <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	m.bindMu.Lock()
	uuid := m.uuid
	m.bindMu.Unlock()
	if in.NodeId != domainID || in.Mode&syscall.S_IFMT != syscall.S_IFSOCK || in.Uid != 0 || name != uuid {
		return erofs
	}
	m.table.mu.Lock()
	defer m.table.mu.Unlock()
	if m.table.names.get(m.table.nodes.get(domainID), name) != nil && !resent(&in.InHeader) {
		return fuse.Status(syscall.EEXIST)
	}
	n := m.table.socket(name)
	m.entryOut(n, time.Time{}, out)
	return fuse.OK
}

// Unlink lets the broker bind the socket anew: the one before it died with the listener in its hands. The
// kernel does not say whose request it is (FUSE_ALLOW_IDMAP); but the file system is read-only for all
// while the broker does not bind, and the folder is root's to write.
func (m *Mount) Unlink(_ <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	m.bindMu.Lock()
	uuid := m.uuid
	m.bindMu.Unlock()
	if in.NodeId != domainID || name != uuid {
		return erofs
	}
	m.table.mu.Lock()
	defer m.table.mu.Unlock()
	n := m.table.names.get(m.table.nodes.get(domainID), name)
	if n == nil && !resent(in) {
		return fuse.ENOENT
	}
	if n != nil {
		m.table.names.remove(n)
	}
	return fuse.OK
}

// What would change something is refused; a published mount is read-only anyway.

func (m *Mount) SetAttr(<-chan struct{}, *fuse.SetAttrIn, *fuse.AttrOut) fuse.Status { return erofs }
func (m *Mount) Mkdir(<-chan struct{}, *fuse.MkdirIn, string, *fuse.EntryOut) fuse.Status {
	return erofs
}
func (m *Mount) Rmdir(<-chan struct{}, *fuse.InHeader, string) fuse.Status          { return erofs }
func (m *Mount) Rename(<-chan struct{}, *fuse.RenameIn, string, string) fuse.Status { return erofs }
func (m *Mount) Link(<-chan struct{}, *fuse.LinkIn, string, *fuse.EntryOut) fuse.Status {
	return erofs
}
func (m *Mount) Symlink(<-chan struct{}, *fuse.InHeader, string, string, *fuse.EntryOut) fuse.Status {
	return erofs
}
func (m *Mount) Create(<-chan struct{}, *fuse.CreateIn, string, *fuse.CreateOut) fuse.Status {
	return erofs
}
func (m *Mount) Tmpfile(<-chan struct{}, *fuse.CreateIn, *fuse.CreateOut) fuse.Status { return erofs }
func (m *Mount) SetXAttr(<-chan struct{}, *fuse.SetXAttrIn, string, []byte) fuse.Status {
	return erofs
}
func (m *Mount) RemoveXAttr(<-chan struct{}, *fuse.InHeader, string) fuse.Status { return erofs }
func (m *Mount) Write(<-chan struct{}, *fuse.WriteIn, []byte) (uint32, fuse.Status) {
	return 0, erofs
}
func (m *Mount) Fallocate(<-chan struct{}, *fuse.FallocateIn) fuse.Status { return erofs }
