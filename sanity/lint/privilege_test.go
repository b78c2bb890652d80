package lint

import (
	"path"
	"regexp"
	"strings"
	"testing"
)

const (
	privilegedFolder = "driver/broker"
	privilegedLines  = 800 // it has fewer, without tests: a page of them must be reviewed as what root does
)

// privileged are the calls that mount, or that can be anything.
var privileged = regexp.MustCompile(`^(Mount|Unmount|MoveMount|MountSetattr|OpenTree|Fsopen|Fspick|Fsmount|Fsconfig\w*|` +
	`PivotRoot|Chroot|Setns|Unshare|Mknod\w*|Syscall\w*|RawSyscall\w*|SYS_\w+)$`)

func TestOnlyTheBrokerHasPrivilegedCode(t *testing.T) {
	lines, calls := 0, 0
	for _, s := range sources(t) {
		if s.test() {
			continue
		}
		for _, i := range s.Imports {
			if p := strings.Trim(i.Path.Value, `"`); i.Name != nil && (p == "syscall" || p == "golang.org/x/sys/unix") {
				t.Errorf("%s: %s has another name, which hides calls", fset.Position(i.Pos()), p)
			}
		}
		inBroker := strings.HasPrefix(path.Dir(s.name)+"/", privilegedFolder+"/")
		if inBroker {
			lines += strings.Count(string(s.text), "\n")
		}
		for _, pkg := range []string{"unix", "syscall"} {
			for sel := range selectors(s.File, pkg) {
				if !privileged.MatchString(sel.Sel.Name) {
					continue
				}
				calls++
				if !inBroker {
					t.Errorf("%s: %s.%s belongs in %s", fset.Position(sel.Pos()), pkg, sel.Sel.Name, privilegedFolder)
				}
			}
		}
	}
	if lines >= privilegedLines {
		t.Errorf("%s has %d lines without tests: move out what needs no privilege", privilegedFolder, lines)
	}
	if calls == 0 {
		t.Error("no privileged call was found anywhere")
	}
}
