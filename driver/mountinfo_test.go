package driver

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMountLinesAreParsed(t *testing.T) {
	for line, want := range map[string]mountPoint{
		`36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`: {
			Dev: "98:0", Root: "/mnt1", Path: "/mnt2", Options: []string{"rw", "noatime"}, FSType: "ext3"},
		`36 35 0:44 /data/a\040b /t\134x\011y ro shared:7 master:1 - fuse.larder larder rw`: {
			Dev: "0:44", Root: "/data/a b", Path: "/t\\x\ty", Options: []string{"ro"}, FSType: "fuse.larder"},
		`36 35 0:44 /data//deleted /t ro - fuse s rw`: {
			Dev: "0:44", Root: "/data", Path: "/t", Options: []string{"ro"}, FSType: "fuse"},
	} {
		if got, err := parseMountPoint(line); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s:\ngot  %+v, %v\nwant %+v", line, got, err, want)
		}
	}
	for _, line := range []string{"", "36 35 0:44 / /t", "36 35 0:44 / - ext4 x rw", "36 35 0:44 / /t rw -"} {
		if got, err := parseMountPoint(line); err == nil {
			t.Errorf("%q is %+v", line, got)
		}
	}
}

func TestTheKernelsTableTellsTheTopmostMount(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a b\\c#d\te\nf")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	for i, fstype := range []string{"tmpfs", "ramfs"} {
		if err := unix.Mount("x", path, fstype, 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
		table, err := readMountTable()
		if err != nil {
			t.Fatal(err)
		}
		if p, ok := table.at(path); !ok || p.FSType != fstype || p.Root != "/" {
			t.Errorf("mount %d: %+v, %v", i, p, ok)
		}
	}
}

func FuzzMountTable(f *testing.F) {
	if own, err := os.ReadFile("/proc/self/mountinfo"); err == nil {
		f.Add(string(own))
	}
	f.Add(`36 35 98:0 /\040\777\0 /mnt2 rw - ext3 /dev/root rw`)
	f.Fuzz(func(t *testing.T, text string) {
		table, err := parseMountTable(strings.NewReader(text))
		if err != nil {
			return
		}
		for _, p := range table[:min(len(table), 8)] {
			if p.Dev == "" || p.FSType == "" && !strings.Contains(text, `\`) {
				t.Fatalf("%+v", p)
			}
			if got, ok := table.at(p.Path); !ok || got.Path != p.Path {
				t.Fatalf("at(%q) = %+v, %v", p.Path, got, ok)
			}
		}
	})
}
