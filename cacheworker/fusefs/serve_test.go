package fusefs

import (
	"encoding/binary"
	"os"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
)

// Attributes of a node never change; where they are compared at each read, that takes a tenth of its time.
func TestTheKernelIsNotAskedToCompareAttributes(t *testing.T) {
	m := newWorld(t, options{}).served()
	st, err := brokerwire.ReadState(m.table.log)
	if err != nil {
		t.Fatal(err)
	}
	const flags = 16 + 12 // behind struct fuse_out_header, in fuse_init_out
	if said := binary.LittleEndian.Uint32(st.InitOut[flags:]); said&fuse.CAP_AUTO_INVAL_DATA != 0 {
		t.Errorf("INIT was answered with %#x", said)
	}
	if o := m.options(true); o.DisabledCapabilities&fuse.CAP_AUTO_INVAL_DATA != 0 {
		t.Error("a mount of an older worker, which has negotiated it, could not be taken over")
	}
}

// go-fuse closes the number of its descriptor, perhaps much later. Whoever had the number by then
// would lose a file: a cache file, in whose place reads were EIO.
func TestAMountThatIsGivenUpKeepsItsNumber(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	kernel := os.NewFile(uintptr(pair[1]), "the other end of the connection")
	defer kernel.Close()
	fuse := os.NewFile(uintptr(pair[0]), "as go-fuse has it")
	if err := (&Served{fd: pair[0]}).giveUp(); err != nil {
		t.Fatal(err)
	}
	if n, err := kernel.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("the connection is still held: read %d bytes, %v", n, err)
	}
	if n, err := unix.Read(pair[0], make([]byte, 1)); n != 0 || err != nil {
		t.Errorf("a server that begins to serve nevertheless reads %d bytes, %v; want the end", n, err)
	}
	if err := fuse.Close(); err != nil {
		t.Error(err)
	}
}
