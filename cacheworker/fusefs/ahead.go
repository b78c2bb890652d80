package fusefs

import (
	"sync"

	"github.com/larderfs/larder/cacheworker/dataset"
)

// Who reads the small files of a folder in the order of their names has the next ones brought from the disk meanwhile: for
// each he would wait for its inode and its bytes. They are brought some at a time, or waking who brings them would cost
// as much.
const (
	filesAhead  = 16
	filesAtOnce = 4
	maxOrders   = 4096 // folders that are remembered
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

// warmBehind notes that a file is read, and brings those behind it if it was expected.
func (m *Mount) warmBehind(d *dataset.Dataset, n *node) {
	o := m.orders.get(n.parent.id)
	want, brought := 1, 0
	if o.name == n.name {
		if brought = max(0, o.brought-1); brought <= filesAhead-filesAtOnce {
			want = filesAhead
		}
	}
	files := d.Behind(n.parent.key, n.name, want)
	if len(files) == 0 {
		return
	}
	cold := files[min(brought, len(files)):]
	if want == 1 {
		cold = nil
	}
	m.orders.set(n.parent.id, order{files[0].Name, brought + len(cold)})
	if len(cold) == 0 {
		return
	}
	m.later(func() {
		for _, f := range cold {
			if f.Object.Size <= smallFile {
				d.Warm(f.Object.ID())
			}
		}
	})
}
