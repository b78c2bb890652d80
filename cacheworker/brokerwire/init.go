package brokerwire

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// Offsets in struct fuse_init_in behind its 40 byte header and in fuse_init_out behind its
// 16 byte header (include/uapi/linux/fuse.h).
const (
	inMinor, inFlags, inFlags2             = 40 + 4, 40 + 12, 40 + 16
	outMinor, outFlags, outMaxWrite        = 16 + 4, 16 + 12, 16 + 20
	outFlags2, outStackDepth               = 16 + 32, 16 + 36
	initInSize, initOutSize                = 40 + 64, 16 + 64
	initExt                         uint32 = 1 << 30 // FUSE_INIT_EXT: flags2 count
	passthroughFlag                        = 1 << 5  // FUSE_PASSTHROUGH, in flags2
	resendFlag                             = 1 << 7  // FUSE_HAS_RESEND, in flags2
)

func u32(b []byte, off int) uint32 { return binary.LittleEndian.Uint32(b[off:]) }

// Negotiated reports whether a worker has answered INIT.
func (s State) Negotiated() bool { return len(s.InitOut) >= initOutSize }

// CanResend reports whether the kernel delivers the mount's requests again to another worker.
func (s State) CanResend() bool { return s.negotiated(resendFlag) }

// CanPassthrough reports whether the mount may have backing files.
func (s State) CanPassthrough() bool { return s.negotiated(passthroughFlag) }

// Without names the guarantees that the mount does without, as larder status does.
func (s State) Without() (names []string) {
	if !s.CanResend() {
		names = append(names, "resend")
	}
	if !s.CanPassthrough() {
		names = append(names, "passthrough")
	}
	return names
}

func (s State) negotiated(flag uint32) bool {
	return s.Negotiated() && u32(s.InitOut, outFlags2)&flag != 0
}

// Interview is the kernel's INIT, played to a worker over a socket pair.
type Interview struct {
	Theirs *os.File // for the worker
	ours   *os.File
	first  []byte // the first worker's answer; nil for that one itself
}

// Ask puts INIT into the socket pair. A later worker is offered what was negotiated, no more.
func (s State) Ask() (*Interview, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	i := &Interview{Theirs: os.NewFile(uintptr(pair[0]), "init"), ours: os.NewFile(uintptr(pair[1]), "init"), first: s.InitOut}
	if _, err := i.ours.Write(maskInit(s.InitIn, s.InitOut)); err != nil {
		i.Close()
		return nil, fmt.Errorf("feed INIT: %w", err)
	}
	return i, nil
}

// Answer is what the worker has written. A later worker must agree with the first. It does not
// wait: who was to answer says by other means that it has.
func (i *Interview) Answer() ([]byte, error) {
	b := make([]byte, 4096)
	n, _, err := unix.Recvfrom(int(i.ours.Fd()), b, unix.MSG_DONTWAIT)
	if err != nil || n == 0 {
		return nil, fmt.Errorf("worker did not answer INIT: %w", object.ErrUnavailable)
	}
	return b[:n], agree(i.first, b[:n])
}

// Close ends the socket pair.
func (i *Interview) Close() { CloseFiles([]*os.File{i.Theirs, i.ours}) }

func maskInit(in, out []byte) []byte {
	in = bytes.Clone(in)
	if out == nil || len(in) < initInSize || len(out) < initOutSize {
		return in
	}
	binary.LittleEndian.PutUint32(in[inMinor:], min(u32(in, inMinor), u32(out, outMinor)))
	binary.LittleEndian.PutUint32(in[inFlags:], u32(in, inFlags)&(u32(out, outFlags)|initExt))
	binary.LittleEndian.PutUint32(in[inFlags2:], u32(in, inFlags2)&u32(out, outFlags2))
	return in
}

// agree checks an answer, and holds it against the first one if there was one.
func agree(first, b []byte) error {
	if len(b) < initOutSize || int32(u32(b, 4)) != 0 {
		return fmt.Errorf("worker refused INIT: %w", object.ErrInvalid)
	}
	if len(first) < initOutSize {
		return nil
	}
	for _, f := range []struct {
		name string
		off  int
	}{{"minor version", outMinor}, {"flags", outFlags}, {"flags2", outFlags2}, {"stack depth", outStackDepth}} {
		if u32(first, f.off) != u32(b, f.off) {
			return fmt.Errorf("worker answers INIT with %s %#x, negotiated was %#x: %w", f.name, u32(b, f.off), u32(first, f.off), object.ErrInvalid)
		}
	}
	if u32(b, outMaxWrite) < u32(first, outMaxWrite) {
		return fmt.Errorf("worker takes requests of %d bytes, the mount sends %d: raise the sysctl fs.fuse.max_pages_limit: %w",
			u32(b, outMaxWrite), u32(first, outMaxWrite), object.ErrInvalid)
	}
	return nil
}
