// Package parquet finds the columns in a Parquet file.
//
// The bytes are a user's: whatever they are, the answer is columns that lie within the file, or an error, at a
// cost that the footer's length bounds.
package parquet

import (
	"encoding/binary"
	"errors"
	"slices"
)

const (
	// Tail is what a Parquet file ends with, in bytes: the length of its footer, then a word. Readers ask for it first, and
	// then for the footer.
	Tail = 8

	maxParts  = 1 << 16 // of a file
	maxNested = 16      // structs and lists in each other
)

// FooterLen is the length of the footer that a file's last [Tail] bytes tell; ok is false if they are not Parquet's.
func FooterLen(tail []byte) (n int64, ok bool) {
	if len(tail) != Tail || string(tail[4:]) != "PAR1" {
		return 0, false
	}
	return int64(binary.LittleEndian.Uint32(tail)), true
}

// Part is where a column's values of one row group are: the bytes [Start, End) of the file.
type Part struct{ Start, End int64 }

// Layout is the parts of a file, in the order of their places. They do not overlap.
type Layout []Part

var errFooter = errors.New("not the footer of a Parquet file")

// Parse reads a footer, without the file's last [Tail] bytes. dataBytes is what is in front of it.
func Parse(footer []byte, dataBytes int64) (Layout, error) {
	d := decoder{b: footer}
	var parts Layout
	d.structure(0, func(field int16, kind byte, depth int) bool {
		if field != 4 || kind != list { // row_groups
			return false
		}
		d.list(depth, func(kind byte, depth int) bool {
			if kind == structure {
				d.rowGroup(depth, &parts)
			}
			return kind == structure
		})
		return true
	})
	if d.bad || len(parts) > maxParts {
		return nil, errFooter
	}
	slices.SortFunc(parts, func(a, b Part) int { return int(min(1, max(-1, a.Start-b.Start))) })
	end := int64(0)
	for _, p := range parts {
		if p.Start < end || p.End > dataBytes {
			return nil, errFooter
		}
		end = p.End
	}
	return parts, nil
}

// At is the part that holds the byte at off; ok is false if none does.
func (l Layout) At(off int64) (p Part, ok bool) {
	i, _ := slices.BinarySearchFunc(l, off, func(p Part, off int64) int {
		if p.End <= off {
			return -1
		}
		return 1
	})
	if i == len(l) || l[i].Start > off {
		return Part{}, false
	}
	return l[i], true
}

// Begins is the part whose first byte is among the n at off, the last one of several.
func (l Layout) Begins(off, n int64) (p Part, ok bool) {
	i, _ := slices.BinarySearchFunc(l, off+n, func(p Part, end int64) int {
		if p.Start < end {
			return -1
		}
		return 1
	})
	if i == 0 || l[i-1].Start < off {
		return Part{}, false
	}
	return l[i-1], true
}

// rowGroup appends the parts of a row group.
func (d *decoder) rowGroup(depth int, parts *Layout) {
	d.structure(depth, func(field int16, kind byte, depth int) bool {
		if field != 1 || kind != list { // columns
			return false
		}
		d.list(depth, func(kind byte, depth int) bool {
			if kind == structure {
				d.column(depth, parts)
			}
			return kind == structure
		})
		return true
	})
}

// column appends the part of a column, unless it is in another file.
func (d *decoder) column(depth int, parts *Layout) {
	var size, data, dictionary int64
	elsewhere := false
	d.structure(depth, func(field int16, kind byte, depth int) bool {
		elsewhere = elsewhere || field == 1 // file_path
		if field != 3 || kind != structure {
			return false
		}
		d.structure(depth, func(field int16, kind byte, _ int) bool { // meta_data
			var to *int64
			switch field {
			case 7: // total_compressed_size
				to = &size
			case 9: // data_page_offset
				to = &data
			case 11: // dictionary_page_offset
				to = &dictionary
			}
			if to == nil || kind != i64 {
				return false
			}
			*to = d.zigzag()
			return true
		})
		return true
	})
	start := data
	if dictionary > 0 {
		start = min(data, dictionary)
	}
	end := start + size
	if d.bad = d.bad || start < 0 || size < 0 || end < start || len(*parts) > maxParts; d.bad || elsewhere || size == 0 {
		return
	}
	*parts = append(*parts, Part{start, end})
}

// Types of Thrift's compact protocol.
const (
	boolTrue  = 1
	boolFalse = 2
	i8        = 3
	i16       = 4
	i32       = 5
	i64       = 6
	double    = 7
	text      = 8
	list      = 9
	set       = 10
	mapping   = 11
	structure = 12
)

// decoder reads Thrift's compact protocol. After a mistake it is bad, and its answers are nothing.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) fail() {
	d.b, d.bad = nil, true
}

func (d *decoder) byte() byte {
	if len(d.b) == 0 {
		d.fail()
		return 0
	}
	c := d.b[0]
	d.b = d.b[1:]
	return c
}

func (d *decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.fail()
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) zigzag() int64 {
	v := d.uvarint()
	return int64(v>>1) ^ -int64(v&1)
}

func (d *decoder) drop(n uint64) {
	if n > uint64(len(d.b)) {
		d.fail()
		return
	}
	d.b = d.b[n:]
}

// structure reads a struct. take reads a field, or reports that it has not.
func (d *decoder) structure(depth int, take func(field int16, kind byte, depth int) bool) {
	if depth > maxNested {
		d.fail()
	}
	for field := int16(0); !d.bad; {
		head := d.byte()
		kind := head & 15
		if kind == 0 {
			return
		}
		if delta := head >> 4; delta != 0 {
			field += int16(delta)
		} else {
			field = int16(d.zigzag())
		}
		if !take(field, kind, depth+1) {
			d.skip(kind, depth+1)
		}
	}
}

// list reads a list or a set.
func (d *decoder) list(depth int, take func(kind byte, depth int) bool) {
	head := d.byte()
	n, kind := uint64(head>>4), head&15
	if n == 15 {
		n = d.uvarint()
	}
	if depth > maxNested || n > uint64(len(d.b)) { // an element has one byte at least
		d.fail()
	}
	for ; n > 0 && !d.bad; n-- {
		if !take(kind, depth+1) {
			d.element(kind, depth+1)
		}
	}
}

// element skips one of a list or a map, where a bool has a byte of its own.
func (d *decoder) element(kind byte, depth int) {
	if kind == boolTrue || kind == boolFalse {
		kind = i8
	}
	d.skip(kind, depth)
}

func (d *decoder) skip(kind byte, depth int) {
	if depth > maxNested {
		d.fail()
	}
	switch kind {
	case boolTrue, boolFalse:
	case i8:
		d.drop(1)
	case i16, i32, i64:
		d.uvarint()
	case double:
		d.drop(8)
	case text:
		d.drop(d.uvarint())
	case list, set:
		d.list(depth, func(byte, int) bool { return false })
	case mapping:
		d.mapping(depth)
	case structure:
		d.structure(depth, func(int16, byte, int) bool { return false })
	default:
		d.fail()
	}
}

func (d *decoder) mapping(depth int) {
	n := d.uvarint()
	if n == 0 {
		return
	}
	kinds := d.byte()
	if n > uint64(len(d.b)) {
		d.fail()
	}
	for ; n > 0 && !d.bad; n-- {
		d.element(kinds>>4, depth+1)
		d.element(kinds&15, depth+1)
	}
}
