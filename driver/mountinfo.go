package driver

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// mountPoint is one line of /proc/self/mountinfo.
type mountPoint struct {
	Dev     string // major:minor of the file system; every bind of it has the same
	Root    string // what of the file system is shown: "/", "/data"
	Path    string
	Options []string // of this mount, not of its file system
	FSType  string
}

func (p mountPoint) readOnly() bool { return slices.Contains(p.Options, "ro") }

// fuse reports whether it is a FUSE mount: of ours, where it stands at a path of ours.
func (p mountPoint) fuse() bool { return p.FSType == "fuse" || strings.HasPrefix(p.FSType, "fuse.") }

// mountTable is the kernel's list of mounts, the youngest last. It is how the node service
// looks at a path: a stat of it could hang on a FUSE file system whose worker is away.
type mountTable []mountPoint

func readMountTable() (mountTable, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	defer f.Close()
	return parseMountTable(f)
}

// at is the topmost mount at a path without symlinks in it.
func (t mountTable) at(path string) (mountPoint, bool) {
	for _, p := range slices.Backward(t) {
		if p.Path == path {
			return p, true
		}
	}
	return mountPoint{}, false
}

func parseMountTable(r io.Reader) (mountTable, error) {
	var t mountTable
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		p, err := parseMountPoint(lines.Text())
		if err != nil {
			return nil, err
		}
		t = append(t, p)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	return t, nil
}

// parseMountPoint reads "id parent major:minor root path options [tags…] - type source superoptions".
func parseMountPoint(line string) (mountPoint, error) {
	head, tail, ok := strings.Cut(line, " - ")
	fields, kind := strings.Fields(head), strings.Fields(tail)
	if !ok || len(fields) < 6 || len(kind) < 1 {
		return mountPoint{}, fmt.Errorf("read mounts: line %q is not as in proc(5)", line)
	}
	return mountPoint{
		Dev:     fields[2],
		Root:    strings.TrimSuffix(unescape(fields[3]), "//deleted"),
		Path:    unescape(fields[4]),
		Options: strings.Split(fields[5], ","),
		FSType:  unescape(kind[0]),
	}, nil
}

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
