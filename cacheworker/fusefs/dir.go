package fusefs

import (
	"context"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/larderfs/larder/cacheworker/dataset"
	"github.com/larderfs/larder/cacheworker/metadata"
)

// dirStream is an open directory. Its position is the cookie that the kernel brings: the
// node id of the last entry it took, so that another worker can go on behind that name.
type dirStream struct {
	mu      sync.Mutex // guards the fields below; held across requests to the store
	opened  time.Time
	of      *dataset.Dataset // that pending is from
	at      uint64           // offset behind which pending begins; 0 is the start
	pending []metadata.Entry
	after   string // the same place as a cookie of the metadata
	more    bool
	last    []*node // the entries of the last reply: pinned, the kernel may ask to go on behind any
}

// OpenDir implements fuse.RawFileSystem.
func (m *Mount) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	n := m.table.get(in.NodeId)
	if n == nil {
		return estale
	}
	if n.kind == fileKind || n.kind == socketKind {
		return fuse.ENOTDIR
	}
	m.dirMu.Lock()
	defer m.dirMu.Unlock()
	out.Fh = m.nextDir
	m.nextDir++
	m.dirs[out.Fh] = &dirStream{opened: time.Now(), more: true}
	return fuse.OK
}

// ReleaseDir implements fuse.RawFileSystem.
func (m *Mount) ReleaseDir(in *fuse.ReleaseIn) {
	m.dirMu.Lock()
	s := m.dirs[in.Fh]
	delete(m.dirs, in.Fh)
	m.dirMu.Unlock()
	if s != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		m.pin(s, nil)
	}
}

// stream is the open directory, made anew if an earlier worker opened it.
func (m *Mount) stream(fh uint64) *dirStream {
	m.dirMu.Lock()
	defer m.dirMu.Unlock()
	s := m.dirs[fh]
	if s == nil {
		s = &dirStream{opened: time.Now(), more: true}
		m.dirs[fh] = s
	}
	return s
}

// pin replaces the nodes that the directory's position may be. Requires s.mu.
func (m *Mount) pin(s *dirStream, last []*node) {
	var dropped []*node
	m.table.mu.Lock()
	for _, n := range last {
		n.pins++
	}
	for _, n := range s.last {
		n.pins--
		if m.table.drop(n) != nil && n.file != nil {
			dropped = append(dropped, n)
		}
	}
	s.last = last
	m.table.mu.Unlock()
	for _, n := range dropped {
		m.letGo(n)
	}
}

// ReadDir implements fuse.RawFileSystem.
func (m *Mount) ReadDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return m.readDir(cancel, in, func(e fuse.DirEntry, _ *node, _ time.Time) bool { return out.AddDirEntry(e) })
}

// ReadDirPlus implements fuse.RawFileSystem: attributes come from the LIST, and every entry
// but the dots is a reference.
func (m *Mount) ReadDirPlus(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return m.readDir(cancel, in, func(e fuse.DirEntry, n *node, at time.Time) bool {
		eo := out.AddDirLookupEntry(e)
		if eo != nil && n != nil {
			m.entryOut(n, at, eo)
			if n.kind != fileKind && at.IsZero() {
				eo.SetEntryTimeout(attrTimeout)
			}
		}
		return eo != nil
	})
}

// Offsets of the dots; entries have their node id, which is never that small, plus fixedOff.
const (
	dotOff    = 1
	dotdotOff = 2
	fixedOff  = 2
)

// adder adds an entry to the reply, or says that it is full. It is called with table.mu held.
type adder func(e fuse.DirEntry, n *node, at time.Time) bool

func (m *Mount) readDir(cancel <-chan struct{}, in *fuse.ReadIn, add adder) fuse.Status {
	dir := m.table.get(in.NodeId)
	if dir == nil {
		return estale
	}
	off := in.Offset
	for ; off < dotdotOff; off++ {
		name := []string{".", ".."}[off]
		if !add(fuse.DirEntry{Name: name, Mode: syscall.S_IFDIR, Ino: dir.id, Off: off + 1}, nil, time.Time{}) {
			return fuse.OK
		}
	}
	if dir.kind != dirKind {
		return m.readFixed(dir, off, add)
	}
	ctx, stop := m.requestContext(cancel, opReaddir)
	defer stop()
	s := m.stream(in.Fh)
	s.mu.Lock()
	defer s.mu.Unlock()
	if !m.seek(s, off) {
		return fuse.ENOENT
	}
	return m.readEntries(ctx, dir, s, add)
}

// readFixed lists the root and domain/.
func (m *Mount) readFixed(dir *node, off uint64, add adder) fuse.Status {
	m.table.mu.Lock()
	defer m.table.mu.Unlock()
	for _, id := range m.table.fixed(dir) {
		if id+fixedOff <= off {
			continue
		}
		n := m.table.nodes.get(id)
		var a fuse.Attr
		m.attr(n, &a)
		if !add(fuse.DirEntry{Name: n.name, Mode: a.Mode, Ino: a.Ino, Off: id + fixedOff}, n, time.Time{}) {
			break
		}
	}
	return fuse.OK
}

// seek puts the stream behind the entry whose offset the kernel brings. Requires s.mu.
func (m *Mount) seek(s *dirStream, off uint64) bool {
	if off == s.at {
		return true
	}
	if off == dotdotOff {
		if s.at != 0 { // rewinddir
			s.at, s.after, s.pending, s.more, s.opened = 0, "", nil, true, time.Now()
		}
		return true
	}
	n := m.table.get(off - fixedOff)
	if n == nil {
		n = m.table.recall(off - fixedOff)
	}
	if n == nil {
		return false
	}
	s.at, s.after, s.pending, s.more = off, metadata.Entry{Name: n.name, Folder: n.kind == dirKind}.Cookie(), nil, true
	return true
}

// readEntries fills one reply. Requires s.mu.
func (m *Mount) readEntries(ctx context.Context, dir *node, s *dirStream, add adder) fuse.Status {
	d := m.data.Load()
	if d != s.of { // what came from other mounts is not told any more
		s.of, s.pending, s.more = d, nil, s.more || len(s.pending) > 0
	}
	if len(s.pending) == 0 && s.more {
		// One listing does not get older while it is read.
		es, more, err := d.List(ctx, dir.key, s.after, d.Freshness+time.Since(s.opened))
		if err != nil {
			return m.status("readdir", dir, err)
		}
		s.pending, s.more = es, more
	}
	last, err := m.fill(dir, s, add)
	if len(last) > 0 { // else the position stays
		m.pin(s, last)
	}
	return m.status("readdir", dir, err)
}

// fill adds entries while there is room, and returns their nodes. Requires s.mu.
func (m *Mount) fill(dir *node, s *dirStream, add adder) (added []*node, err error) {
	m.table.mu.Lock()
	defer m.table.mu.Unlock()
	m.table.gather()
	defer m.table.flush()
	for len(s.pending) > 0 {
		e := s.pending[0]
		n, err := m.enter(s.of, dir, e)
		if err != nil {
			return added, err
		}
		ent := fuse.DirEntry{Name: e.Name, Mode: syscall.S_IFREG, Ino: n.id, Off: n.id + fixedOff}
		if e.Folder {
			ent.Mode = syscall.S_IFDIR
		} else {
			ent.Ino = n.file.ino
		}
		if !add(ent, n, e.At) {
			m.table.drop(n) // if it is new
			break
		}
		added = append(added, n)
		s.pending = s.pending[1:]
		s.at, s.after = ent.Off, e.Cookie()
	}
	return added, nil
}
