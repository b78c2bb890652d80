package brokerwire

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc64"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// A mount's memfd holds all that must outlive a process: a header, written by the broker
// only, and from [StateLog] on the node table of fusefs, written by the worker only. It is
// sealed against shrinking. The header has two slots; a write goes to the one that does not
// hold the newest whole state, so that a SIGKILL in the middle of it leaves that one.
const (
	slotSize = 128 << 10
	slotHead = 8 + 8 + 4 + 8 // magic, generation, length, checksum
	StateLog = 2 * slotSize
	magic    = "LARDER\x00\x01"
)

var sums = crc64.MakeTable(crc64.ECMA)

// State is the header of a mount's memfd.
type State struct {
	Volume    Volume    `json:"volume"`
	Path      string    `json:"path"` // where the FUSE file system is mounted
	Dev       uint64    `json:"dev"`  // st_dev of the FUSE file system
	Since     time.Time `json:"since"`
	InitIn    []byte    `json:"initIn"`  // the kernel's INIT request
	InitOut   []byte    `json:"initOut"` // the first worker's answer
	Socket    string    `json:"socket"`  // name below domain/ that the listener is bound to
	Takeovers int       `json:"takeovers"`

	LongestStall time.Duration `json:"longestStall,omitempty"` // without a worker, before a take-over
}

// slotBody is a state in its slot.
type slotBody struct {
	State
	Credentials *sealed `json:"credentials,omitempty"`
	Secrets     string  `json:"secrets,omitempty"` // see [Secrets]
}

// NewState makes the memfd.
func NewState(s State) (*os.File, error) {
	fd, err := unix.MemfdCreate("larder-mount", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), "state")
	err = f.Truncate(StateLog)
	if err == nil {
		err = WriteState(f, s)
	}
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("memfd: %w", err)
	}
	return f, nil
}

// WriteState replaces the header. One writer at a time.
func WriteState(f *os.File, s State) error {
	body, err := json.Marshal(slotBody{s, seal(&s.Volume), s.Volume.Secrets.text})
	if err != nil {
		return fmt.Errorf("encode state: %w", err)
	}
	if len(body) > slotSize-slotHead {
		return fmt.Errorf("state of %d bytes is too large: %w", len(body), object.ErrInvalid)
	}
	_, newest, _ := newestSlot(f)
	slot := 1 - newest
	generation := max(slotGeneration(f, 0), slotGeneration(f, 1)) + 1
	b := make([]byte, slotHead+len(body))
	copy(b, magic)
	binary.LittleEndian.PutUint64(b[8:], generation)
	binary.LittleEndian.PutUint32(b[16:], uint32(len(body)))
	binary.LittleEndian.PutUint64(b[20:], crc64.Checksum(body, sums)^generation)
	copy(b[slotHead:], body)
	if _, err := f.WriteAt(b, int64(slot)*slotSize); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}

// ReadState reads the newest whole header. The file may come from another process: it
// must be a sealed memfd, and what it says is parsed like any other input.
func ReadState(f *os.File) (State, error) {
	seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil || seals&unix.F_SEAL_SHRINK == 0 {
		return State{}, fmt.Errorf("state is not a sealed memfd: %w", object.ErrInvalid)
	}
	s, _, err := newestSlot(f)
	return s, err
}

// newestSlot reads the whole slot with the higher generation.
func newestSlot(f *os.File) (s State, slot int, err error) {
	if slotGeneration(f, 1) > slotGeneration(f, 0) {
		slot = 1
	}
	if s, err = readSlot(f, slot); err != nil {
		slot = 1 - slot
		s, err = readSlot(f, slot)
	}
	return s, slot, err
}

func slotGeneration(f *os.File, i int) uint64 {
	b := make([]byte, 16)
	if _, err := f.ReadAt(b, int64(i)*slotSize); err != nil || string(b[:8]) != magic {
		return 0
	}
	return binary.LittleEndian.Uint64(b[8:])
}

func readSlot(f *os.File, i int) (State, error) {
	b := make([]byte, slotSize)
	if _, err := f.ReadAt(b, int64(i)*slotSize); err != nil {
		return State{}, fmt.Errorf("read state: %w", err)
	}
	return DecodeSlot(b)
}

// DecodeSlot parses one slot of the header.
func DecodeSlot(b []byte) (State, error) {
	if len(b) < slotHead || string(b[:8]) != magic {
		return State{}, fmt.Errorf("state has no header: %w", object.ErrInvalid)
	}
	generation, n := binary.LittleEndian.Uint64(b[8:]), binary.LittleEndian.Uint32(b[16:])
	if int64(n) > int64(len(b)-slotHead) {
		return State{}, fmt.Errorf("state header is cut short: %w", object.ErrInvalid)
	}
	body := b[slotHead : slotHead+int(n)]
	if crc64.Checksum(body, sums)^generation != binary.LittleEndian.Uint64(b[20:]) {
		return State{}, fmt.Errorf("state header does not match its sum: %w", object.ErrInvalid)
	}
	var sb slotBody
	if err := json.Unmarshal(body, &sb); err != nil {
		return State{}, fmt.Errorf("state header: %v: %w", err, object.ErrInvalid)
	}
	s := sb.State
	if sb.Credentials != nil {
		s.Volume.Credentials = Credentials(*sb.Credentials)
	}
	s.Volume.Secrets = Secrets{sb.Secrets}
	if !cleanAbs(s.Path) || s.Volume.ID == "" {
		return State{}, fmt.Errorf("state header names no volume or path: %w", object.ErrInvalid)
	}
	return s, nil
}

// NewBackings makes a file of backing ids, which can be too many for a message.
func NewBackings(ids []int32) (*os.File, error) {
	fd, err := unix.MemfdCreate("larder-backings", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), "backings")
	b := make([]byte, 0, 4*len(ids))
	for _, id := range ids {
		b = binary.LittleEndian.AppendUint32(b, uint32(id))
	}
	if _, err := f.WriteAt(b, 0); err != nil {
		f.Close()
		return nil, fmt.Errorf("memfd: %w", err)
	}
	return f, nil
}

// ReadBackings reads what NewBackings made, from a peer who may have made it otherwise.
func ReadBackings(f *os.File) (map[int32]struct{}, error) {
	const most = 4 << 24 // bytes
	b, err := io.ReadAll(io.NewSectionReader(f, 0, most+1))
	if err != nil {
		return nil, fmt.Errorf("backing ids: %w", err)
	}
	if len(b)%4 != 0 || len(b) > most {
		return nil, fmt.Errorf("backing ids of %d bytes: %w", len(b), object.ErrInvalid)
	}
	ids := make(map[int32]struct{}, len(b)/4)
	for ; len(b) > 0; b = b[4:] {
		ids[int32(binary.LittleEndian.Uint32(b))] = struct{}{}
	}
	return ids, nil
}
