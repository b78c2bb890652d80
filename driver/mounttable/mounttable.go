// Package mounttable reads /proc/self/mountinfo.
//
// Reading it touches no file system. So it is how everybody here looks at a path on which a
// FUSE file system may be mounted: a stat would wait for a server that is away.
package mounttable

import (
	"bufio"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Entry is one mount.
type Entry struct {
	Dev        uint64 // st_dev of the file system; every bind of it has the same
	Root       string // what of the file system is shown: "/", "/data"
	Path       string
	ReadOnly   bool // the mount, whatever its file system is
	FSType     string
	Source     string
	FSReadOnly bool // the file system itself
}

// FUSE reports whether it is a FUSE file system.
func (e Entry) FUSE() bool { return e.FSType == "fuse" || strings.HasPrefix(e.FSType, "fuse.") }

// Table is the kernel's list of mounts, the youngest last.
type Table []Entry

// Read reads the table of this process's mount namespace.
func Read() (Table, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	defer f.Close()
	return Parse(f)
}

// At is what is mounted at a path now; see [Table.At].
func At(path string) (Entry, bool, error) {
	t, err := Read()
	e, ok := t.At(path)
	return e, ok, err
}

// At is the topmost mount at a path without symlinks in it.
func (t Table) At(path string) (Entry, bool) {
	for _, e := range slices.Backward(t) {
		if e.Path == path {
			return e, true
		}
	}
	return Entry{}, false
}

// Dev is the device of what is mounted at a path; [fs.ErrNotExist] if nothing is.
func Dev(path string) (uint64, error) {
	e, ok, err := At(path)
	if err == nil && !ok {
		err = fmt.Errorf("nothing is mounted at %s: %w", path, fs.ErrNotExist)
	}
	return e.Dev, err
}

// Others are the paths, but one, at which a file system is mounted.
func (t Table) Others(dev uint64, but string) []string {
	var paths []string
	for _, e := range t {
		if e.Dev == dev && e.Path != but {
			paths = append(paths, e.Path)
		}
	}
	return paths
}

// Parse reads a table as in proc(5).
func Parse(r io.Reader) (Table, error) {
	var t Table
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		e, ok := parse(lines.Text())
		if !ok {
			return nil, fmt.Errorf("read mounts: line %q is not as in proc(5)", lines.Text())
		}
		t = append(t, e)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	return t, nil
}

// parse reads "id parent major:minor root path options [tags…] - type source superoptions". A
// source may be empty.
func parse(line string) (Entry, bool) {
	head, tail, ok := strings.Cut(line, " - ")
	fields, kind := strings.Split(head, " "), strings.Split(tail, " ")
	if !ok || len(fields) < 6 || len(kind) < 3 || fields[4] == "" {
		return Entry{}, false
	}
	major, minor, _ := strings.Cut(fields[2], ":")
	ma, err := strconv.ParseUint(major, 10, 32)
	if err != nil {
		return Entry{}, false
	}
	mi, err := strconv.ParseUint(minor, 10, 32)
	if err != nil {
		return Entry{}, false
	}
	return Entry{
		Dev:        unix.Mkdev(uint32(ma), uint32(mi)),
		Root:       strings.TrimSuffix(unescape(fields[3]), "//deleted"),
		Path:       unescape(fields[4]),
		ReadOnly:   has(fields[5], "ro"),
		FSType:     unescape(kind[0]),
		Source:     unescape(kind[1]),
		FSReadOnly: has(kind[2], "ro"),
	}, true
}

func has(options, one string) bool { return slices.Contains(strings.Split(options, ","), one) }

// unescape undoes the kernel's \ooo, which stands for space, tab, line break, '\' and '#'.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if c, ok := octal(s[i:]); ok {
			b.WriteByte(c)
			i += 3
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func octal(s string) (byte, bool) {
	if len(s) < 4 || s[0] != '\\' {
		return 0, false
	}
	n := 0
	for _, c := range []byte(s[1:4]) {
		if c < '0' || c > '7' {
			return 0, false
		}
		n = n<<3 | int(c-'0')
	}
	return byte(n), n <= 0xff
}
