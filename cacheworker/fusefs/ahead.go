package fusefs

import (
	"container/list"
	"sync"

	"github.com/larderfs/larder/cacheworker/dataset"
	"github.com/larderfs/larder/cacheworker/metadata"
	"github.com/larderfs/larder/cacheworker/object"
)

// Who reads the small files of a folder in the order of their names has the next ones brought into memory meanwhile: for
// each he would wait for its inode and its bytes. They are brought some at a time, or waking who brings them would cost
// as much.
const (
	filesAhead  = 16
	filesAtOnce = 4
	maxOrders   = 4096 // folders that are remembered
	maxBrought  = 8 << 20
)

// orders says, by folder, how its files are read.
type orders struct {
	mu   sync.Mutex // guards next
	next map[uint64]order
}

type order struct {
	name    string // that of the next file, if they are read in order
	brought int    // how many from there on were brought
}

func (o *orders) get(folder uint64) order {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.next[folder]
}

func (o *orders) set(folder uint64, next order) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if _, known := o.next[folder]; o.next == nil || !known && len(o.next) >= maxOrders {
		o.next = map[uint64]order{}
	}
	o.next[folder] = next
}

// bringBehind notes that a file is read, and brings those behind it if it was expected.
func (m *Mount) bringBehind(d *dataset.Dataset, n *node) {
	o := m.orders.get(n.parent.id)
	want, has := 1, 0
	if o.name == n.name {
		if has = max(0, o.brought-1); has <= filesAhead-filesAtOnce {
			want = filesAhead
		}
	}
	files := d.Behind(n.parent.key, n.name, want)
	if len(files) == 0 {
		return
	}
	more := files[min(has, len(files)):]
	if want == 1 {
		more = nil
	}
	m.orders.set(n.parent.id, order{files[0].Name, has + len(more)})
	if len(more) > 0 {
		m.later(func() { m.bring(d, more) })
	}
}

func (m *Mount) bring(d *dataset.Dataset, files []metadata.Entry) {
	var ids []object.ID
	for _, f := range files {
		if f.Object.Size > 0 && f.Object.Size <= smallFile {
			ids = append(ids, f.Object.ID())
		}
	}
	d.Bring(ids, m.brought.put)
}

// brought is the bytes of objects that were brought and not taken, at most maxBrought of them.
type brought struct {
	mu    sync.Mutex // guards the fields below
	of    map[object.ID]*list.Element
	row   list.List // of parcel; youngest in front
	bytes int
}

type parcel struct {
	id object.ID
	b  []byte
}

func (b *brought) put(id object.ID, bytes []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.of == nil {
		b.of = map[object.ID]*list.Element{}
	}
	if b.of[id] != nil {
		return
	}
	b.of[id] = b.row.PushFront(parcel{id, bytes})
	for b.bytes += len(bytes); b.bytes > maxBrought; {
		b.remove(b.row.Back())
	}
}

// take returns an object's bytes, nil if they are not here.
func (b *brought) take(id object.ID) []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	e := b.of[id]
	if e == nil {
		return nil
	}
	return b.remove(e)
}

// remove requires b.mu.
func (b *brought) remove(e *list.Element) []byte {
	p := b.row.Remove(e).(parcel)
	delete(b.of, p.id)
	b.bytes -= len(p.b)
	return p.b
}
