package fusefs

import (
	"bytes"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// A cache file that the disk does not give back is read from the store, also by a READ that has been promised the file.
func TestADiskThatFailsIsNotSeen(t *testing.T) {
	for _, splice := range []bool{true, false} {
		t.Run(fmt.Sprint("splice ", splice), func(t *testing.T) {
			w := newWorld(t, options{features: &Features{Splice: splice}})
			u := newUser(t, 65534)
			want := bytesOf(1, 3<<20)
			w.put("f", want)
			w.complete(u, "f")
			fd := u.open(w.data("f"), unix.O_DIRECT) // each read reaches the worker
			if got := u.pread(fd, 0, 4096); !bytes.Equal(got, want[:4096]) {
				t.Error("wrong bytes")
			}
			w.mem.Requests()
			n := w.node("f")
			w.served().table.mu.RLock()
			file := n.file.reader.File()
			w.served().table.mu.RUnlock()
			good, err := unix.FcntlInt(uintptr(file.Fd()), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(good)
			folder, err := os.Open(w.tier()) // nothing can be read of it
			if err != nil {
				t.Fatal(err)
			}
			defer folder.Close()
			if err := unix.Dup3(int(folder.Fd()), file.Fd(), unix.O_CLOEXEC); err != nil {
				t.Fatal(err)
			}
			if got := u.pread(fd, 1<<20+4096, 8192); !bytes.Equal(got, want[1<<20+4096:1<<20+12288]) {
				t.Error("wrong bytes, or none, from a disk that fails")
			}
			if err := unix.Dup3(good, file.Fd(), unix.O_CLOEXEC); err != nil {
				t.Fatal(err)
			}
			if st := w.store.Stats(); st.BadChunks != 1 || len(w.mem.Requests()) == 0 {
				t.Errorf("the store was not asked: %+v", st)
			}
			if got := u.pread(fd, 2<<20, 4096); !bytes.Equal(got, want[2<<20:2<<20+4096]) {
				t.Error("wrong bytes afterwards")
			}
		})
	}
}
