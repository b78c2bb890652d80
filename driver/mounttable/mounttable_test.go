package mounttable

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestLinesAreParsed(t *testing.T) {
	for line, want := range map[string]Entry{
		`36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`: {
			Dev: unix.Mkdev(98, 0), Root: "/mnt1", Path: "/mnt2", FSType: "ext3", Source: "/dev/root"},
		`36 35 0:44 /data/a\040b /t\134x\011y ro shared:7 master:1 - fuse.larder lar\043der rw`: {
			Dev: unix.Mkdev(0, 44), Root: "/data/a b", Path: "/t\\x\ty", ReadOnly: true, FSType: "fuse.larder", Source: "lar#der"},
		`36 35 0:44 /data//deleted /t ro - fuse s ro,user_id=0`: {
			Dev: unix.Mkdev(0, 44), Root: "/data", Path: "/t", ReadOnly: true, FSType: "fuse", Source: "s", FSReadOnly: true},
		`36 35 0:44 / /t rw - tmpfs  rw`: {Dev: unix.Mkdev(0, 44), Root: "/", Path: "/t", FSType: "tmpfs"},
	} {
		if got, ok := parse(line); !ok || got != want {
			t.Errorf("%s:\ngot  %+v, %v\nwant %+v", line, got, ok, want)
		}
	}
	for _, line := range []string{"", "36 35 0:44 / /t", "36 35 0:44 / - ext4 x rw", "36 35 0:44 / /t rw -", "36 35 0 / /t rw - ext4 x rw", "36 35 x:1 / /t rw - ext4 x rw"} {
		if got, ok := parse(line); ok {
			t.Errorf("%q is %+v", line, got)
		}
	}
}

func TestOnlyFUSEFileSystemsAreFUSE(t *testing.T) {
	for fstype, want := range map[string]bool{"fuse": true, "fuse.larder": true, "fuseblk": false, "fusectl": false, "tmpfs": false} {
		if got := (Entry{FSType: fstype}).FUSE(); got != want {
			t.Errorf("%s: %v", fstype, got)
		}
	}
}

func TestTheKernelsTableTellsTheTopmostMount(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a b\\c#d\te\nf")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	for i, fstype := range []string{"tmpfs", "ramfs"} {
		if err := unix.Mount("", path, fstype, 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		e, ok, err := At(path)
		if err != nil || !ok || e.FSType != fstype || e.Root != "/" || e.Dev != st.Dev || e.ReadOnly || e.FSReadOnly {
			t.Errorf("mount %d: %+v, %v, %v", i, e, ok, err)
		}
	}
}

func FuzzTable(f *testing.F) {
	if own, err := os.ReadFile("/proc/self/mountinfo"); err == nil {
		f.Add(string(own))
	}
	f.Add(`36 35 98:0 /\040\777\0 /mnt2 rw - ext3 /dev/root rw`)
	f.Fuzz(func(t *testing.T, text string) {
		table, err := Parse(strings.NewReader(text))
		if err != nil {
			return
		}
		for _, e := range table[:min(len(table), 8)] {
			if got, ok := table.At(e.Path); e.Path == "" || !ok || got.Path != e.Path {
				t.Fatalf("%+v; At says %+v, %v", e, got, ok)
			}
		}
	})
}
