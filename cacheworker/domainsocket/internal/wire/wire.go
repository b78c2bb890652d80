// Package wire encodes and decodes the frames of PROTOCOL.md.
//
// Everything here comes from the other process and is untrusted: decoding is bounded, never
// panics, and yields values that were checked (a [Path] or a name can be joined). The two
// hello messages are the same in every version of the protocol.
package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
)

const (
	Version = 1 // the only one so far

	ClientHelloLen = 8
	ServerHelloLen = 24
	HeaderLen      = 16

	MaxRequest = 8 << 10   // bytes of a request's payload
	MaxReply   = 256 << 10 // bytes of a reply's payload that this server sends
	LimitReply = 1 << 20   // what a server may announce at most

	MaxPath    = 4096
	MaxSegment = 255
	maxVersion = 2048
	maxText    = 1024
)

var magic = [4]byte{'L', 'R', 'D', 'R'}

// Type says what a request asks for; its reply has the same.
type Type uint8

const (
	Stat    Type = 1
	List    Type = 2
	Open    Type = 3
	Read    Type = 4
	Release Type = 5
	Status  Type = 6
	Cancel  Type = 7 // has no reply
)

// Flags of a reply's header.
const FlagDescriptor = 1 // one descriptor comes with the first byte of the frame

// Flags of an open request.
const (
	OpenNoDescriptor = 1 // the client wants bytes only
	OpenOrFail       = 2 // CodeIncomplete rather than no descriptor
)

// ErrProtocol means that the other end does not speak the protocol: the connection is of no more use.
var ErrProtocol = errors.New("protocol violation")

// ClientHello is the first message on a connection.
type ClientHello struct{ Min, Max uint16 }

// Append appends the message.
func (h ClientHello) Append(b []byte) []byte {
	b = append(b, magic[:]...)
	b = binary.BigEndian.AppendUint16(b, h.Min)
	return binary.BigEndian.AppendUint16(b, h.Max)
}

// ParseClientHello reads ClientHelloLen bytes.
func ParseClientHello(b []byte) (ClientHello, error) {
	if len(b) != ClientHelloLen || [4]byte(b) != magic {
		return ClientHello{}, fmt.Errorf("hello: %w", ErrProtocol)
	}
	return ClientHello{binary.BigEndian.Uint16(b[4:]), binary.BigEndian.Uint16(b[6:])}, nil
}

// ServerHello answers it. With a Code other than CodeOK the server closes the connection.
type ServerHello struct {
	Version    uint16
	Code       Code
	MaxRequest uint32 // bytes of a request's payload
	MaxReply   uint32 // bytes of a reply's payload, hence of one read
	Requests   uint32 // in flight on this connection, at most
	Leases     uint32 // on this connection, at most
}

// Append appends the message.
func (h ServerHello) Append(b []byte) []byte {
	b = append(b, magic[:]...)
	b = binary.BigEndian.AppendUint16(b, h.Version)
	b = binary.BigEndian.AppendUint16(b, uint16(h.Code))
	b = binary.BigEndian.AppendUint32(b, h.MaxRequest)
	b = binary.BigEndian.AppendUint32(b, h.MaxReply)
	b = binary.BigEndian.AppendUint32(b, h.Requests)
	return binary.BigEndian.AppendUint32(b, h.Leases)
}

// ParseServerHello reads ServerHelloLen bytes.
func ParseServerHello(b []byte) (ServerHello, error) {
	if len(b) != ServerHelloLen || [4]byte(b) != magic {
		return ServerHello{}, fmt.Errorf("hello: %w", ErrProtocol)
	}
	h := ServerHello{
		Version:    binary.BigEndian.Uint16(b[4:]),
		Code:       Code(binary.BigEndian.Uint16(b[6:])),
		MaxRequest: binary.BigEndian.Uint32(b[8:]),
		MaxReply:   binary.BigEndian.Uint32(b[12:]),
		Requests:   binary.BigEndian.Uint32(b[16:]),
		Leases:     binary.BigEndian.Uint32(b[20:]),
	}
	if h.Code == CodeOK && (h.Version != Version || h.MaxReply == 0 || h.MaxReply > LimitReply ||
		h.MaxRequest < MaxPath+16 || h.Requests == 0) {
		return ServerHello{}, fmt.Errorf("hello %+v: %w", h, ErrProtocol)
	}
	return h, nil
}

// Header stands before every payload.
type Header struct {
	Len   uint32 // bytes of payload behind the header
	Type  Type
	Flags uint8
	Code  Code   // of a reply; 0 in a request
	ID    uint64 // of the request, chosen by the client; not used again while in flight
}

// Put writes the header into b[:HeaderLen].
func (h Header) Put(b []byte) {
	_ = b[HeaderLen-1]
	binary.BigEndian.PutUint32(b, h.Len)
	b[4] = byte(h.Type)
	b[5] = h.Flags
	binary.BigEndian.PutUint16(b[6:], uint16(h.Code))
	binary.BigEndian.PutUint64(b[8:], h.ID)
}

// ParseHeader reads HeaderLen bytes; what they mean is for the caller to check.
func ParseHeader(b []byte) Header {
	_ = b[HeaderLen-1]
	return Header{
		Len:   binary.BigEndian.Uint32(b),
		Type:  Type(b[4]),
		Flags: b[5],
		Code:  Code(binary.BigEndian.Uint16(b[6:])),
		ID:    binary.BigEndian.Uint64(b[8:]),
	}
}

// Frame starts a frame: room for the header, to be filled in by [Finish].
func Frame() []byte { return make([]byte, HeaderLen, 512) }

// Finish writes the header of a frame whose payload is complete.
func Finish(b []byte, h Header) []byte {
	h.Len = uint32(len(b) - HeaderLen)
	h.Put(b)
	return b
}

// Entry is one file or folder.
type Entry struct {
	Name        string // "" for the root itself
	Folder      bool
	Size        int64     // bytes; 0 for a folder
	Version     string    // of the object; "" for a folder
	ModTime     time.Time // zero where the store gives none
	CachedBytes int64     // of Size, in this worker's cache now
}

// Append appends the entry, or nothing and an error if it does not fit the format.
func (e Entry) Append(b []byte) ([]byte, error) {
	if e.Name != "" && CheckName(e.Name) != nil || len(e.Version) > maxVersion || e.Size < 0 || e.CachedBytes < 0 {
		return b, fmt.Errorf("entry %.300q does not fit into a frame", e.Name)
	}
	kind := byte(0)
	if e.Folder {
		kind = 1
	}
	b = append(b, kind)
	b = binary.BigEndian.AppendUint64(b, uint64(e.Size))
	b = binary.BigEndian.AppendUint64(b, nanos(e.ModTime))
	b = binary.BigEndian.AppendUint64(b, uint64(e.CachedBytes))
	b = AppendString(b, e.Name)
	return AppendString(b, e.Version), nil
}

// Opened answers an open request.
type Opened struct {
	Lease   uint64
	Size    int64
	ModTime time.Time
	Version string
}

// Append appends the message.
func (o Opened) Append(b []byte) ([]byte, error) {
	if len(o.Version) > maxVersion || o.Size < 0 {
		return b, errors.New("object does not fit into a frame")
	}
	b = binary.BigEndian.AppendUint64(b, o.Lease)
	b = binary.BigEndian.AppendUint64(b, uint64(o.Size))
	b = binary.BigEndian.AppendUint64(b, nanos(o.ModTime))
	return AppendString(b, o.Version), nil
}

// State answers a status request.
type State struct {
	Volume        string // CSI volume id
	Worker        string // its UUID
	CachedBytes   int64  // of the whole cache
	CapacityBytes int64  // of the whole cache
	Connections   uint32 // of this volume
	Leases        uint32 // of this volume
}

// Append appends the message.
func (s State) Append(b []byte) []byte {
	b = AppendString(b, clip(s.Volume, maxText))
	b = AppendString(b, clip(s.Worker, maxText))
	b = binary.BigEndian.AppendUint64(b, uint64(s.CachedBytes))
	b = binary.BigEndian.AppendUint64(b, uint64(s.CapacityBytes))
	b = binary.BigEndian.AppendUint32(b, s.Connections)
	return binary.BigEndian.AppendUint32(b, s.Leases)
}

// AppendString appends a length of two bytes and s, which must be shorter than 64 KiB.
func AppendString(b []byte, s string) []byte {
	if len(s) > math.MaxUint16 {
		panic("wire: string too long") // every caller has checked it
	}
	b = binary.BigEndian.AppendUint16(b, uint16(len(s)))
	return append(b, s...)
}

func clip(s string, n int) string { return strings.ToValidUTF8(s[:min(len(s), n)], "") }

func nanos(t time.Time) uint64 {
	if t.IsZero() {
		return 0
	}
	return uint64(t.UnixNano())
}

// Decoder reads a payload. After the first mistake everything it gives is zero, and Err tells.
type Decoder struct {
	b   []byte
	err error
}

// NewDecoder reads from b, and keeps no part of it.
func NewDecoder(b []byte) *Decoder { return &Decoder{b: b} }

// Err is the first mistake; bytes that nobody read are none (a later version may add fields to a reply).
func (d *Decoder) Err() error { return d.err }

// End is Err, but bytes that nobody read are a mistake too: requests have none.
func (d *Decoder) End() error {
	if d.err == nil && len(d.b) > 0 {
		d.fail("bytes behind the last field")
	}
	return d.err
}

func (d *Decoder) fail(what string) {
	if d.err == nil {
		d.err = fmt.Errorf("%s: %w", what, ErrProtocol)
	}
	d.b = nil
}

func (d *Decoder) take(n int) []byte {
	if len(d.b) < n {
		d.fail("frame too short")
		return nil
	}
	p := d.b[:n]
	d.b = d.b[n:]
	return p
}

// Uint8 reads one byte.
func (d *Decoder) Uint8() uint8 {
	if p := d.take(1); p != nil {
		return p[0]
	}
	return 0
}

// Uint32 reads four bytes.
func (d *Decoder) Uint32() uint32 {
	if p := d.take(4); p != nil {
		return binary.BigEndian.Uint32(p)
	}
	return 0
}

// Uint64 reads eight bytes.
func (d *Decoder) Uint64() uint64 {
	if p := d.take(8); p != nil {
		return binary.BigEndian.Uint64(p)
	}
	return 0
}

// Int64 reads a number that is not negative.
func (d *Decoder) Int64() int64 {
	n := d.Uint64()
	if n > math.MaxInt64 {
		d.fail("number out of range")
		return 0
	}
	return int64(n)
}

func (d *Decoder) time() time.Time {
	if n := int64(d.Uint64()); n != 0 {
		return time.Unix(0, n)
	}
	return time.Time{}
}

// String reads a length of two bytes and as many bytes.
func (d *Decoder) String() string {
	if p := d.take(2); p != nil {
		return string(d.take(int(binary.BigEndian.Uint16(p))))
	}
	return ""
}

// Entry reads an entry.
func (d *Decoder) Entry() Entry {
	kind := d.Uint8()
	e := Entry{Folder: kind == 1, Size: d.Int64(), ModTime: d.time(), CachedBytes: d.Int64(), Name: d.String(), Version: d.String()}
	if kind > 1 || e.Name != "" && CheckName(e.Name) != nil || len(e.Version) > maxVersion {
		d.fail("bad entry")
	}
	if d.err != nil {
		return Entry{}
	}
	return e
}

// Opened reads the reply to an open request.
func (d *Decoder) Opened() Opened {
	o := Opened{Lease: d.Uint64(), Size: d.Int64(), ModTime: d.time(), Version: d.String()}
	if d.err != nil {
		return Opened{}
	}
	return o
}

// State reads the reply to a status request.
func (d *Decoder) State() State {
	s := State{Volume: d.String(), Worker: d.String(), CachedBytes: d.Int64(), CapacityBytes: d.Int64(), Connections: d.Uint32(), Leases: d.Uint32()}
	if d.err != nil {
		return State{}
	}
	return s
}

// CheckPath says whether p names something below the volume's data/: segments parted by
// single slashes, each one a name. "" is the root.
func CheckPath(p string) error {
	if p == "" {
		return nil
	}
	if len(p) > MaxPath {
		return fmt.Errorf("%w: path of %d bytes; at most %d", object.ErrInvalid, len(p), MaxPath)
	}
	for s := range strings.SplitSeq(p, "/") {
		if err := CheckName(s); err != nil {
			return fmt.Errorf("path %.300q: %w", p, err)
		}
	}
	return nil
}

// CheckName says whether s can be one segment of a path.
func CheckName(s string) error {
	switch {
	case s == "":
		return fmt.Errorf("%w: empty segment", object.ErrInvalid)
	case s == "." || s == "..":
		return fmt.Errorf("%w: segment %q", object.ErrInvalid, s)
	case len(s) > MaxSegment:
		return fmt.Errorf("%w: segment of %d bytes; at most %d", object.ErrInvalid, len(s), MaxSegment)
	case strings.ContainsAny(s, "/\x00"):
		return fmt.Errorf("%w: segment with a slash or NUL", object.ErrInvalid)
	}
	return nil
}

// PutUint32 writes n into b[:4].
func PutUint32(b []byte, n uint32) { binary.BigEndian.PutUint32(b, n) }

// AppendUint64 appends n.
func AppendUint64(b []byte, n uint64) []byte { return binary.BigEndian.AppendUint64(b, n) }

// AppendUint32 appends n.
func AppendUint32(b []byte, n uint32) []byte { return binary.BigEndian.AppendUint32(b, n) }
