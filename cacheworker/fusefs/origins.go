package fusefs

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/dataset"
	"github.com/larderfs/larder/cacheworker/object"
)

// origin is where some of a mount's files come from. That of a volume of a source is number 0, and in no
// log: the dataset says it. One of a path of the namespace has them as mounts show them to it, and
// remembers each for its files that are open after the mount has gone.
type origin struct {
	dataset.Origin
	Spec string `json:"spec,omitempty"` // see [dataset.Dataset.Spec]
}

// hasOrigin is set, beside its mode, in the record of a file whose origin is not number 0.
const hasOrigin = 0x80

var errOrigins = errors.New("too many mounts were shown at this path since it was mounted")

// setOrigins requires t.mu, once the table is in use.
func (t *table) setOrigins(all []origin) { t.origins.Store(&all) }

// origin is the one with that number; one that a broken log does not tell of is none.
func (t *table) origin(number uint16) origin {
	if all := *t.origins.Load(); int(number) < len(all) {
		return all[number]
	}
	return origin{}
}

// originOf is the number of the origin of files in a folder, as d has it. Requires t.mu.
func (t *table) originOf(d *dataset.Dataset, folder string) (uint16, error) {
	spec := d.Spec(folder)
	if spec == "" {
		return 0, nil
	}
	o, ok := d.Origin(folder)
	if !ok {
		return 0, fmt.Errorf("%s: %w", folder, object.ErrNotFound)
	}
	return t.number(origin{o, spec})
}

// number is that of an origin, which is noted if it is new. Requires t.mu.
func (t *table) number(o origin) (uint16, error) {
	all := *t.origins.Load()
	i := slices.IndexFunc(all, func(known origin) bool { return known.Origin == o.Origin && known.Spec != "" })
	switch {
	case i > 0 && all[i].Spec == o.Spec:
		return uint16(i), nil
	case i <= 0 && len(all) > math.MaxUint16:
		return 0, errOrigins
	case i <= 0:
		i = len(all)
		all = append(slices.Clone(all), origin{})
	default:
		all = slices.Clone(all)
	}
	all[i] = o
	t.setOrigins(all)
	t.append(originRecord(t.scratch[:0], uint16(i), all[i]))
	return uint16(i), nil
}

func originRecord(b []byte, number uint16, o origin) []byte {
	text, err := json.Marshal(o)
	if err != nil {
		panic(fmt.Sprintf("encode an origin: %v", err)) // it is plain data
	}
	start := len(b)
	b = append(b, 0, 0, 0, 0, recOrigin)
	b = binary.LittleEndian.AppendUint64(b, uint64(number))
	return seal(append(b, text...), start)
}

// replayOrigin passes over what makes no sense.
func (t *table) replayOrigin(number uint64, text []byte) {
	all := slices.Clone(*t.origins.Load())
	var o origin
	if number == 0 || number > uint64(min(len(all), math.MaxUint16)) || json.Unmarshal(text, &o) != nil {
		return
	}
	if number == uint64(len(all)) {
		all = append(all, o)
	}
	all[number] = o
	t.setOrigins(all)
}

const (
	notifyEntry = 3 // FUSE_NOTIFY_INVAL_ENTRY
	expireOnly  = 1 // FUSE_EXPIRE_ONLY
)

// expire has the kernel ask again for names that it may still know. It keeps them until then: to take them
// away would unmount what pods have mounted below them. A kernel that cannot do that (before 6.2) asks
// when their time is over.
func (m *Mount) expire(names []dataset.Name) {
	if m.notify == nil {
		return
	}
	for _, n := range names {
		m.table.mu.Lock()
		folder := m.table.nodes.get(dataID)
		for name := range segments(n.Dir) {
			if folder != nil {
				folder = m.table.names.get(folder, name)
			}
		}
		m.table.mu.Unlock()
		if folder == nil { // the kernel never knew it
			continue
		}
		if err := m.notify(entryMessage(folder.id, n.Name)); err != nil && !errors.Is(err, unix.ENOENT) && m.closed.Err() == nil {
			m.cfg.Log.Warn("have the kernel ask again for a name", "volume", m.cfg.Volume.ID, "name", n.Dir+n.Name, "err", err)
		}
	}
}

// segments are the names in a folder's path, "" or ending in "/".
func segments(dir string) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for from := 0; from < len(dir); {
			to := from
			for dir[to] != '/' {
				to++
			}
			if !yield(dir[from:to]) {
				return
			}
			from = to + 1
		}
	}
}

// entryMessage is a struct fuse_out_header, a struct fuse_notify_inval_entry_out and the name.
func entryMessage(parent uint64, name string) []byte {
	b := make([]byte, 0, 16+16+len(name)+1)
	b = binary.LittleEndian.AppendUint32(b, uint32(cap(b)))
	b = binary.LittleEndian.AppendUint32(b, notifyEntry)
	b = binary.LittleEndian.AppendUint64(b, 0)
	b = binary.LittleEndian.AppendUint64(b, parent)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(name)))
	b = binary.LittleEndian.AppendUint32(b, expireOnly)
	return append(append(b, name...), 0)
}

// offersExpire reports whether the kernel's INIT says that it can expire names.
func offersExpire(init []byte) bool {
	const (
		header = 40      // struct fuse_in_header; then major, minor, max_readahead, flags, flags2
		ext    = 1 << 30 // FUSE_INIT_EXT: there are flags2
		expire = 1 << 3  // FUSE_HAS_EXPIRE_ONLY, of flags2
	)
	if len(init) < header+20 {
		return false
	}
	flags, more := binary.LittleEndian.Uint32(init[header+12:]), binary.LittleEndian.Uint32(init[header+16:])
	return flags&ext != 0 && more&expire != 0
}
