package fusefs

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/fill"
	"github.com/larderfs/larder/cacheworker/object"
)

// Fixed node ids. Others are never used twice within a mount.
const (
	rootID    = 1 // FUSE_ROOT_ID
	dataID    = 2
	domainID  = 3
	firstFree = 16
)

type kind uint8

const (
	dirKind    kind = iota + 1 // a folder below data/
	fileKind                   // an incarnation of a file
	rootKind                   // the mount's root
	domainKind                 // domain/
	socketKind                 // domain/<uuid>
)

// mode is how a file's node is read. It is the node's for ever: the kernel cannot mix both
// on one inode.
type mode uint8

const (
	cached      mode = iota // READs come to us, the pages are kept in the mount's page cache
	passthrough             // the kernel reads the backing file
)

// node is what a FUSE node id stands for: a path, or one incarnation of a file, that is
// (object, mode, cache file).
type node struct {
	id     uint64
	parent *node
	name   string
	key    string // of a folder: its path below data/, "" or ending in "/"
	kind   kind
	file   *file // of fileKind

	lookups  uint64 // references the kernel holds
	pins     int32  // open directories whose position it may be
	kids     int32  // nodes in the table that have it as parent
	sameHash *node  // in a nameMap
}

// file is the part of a node that only files have.
type file struct {
	version string
	size    int64
	mtime   int64 // unix nanoseconds
	mode    mode
	origin  uint16 // number in table.origins

	// Guarded by the mutex of the table.
	ino     uint64       // see inode; 0 until it is asked for
	looked  bool         // the kernel has looked it up since the last open
	stale   bool         // another node is opened instead: the name leads elsewhere, or the mode has had its time
	gone    bool         // the name leads to another object, or to nothing
	evicted bool         // the backing file was unlinked while it was open
	backing int32        // id in the kernel, 0 if none
	opens   int32        // never too few in passthrough mode; across a SIGKILL it may be too many
	opened  int32        // in all
	reading int32        // READs under way
	checked time.Time    // when the name last led to this object
	reader  *fill.Reader // while it is open or being read

	mu    sync.Mutex // serialises opens of one node; held across requests to store and broker, and guards given
	given bool       // its bytes were put into the kernel's page cache
}

// table maps node ids. It is written through to the mount's memfd, from which the next
// worker reads it.
type table struct {
	origins atomic.Pointer[[]origin] // of all files; replaced, with mu held, by one with more

	mu     sync.RWMutex // guards everything below and the fields of nodes
	nodes  nodeMap
	names  nameMap
	nextID uint64

	backed map[object.ID][]*node // nodes with a backing file
	bound  *node                 // the last socket of domain/

	slab     slab  // of nodes that are read from the log
	replayed *node // the last one of them; it may have gone
	told     int64 // bytes that tell of them: what is alive, at most

	log       *os.File
	end       int64 // of the log
	foreign   bool  // an earlier worker may still append to it: this one must not
	scratch   []byte
	gathering bool   // records are not written yet
	gathered  []byte // those

	limit      int64    // of end, where the log is to be compacted
	grown      func()   // called once with mu held when end is beyond it; has compaction done
	compacting bool     // it was called, and settle was not
	next       *os.File // while a compacted log is handed over: both are written
	nextEnd    int64
}

// The log is compacted when it has grown beyond both.
const (
	minCompact    = 16 << 20 // bytes
	compactFactor = 2        // times what was alive at the last time
)

func newTable(log *os.File) *table {
	t := &table{nodes: newNodeMap(), names: newNameMap(), nextID: firstFree,
		backed: map[object.ID][]*node{}, log: log, end: brokerwire.StateLog, limit: brokerwire.StateLog + minCompact}
	t.setOrigins([]origin{{}})
	root := &node{id: rootID, kind: rootKind, lookups: 1}
	root.parent = root
	t.add(root)
	t.add(&node{id: dataID, parent: root, name: "data", kind: dirKind, lookups: 1})
	t.add(&node{id: domainID, parent: root, name: "domain", kind: domainKind, lookups: 1})
	return t
}

func (t *table) add(n *node) {
	t.nodes.add(n)
	if n.id != rootID {
		t.names.set(n)
		n.parent.kids++
	}
}

func (t *table) get(id uint64) *node {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.nodes.get(id)
}

// objectOf is the object that a file's node stands for.
func (t *table) objectOf(n *node) object.Object {
	o := t.origin(n.file.origin)
	return object.Object{Store: o.Store, Key: o.Key(n.parent.key + n.name), Version: n.file.version, Size: n.file.size, ModTime: time.Unix(0, n.file.mtime)}
}

// folder returns the node that a folder's name leads to now, and makes it if need be. It and
// the methods below want t.mu held.
func (t *table) folder(parent *node, name string) *node {
	n := t.names.get(parent, name)
	if n != nil && n.kind == dirKind {
		return n
	}
	n.supersede(true)
	key := parent.key + name + "/"
	n = &node{id: t.newID(), parent: parent, name: key[len(parent.key) : len(key)-1], key: key, kind: dirKind}
	t.add(n)
	t.append(nodeRecord(t.scratch[:0], n))
	return n
}

// incarnation is folder for files: the node at hand if it stands for the object and is in the
// wanted mode, or usable in its own; otherwise a new one, and the old one is stale.
func (t *table) incarnation(parent *node, origin uint16, obj object.Object, name string, want mode, now time.Time, usable func(*file) bool) *node {
	n := t.names.get(parent, name)
	same := n != nil && n.kind == fileKind && n.file.of(obj) && n.file.origin == origin
	if same && !n.file.stale && (n.file.mode == want || usable(n.file)) {
		n.file.checked = now
		return n
	}
	n.supersede(!same)
	text := name + obj.Version // of their own: those at hand are pieces of all that a LIST said
	fn := &fileNode{
		node: node{id: t.newID(), parent: parent, name: text[:len(name)], kind: fileKind},
		f:    file{version: text[len(name):], size: obj.Size, mtime: obj.ModTime.UnixNano(), mode: want, origin: origin, checked: now},
	}
	n = &fn.node
	n.file = &fn.f
	t.add(n)
	t.append(nodeRecord(t.scratch[:0], n))
	return n
}

// of reports whether it is an incarnation of the object, given that the key is the same.
func (f *file) of(obj object.Object) bool { return f.version == obj.Version && f.size == obj.Size }

// socket makes the node of domain/<name>.
func (t *table) socket(name string) *node {
	domain := t.nodes.get(domainID)
	if n := t.names.get(domain, name); n != nil {
		return n
	}
	n := &node{id: t.newID(), parent: domain, name: name, kind: socketKind}
	t.onlySocket(n)
	t.append(nodeRecord(t.scratch[:0], n))
	return n
}

// onlySocket adds a socket; those of other names are of workers that will not come back.
func (t *table) onlySocket(n *node) {
	if t.bound != nil {
		t.names.remove(t.bound)
	}
	t.bound = n
	t.add(n)
}

// fixed are the nodes that the root or domain/ shows, by id.
func (t *table) fixed(dir *node) []uint64 {
	if dir.id == rootID {
		return []uint64{dataID, domainID}
	}
	if n := t.bound; n != nil && t.names.get(dir, n.name) == n {
		return []uint64{n.id}
	}
	return nil
}

// setBacking notes the node's backing id; 0 takes it away.
func (t *table) setBacking(n *node, id int32) {
	oid := t.objectOf(n).ID()
	if id != 0 {
		t.backed[oid] = append(t.backed[oid], n)
	} else if t.backed[oid] = slices.DeleteFunc(t.backed[oid], func(b *node) bool { return b == n }); len(t.backed[oid]) == 0 {
		delete(t.backed, oid)
	}
	n.file.backing = id
	t.append(countRecord(t.scratch[:0], recBacking, n.id, uint32(id)))
}

func (t *table) newID() uint64 {
	t.nextID++
	return t.nextID - 1
}

// supersede marks a file's node: the next open of it looks the name up again. gone says that
// the object is another one, not just the mode.
func (n *node) supersede(gone bool) {
	if n != nil && n.kind == fileKind {
		n.file.stale = true
		n.file.gone = n.file.gone || gone
	}
}

// setOpens notes how often a file is open.
func (t *table) setOpens(n *node, opens int32) {
	n.file.opens = max(0, opens)
	if n.file.mode == passthrough {
		t.append(countRecord(t.scratch[:0], recOpens, n.id, uint32(n.file.opens)))
	}
}

// referenced counts a reference that the kernel is about to get.
func (t *table) referenced(n *node) {
	n.lookups++
	t.append(countRecord(t.scratch[:0], recLookup, n.id, 1))
}

// forget drops references; the node goes with the last one. It returns the node if it went.
func (t *table) forget(id, count uint64) *node {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.nodes.get(id)
	if n == nil || id < firstFree {
		return nil
	}
	n.lookups -= min(n.lookups, count)
	t.append(countRecord(t.scratch[:0], recForget, id, uint32(min(count, 1<<32-1))))
	return t.drop(n)
}

// drop removes a node that nothing refers to.
func (t *table) drop(n *node) *node {
	if n.lookups > 0 || n.pins > 0 || n.kids > 0 || n.id < firstFree || n.kind == socketKind || t.nodes.get(n.id) != n {
		return nil
	}
	t.nodes.remove(n.id)
	t.names.remove(n)
	n.parent.kids--
	t.drop(n.parent)
	return n
}

// Records of the log: length of the body (u32), kind (u8), body, CRC-32C of all before it.
// A length of zero is the end, and so is a record that does not match its sum: the worker was
// killed while it wrote it.
const (
	recNode    = 'N'
	recLookup  = 'L' // that many references more
	recForget  = 'F' // fewer
	recBacking = 'B' // the id, 0 for none
	recOpens   = 'O' // how often it is open, in passthrough mode
	recNext    = 'I' // no node has this id or a higher one
	recUnnamed = 'U' // its name does not lead to it any more
	recOrigin  = 'M' // where files come from: the number, and JSON
	recHead    = 5
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func seal(b []byte, start int) []byte {
	binary.LittleEndian.PutUint32(b[start:], uint32(len(b)-start-recHead))
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b[start:], castagnoli))
}

func nodeRecord(b []byte, n *node) []byte {
	start := len(b)
	b = append(b, 0, 0, 0, 0, recNode)
	b = binary.LittleEndian.AppendUint64(b, n.id)
	b = binary.LittleEndian.AppendUint64(b, n.parent.id)
	b = append(b, byte(n.kind), byte(len(n.name)))
	b = append(b, n.name...)
	if f := n.file; f != nil {
		mode := byte(f.mode)
		if f.origin != 0 {
			mode |= hasOrigin
		}
		b = append(b, mode)
		b = binary.LittleEndian.AppendUint64(b, uint64(f.size))
		b = binary.LittleEndian.AppendUint64(b, uint64(f.mtime))
		if f.origin != 0 {
			b = binary.LittleEndian.AppendUint16(b, f.origin)
		}
		b = append(b, f.version...)
	}
	return seal(b, start)
}

func countRecord(b []byte, rec byte, id uint64, count uint32) []byte {
	start := len(b)
	b = append(b, 0, 0, 0, 0, rec)
	b = binary.LittleEndian.AppendUint64(b, id)
	b = binary.LittleEndian.AppendUint32(b, count)
	return seal(b, start)
}

// gather has records wait for flush, so that they are written at once. The caller, who has t.mu, keeps it until then.
func (t *table) gather() { t.gathering = true }

func (t *table) flush() {
	t.gathering = false
	if len(t.gathered) > 0 {
		t.write(t.gathered)
	}
	t.gathered = t.gathered[:0]
}

// append writes a record, which is made in t.scratch.
func (t *table) append(b []byte) {
	t.scratch = b
	if t.gathering {
		t.gathered = append(t.gathered, b...)
		return
	}
	t.write(b)
}

// write writes records. The memfd is memory: an error means that there is none, and the
// process would not live long either; the next worker then knows less.
func (t *table) write(b []byte) {
	if t.log == nil { // detached: it is another worker's now
		return
	}
	n, _ := t.log.WriteAt(b, t.end)
	t.end += int64(n)
	if t.next != nil {
		n, _ := t.next.WriteAt(b, t.nextEnd)
		t.nextEnd += int64(n)
	}
	if t.end > t.limit && !t.compacting && t.grown != nil {
		t.compacting = true
		t.grown()
	}
}

// load reads what an earlier worker logged: all of it, or what came after the last call.
func (t *table) load() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.readOn()
}

// readOn is load with t.mu held.
func (t *table) readOn() error {
	b, done, err := t.view(t.end)
	if err != nil {
		return err
	}
	defer done()
	t.replayed = nil
	for {
		rec, body, size := nextRecord(b)
		if size == 0 {
			t.limit = max(t.limit, brokerwire.StateLog+compactFactor*t.told)
			return nil
		}
		t.replay(rec, body)
		t.end += int64(size)
		b = b[size:]
	}
}

// view is the log from an offset on, with what may be behind its end, until done is called.
func (t *table) view(from int64) (b []byte, done func(), err error) {
	st, err := t.log.Stat()
	if err != nil {
		return nil, nil, fmt.Errorf("node table: %w", err)
	}
	if st.Size() <= from {
		return nil, func() {}, nil
	}
	start := from &^ int64(os.Getpagesize()-1)
	m, err := unix.Mmap(int(t.log.Fd()), start, int(st.Size()-start), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, nil, fmt.Errorf("node table: %w", err)
	}
	return m[from-start:], func() { unix.Munmap(m) }, nil
}

// sweep removes what nothing refers to, and returns the files of it: nodes that were forgotten, or never
// told to the kernel. While the log is replayed they stay, because a record behind may refer to
// them again.
func (t *table) sweep() (files []*node) {
	const atOnce = 1000 // then whoever waits for the table has it
	t.mu.Lock()
	defer t.mu.Unlock()
	seen := 0
	for n := range t.nodes.all() {
		if t.drop(n) != nil && n.file != nil {
			files = append(files, n)
		}
		if seen++; seen%atOnce == 0 {
			t.mu.Unlock()
			t.mu.Lock()
		}
	}
	return files
}

// recall finds in the log what a node was that has gone: nil if it is not there any more.
// A directory's position may be behind it.
func (t *table) recall(id uint64) *node {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if id < firstFree || id >= t.nextID || t.log == nil {
		return nil
	}
	b, done, err := t.view(brokerwire.StateLog)
	if err != nil {
		return nil
	}
	defer done()
	for {
		rec, body, size := nextRecord(b)
		if size == 0 {
			return nil
		}
		if rec == recNode && len(body) > 18 && binary.LittleEndian.Uint64(body) == id && len(body) >= 18+int(body[17]) {
			return &node{id: id, kind: kind(body[16]), name: string(body[18 : 18+int(body[17])])}
		}
		b = b[size:]
	}
}

func nextRecord(b []byte) (rec byte, body []byte, size int) {
	if len(b) < recHead+4 {
		return 0, nil, 0
	}
	n := int(binary.LittleEndian.Uint32(b))
	end := recHead + n
	if n == 0 || len(b) < end+4 || binary.LittleEndian.Uint32(b[end:]) != crc32.Checksum(b[:end], castagnoli) {
		return 0, nil, 0
	}
	return b[recHead-1], b[recHead:end], end + 4
}

// replay applies a record; one that makes no sense is passed over.
func (t *table) replay(rec byte, b []byte) {
	if len(b) < 8 {
		return
	}
	id := binary.LittleEndian.Uint64(b)
	switch rec {
	case recNode:
		t.told += int64(len(b)) + 2*(recHead+4) + 12 // with a record of its references
		t.replayNode(id, b[8:])
		return
	case recNext:
		t.nextID = max(t.nextID, id)
		return
	case recOrigin:
		t.replayOrigin(id, b[8:])
		return
	}
	n := t.replayed // most records are about the node before them
	if n == nil || n.id != id {
		n = t.nodes.get(id)
	}
	if n == nil || len(b) < 12 {
		return
	}
	count := binary.LittleEndian.Uint32(b[8:])
	switch rec {
	case recLookup:
		n.lookups += uint64(count)
	case recForget:
		n.lookups -= min(n.lookups, uint64(count))
	case recBacking:
		if n.file != nil {
			t.replayBacking(n, int32(count))
		}
	case recUnnamed:
		t.names.remove(n)
		n.supersede(false)
	case recOpens:
		if n.file != nil {
			n.file.opens = int32(min(count, 1<<31-1))
		}
	}
}

func (t *table) replayBacking(n *node, id int32) {
	oid := t.objectOf(n).ID()
	t.backed[oid] = slices.DeleteFunc(t.backed[oid], func(b *node) bool { return b == n })
	if id != 0 {
		t.backed[oid] = append(t.backed[oid], n)
	}
	n.file.backing = id
}

func (t *table) replayNode(id uint64, b []byte) {
	if len(b) < 10 || len(b) < 10+int(b[9]) {
		return
	}
	parent, name := t.replayedParent(binary.LittleEndian.Uint64(b)), b[10:10+int(b[9])]
	kind, b := kind(b[8]), b[10+len(name):]
	if parent == nil || id < firstFree || id < t.nextID && t.nodes.get(id) != nil || kind == fileKind && len(b) < 17 {
		return
	}
	var n *node
	switch kind {
	case fileKind:
		n = t.slab.file()
	case dirKind, socketKind:
		n = &node{}
	default:
		return
	}
	n.id, n.parent, n.kind, n.name = id, parent, kind, t.slab.text(name)
	t.nextID, t.replayed = max(t.nextID, id+1), n
	if kind == socketKind {
		t.onlySocket(n)
		return
	}
	t.nodes.add(n)
	parent.kids++
	t.names.setLater(n)
	if kind == dirKind {
		n.key = parent.key + n.name + "/"
		return
	}
	f := n.file
	f.mode, f.size, f.mtime = mode(b[0]&^hasOrigin), int64(binary.LittleEndian.Uint64(b[1:])), int64(binary.LittleEndian.Uint64(b[9:]))
	version := b[17:]
	if b[0]&hasOrigin != 0 && len(version) >= 2 {
		f.origin, version = binary.LittleEndian.Uint16(version), version[2:]
	}
	f.version = t.slab.text(version)
}

// replayedParent is nodes.get, but for the parent of a node in the same folder as the one before.
func (t *table) replayedParent(id uint64) *node {
	if n := t.replayed; n != nil && n.parent.id == id {
		return n.parent
	}
	return t.nodes.get(id)
}

// startCompaction writes what is alive to a new memfd, which from then on gets every record that the old
// one gets: whichever the broker holds when this process dies, it is whole.
func (t *table) startCompaction() (*os.File, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.log == nil {
		return nil, os.ErrClosed
	}
	st, err := brokerwire.ReadState(t.log)
	if err != nil {
		return nil, err
	}
	fresh, err := brokerwire.NewState(st)
	if err != nil {
		return nil, err
	}
	w := &recordWriter{f: fresh, end: brokerwire.StateLog}
	w.b = countRecord(w.b, recNext, t.nextID, 0)
	for i, o := range *t.origins.Load() {
		if i > 0 {
			w.b = originRecord(w.b, uint16(i), o)
		}
	}
	for n := range t.nodes.sorted() { // parents first
		if n.id >= firstFree {
			w.node(n, t.names.get(n.parent, n.name) == n)
		}
	}
	if w.flush(); w.err != nil {
		fresh.Close()
		return nil, fmt.Errorf("compact node table: %w", w.err)
	}
	t.next, t.nextEnd = fresh, w.end
	return fresh, nil
}

// settle ends a compaction: the broker has the new log, or, if it is not taken, never will.
func (t *table) settle(taken bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	fresh, end := t.next, t.nextEnd
	t.next, t.compacting = nil, false
	switch {
	case taken && t.log != nil:
		// The old one is closed by the collector: somebody may be about to send it.
		t.log, t.end = fresh, end
		alive := end - brokerwire.StateLog
		t.limit = brokerwire.StateLog + max(minCompact, compactFactor*alive)
	default:
		t.limit = max(t.limit, 2*t.end-brokerwire.StateLog) // as much again
		if fresh != nil {
			fresh.Close()
		}
	}
}

// detach stops writing: the log is another worker's.
func (t *table) detach() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.log, t.next = nil, nil
}

// recordWriter writes records a good many at once.
type recordWriter struct {
	f   *os.File
	b   []byte
	end int64
	err error
}

func (w *recordWriter) flush() {
	if w.err == nil {
		_, w.err = w.f.WriteAt(w.b, w.end)
	}
	w.end += int64(len(w.b))
	w.b = w.b[:0]
}

func (w *recordWriter) node(n *node, named bool) {
	w.b = nodeRecord(w.b, n)
	if !named {
		w.b = countRecord(w.b, recUnnamed, n.id, 0)
	}
	for _, c := range []struct {
		rec   byte
		count uint64
	}{{recLookup, n.lookups}, {recBacking, n.backingID()}, {recOpens, n.opens()}} {
		for ; c.count > 0; c.count -= min(c.count, 1<<32-1) {
			w.b = countRecord(w.b, c.rec, n.id, uint32(min(c.count, 1<<32-1)))
		}
	}
	if len(w.b) > 1<<20 {
		w.flush()
	}
}

func (n *node) backingID() uint64 {
	if n.file == nil {
		return 0
	}
	return uint64(uint32(n.file.backing))
}

// opens is what the next worker must know of it.
func (n *node) opens() uint64 {
	if n.file == nil || n.file.mode != passthrough {
		return 0
	}
	return uint64(n.file.opens)
}
