package fusefs

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

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
