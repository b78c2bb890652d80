package fusefs

import (
	"reflect"
	"sync"
	"testing"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

func TestRequestBuffersAreInMemory(t *testing.T) {
	fresh, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(fresh)
	pages := make([]byte, touched/4096)
	resident := func() (n int) {
		_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&fresh[0])), touched, uintptr(unsafe.Pointer(&pages[0])))
		if errno != 0 {
			t.Fatal(errno)
		}
		for _, p := range pages {
			n += int(p & 1)
		}
		return n
	}
	var s fuse.Server
	pool := (*sync.Pool)(unsafe.Pointer(reflect.ValueOf(&s).Elem().FieldByName("readPool").UnsafeAddr()))
	pool.New = func() any { return fresh }
	if err := touchBuffers(&s); err != nil {
		t.Fatal(err)
	}
	if n := resident(); n != 0 {
		t.Fatalf("%d pages of a new mapping are in memory", n)
	}
	if b, ok := pool.Get().([]byte); !ok || len(b) != len(fresh) {
		t.Fatalf("the pool gives a %T", b)
	}
	if n := resident(); n != len(pages) {
		t.Errorf("%d of %d pages of a buffer are in memory", n, len(pages))
	}
}
