package fusefs

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

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
	key    string // of a folder: its key prefix
	kind   kind
	file   *file // of fileKind

	lookups uint64 // references the kernel holds
	pins    int    // open directories whose position it may be
	kids    int    // nodes in the table that have it as parent
}

// file is the part of a node that only files have.
type file struct {
	version string
	size    int64
	mtime   time.Time
	mode    mode

	// Guarded by the mutex of the table.
	checked time.Time           // when the name last led here
	stale   bool                // the name leads elsewhere now
	told    map[uint32]struct{} // threads that were answered ESTALE
	opens   int                 // a hint: not exact across a SIGKILL
	opened  int                 // in all
	reading int                 // READs under way
	backing int32               // id in the kernel, 0 if none
	reader  *fill.Reader        // while it is open or being read

	mu sync.Mutex // serialises opens of one node; held across requests to store and broker
}

type childKey struct {
	parent uint64
	name   string
}

// table maps node ids. It is written through to the mount's memfd, from which the next
// worker reads it.
type table struct {
	store object.Store

	mu    sync.RWMutex // guards everything below and the fields of nodes
	nodes map[uint64]*node
	names map[childKey]*node // where a name leads now
	next  uint64

	backed map[object.ID][]*node // nodes with a backing file

	log     *os.File
	end     int64 // of the log
	scratch []byte
}

func newTable(log *os.File, store object.Store, dataKey string) *table {
	t := &table{store: store, nodes: map[uint64]*node{}, names: map[childKey]*node{}, next: firstFree,
		backed: map[object.ID][]*node{}, log: log, end: brokerwire.StateLog}
	root := &node{id: rootID, kind: rootKind, lookups: 1}
	root.parent = root
	t.add(root)
	t.add(&node{id: dataID, parent: root, name: "data", kind: dirKind, key: dataKey, lookups: 1})
	t.add(&node{id: domainID, parent: root, name: "domain", kind: domainKind, lookups: 1})
	return t
}

func (t *table) add(n *node) {
	t.nodes[n.id] = n
	if n.id != rootID {
		t.names[childKey{n.parent.id, n.name}] = n
		n.parent.kids++
	}
}

func (t *table) get(id uint64) *node {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.nodes[id]
}

// objectOf is the object that a file's node stands for.
func (t *table) objectOf(n *node) object.Object {
	return object.Object{Store: t.store, Key: n.parent.key + n.name, Version: n.file.version, Size: n.file.size, ModTime: n.file.mtime}
}

// folder returns the node that a folder's name leads to now, and makes it if need be. It and
// the methods below want t.mu held.
func (t *table) folder(parent *node, name string) *node {
	n := t.names[childKey{parent.id, name}]
	if n != nil && n.kind == dirKind {
		return n
	}
	t.supersede(n)
	n = &node{id: t.newID(), parent: parent, name: name, key: parent.key + name + "/", kind: dirKind}
	t.add(n)
	t.append(nodeRecord(t.scratch[:0], n))
	return n
}

// incarnation is folder for files: the node at hand if it stands for the object and is in the
// wanted mode, or usable in its own; otherwise a new one, and the old one is stale.
func (t *table) incarnation(parent *node, obj object.Object, name string, want mode, now time.Time, usable func(*file) bool) *node {
	n := t.names[childKey{parent.id, name}]
	if n != nil && n.kind == fileKind && n.file.version == obj.Version && n.file.size == obj.Size && !n.file.stale &&
		(n.file.mode == want || usable(n.file)) {
		n.file.checked = now
		return n
	}
	t.supersede(n)
	n = &node{id: t.newID(), parent: parent, name: name, kind: fileKind,
		file: &file{version: obj.Version, size: obj.Size, mtime: obj.ModTime, mode: want, checked: now}}
	t.add(n)
	t.append(nodeRecord(t.scratch[:0], n))
	return n
}

// socket makes the node of domain/<name>; sockets of other names are those of workers that
// will not come back.
func (t *table) socket(name string) *node {
	for _, id := range t.fixed(t.nodes[domainID]) {
		if n := t.nodes[id]; n.name != name {
			delete(t.names, childKey{domainID, n.name})
		}
	}
	if n := t.names[childKey{domainID, name}]; n != nil {
		return n
	}
	n := &node{id: t.newID(), parent: t.nodes[domainID], name: name, kind: socketKind}
	t.add(n)
	t.append(nodeRecord(t.scratch[:0], n))
	return n
}

// fixed are the nodes that the root or domain/ shows, by id.
func (t *table) fixed(dir *node) []uint64 {
	if dir.id == rootID {
		return []uint64{dataID, domainID}
	}
	var ids []uint64
	for k, n := range t.names {
		if k.parent == domainID {
			ids = append(ids, n.id)
		}
	}
	slices.Sort(ids)
	return ids
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
	t.next++
	return t.next - 1
}

// supersede marks a file's node: the next open of it looks the name up again.
func (t *table) supersede(n *node) {
	if n != nil && n.kind == fileKind {
		n.file.stale = true
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
	n := t.nodes[id]
	if n == nil || id < firstFree {
		return nil
	}
	n.lookups -= min(n.lookups, count)
	t.append(countRecord(t.scratch[:0], recForget, id, uint32(min(count, 1<<32-1))))
	return t.drop(n)
}

// drop removes a node that nothing refers to.
func (t *table) drop(n *node) *node {
	if n.lookups > 0 || n.pins > 0 || n.kids > 0 || n.id < firstFree || n.kind == socketKind || t.nodes[n.id] != n {
		return nil
	}
	delete(t.nodes, n.id)
	if k := (childKey{n.parent.id, n.name}); t.names[k] == n {
		delete(t.names, k)
	}
	n.parent.kids--
	t.drop(n.parent)
	return n
}

// Records of the log: length of the body (u16), kind (u8), body, CRC-32C of all before it.
// A length of zero is the end, and so is a record that does not match its sum: the worker was
// killed while it wrote it.
const (
	recNode    = 'N'
	recLookup  = 'L'
	recForget  = 'F'
	recBacking = 'B'
	recHead    = 3
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func seal(b []byte, start int) []byte {
	binary.LittleEndian.PutUint16(b[start:], uint16(len(b)-start-recHead))
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b[start:], castagnoli))
}

func nodeRecord(b []byte, n *node) []byte {
	start := len(b)
	b = append(b, 0, 0, recNode)
	b = binary.LittleEndian.AppendUint64(b, n.id)
	b = binary.LittleEndian.AppendUint64(b, n.parent.id)
	b = append(b, byte(n.kind), byte(len(n.name)))
	b = append(b, n.name...)
	if f := n.file; f != nil {
		b = append(b, byte(f.mode))
		b = binary.LittleEndian.AppendUint64(b, uint64(f.size))
		b = binary.LittleEndian.AppendUint64(b, uint64(f.mtime.UnixNano()))
		b = append(b, f.version...)
	}
	return seal(b, start)
}

func countRecord(b []byte, rec byte, id uint64, count uint32) []byte {
	start := len(b)
	b = append(b, 0, 0, rec)
	b = binary.LittleEndian.AppendUint64(b, id)
	b = binary.LittleEndian.AppendUint32(b, count)
	return seal(b, start)
}

// append writes records. The memfd is memory: an error means that there is none, and the
// process would not live long either; the next worker then knows less.
func (t *table) append(b []byte) {
	t.scratch = b
	n, _ := t.log.WriteAt(b, t.end)
	t.end += int64(n)
}

// load reads the log of an earlier worker.
func (t *table) load() error {
	st, err := t.log.Stat()
	if err != nil {
		return fmt.Errorf("node table: %w", err)
	}
	b := make([]byte, max(0, st.Size()-brokerwire.StateLog))
	if _, err := t.log.ReadAt(b, brokerwire.StateLog); err != nil {
		return fmt.Errorf("node table: %w", err)
	}
	used := 0
	for {
		rec, body, size := nextRecord(b[used:])
		if size == 0 {
			break
		}
		t.replay(rec, body)
		used += size
	}
	t.end = brokerwire.StateLog + int64(used)
	return nil
}

func nextRecord(b []byte) (rec byte, body []byte, size int) {
	if len(b) < recHead+4 {
		return 0, nil, 0
	}
	n := int(binary.LittleEndian.Uint16(b))
	end := recHead + n
	if n == 0 || len(b) < end+4 || binary.LittleEndian.Uint32(b[end:]) != crc32.Checksum(b[:end], castagnoli) {
		return 0, nil, 0
	}
	return b[2], b[recHead:end], end + 4
}

// replay applies a record; one that makes no sense is passed over.
func (t *table) replay(rec byte, b []byte) {
	if len(b) < 8 {
		return
	}
	id := binary.LittleEndian.Uint64(b)
	if rec == recNode {
		t.replayNode(id, b[8:])
		return
	}
	n := t.nodes[id]
	if n == nil || len(b) < 12 {
		return
	}
	count := binary.LittleEndian.Uint32(b[8:])
	switch rec {
	case recLookup:
		n.lookups += uint64(count)
	case recForget:
		n.lookups -= min(n.lookups, uint64(count))
		t.drop(n)
	case recBacking:
		if n.file != nil {
			t.replayBacking(n, int32(count))
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
	parent := t.nodes[binary.LittleEndian.Uint64(b)]
	n := &node{id: id, parent: parent, kind: kind(b[8]), name: strings.Clone(string(b[10 : 10+int(b[9])]))}
	b = b[10+int(b[9]):]
	if parent == nil || id < firstFree {
		return
	}
	switch n.kind {
	case dirKind:
		n.key = parent.key + n.name + "/"
	case fileKind:
		if len(b) < 17 {
			return
		}
		n.file = &file{mode: mode(b[0]), size: int64(binary.LittleEndian.Uint64(b[1:])),
			mtime: time.Unix(0, int64(binary.LittleEndian.Uint64(b[9:]))), version: string(b[17:])}
	case socketKind:
	default:
		return
	}
	t.supersede(t.names[childKey{parent.id, n.name}])
	t.add(n)
	t.next = max(t.next, id+1)
}

// compact writes what is alive to a new memfd and gives it to take, which hands it to the
// broker; if that fails the old one stays.
func (t *table) compact(take func(*os.File) error) error {
	st, err := brokerwire.ReadState(t.log)
	if err != nil {
		return err
	}
	fresh, err := brokerwire.NewState(st)
	if err != nil {
		return err
	}
	old, end := t.log, t.end
	t.log, t.end = fresh, brokerwire.StateLog
	written := map[uint64]bool{rootID: true, dataID: true, domainID: true}
	for _, n := range t.nodes {
		t.rewrite(n, written)
	}
	if err := take(fresh); err != nil {
		t.log, t.end = old, end
		fresh.Close()
		return err
	}
	return old.Close()
}

// rewrite writes a node behind its parents.
func (t *table) rewrite(n *node, written map[uint64]bool) {
	if written[n.id] {
		return
	}
	t.rewrite(n.parent, written)
	written[n.id] = true
	b := nodeRecord(t.scratch[:0], n)
	if n.lookups > 0 {
		b = countRecord(b, recLookup, n.id, uint32(min(n.lookups, 1<<32-1)))
	}
	if n.file != nil && n.file.backing != 0 {
		b = countRecord(b, recBacking, n.id, uint32(n.file.backing))
	}
	t.append(b)
}
