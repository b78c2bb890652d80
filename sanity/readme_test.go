package sanity

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/larderfs/larder/sanity/leak"
)

// step is a command of the README's transcript, and what it prints, as far as it is shown.
type step struct {
	command string
	shown   []string
}

func transcript(t *testing.T) (steps []step) {
	t.Helper()
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(readme), "```console\n")
	text, _, ends := strings.Cut(rest, "```")
	if !found || !ends {
		t.Fatal("README.md has no transcript")
	}
	for line := range strings.Lines(text) {
		if command, ok := strings.CutPrefix(line, "$ "); ok {
			steps = append(steps, step{command: strings.TrimSpace(command)})
		} else {
			steps[len(steps)-1].shown = append(steps[len(steps)-1].shown, line)
		}
	}
	return steps
}

// varies is what is another each time: ids, times, names of nodes.
var varies = []struct {
	is *regexp.Regexp
	by string
}{
	{regexp.MustCompile(`load-[a-z0-9]{10}`), "JOB"},
	{regexp.MustCompile(`\b\d+m?s( ago)?\b`), "TIME"},
	{regexp.MustCompile(`^\S+\s+done`), "NODE done"},
	{regexp.MustCompile(`\s+`), " "},
}

func normal(line string) string {
	for _, v := range varies {
		line = v.is.ReplaceAllString(line, v.by)
	}
	return strings.TrimSpace(line)
}

// What the README shows is what happens.
func TestTheFirstTenMinutes(t *testing.T) {
	dir, err := os.MkdirTemp("", "try-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := leak.Clean(dir); err != nil {
			t.Error(err)
		}
	})
	const mark = "----------"
	var script strings.Builder
	fmt.Fprintf(&script, "set -m; larder() { %s \"$@\" --dir %s; }\n", larderBinary, filepath.Join(dir, "larder"))
	steps := transcript(t)
	for _, s := range steps[1:] { // built it is already
		fmt.Fprintf(&script, "%s\necho; echo \"%s $?\"\n", strings.ReplaceAll(s.command, "/tmp/try", dir), mark)
	}
	script.WriteString("wait\n")
	cmd := exec.CommandContext(t.Context(), "bash", "-c", script.String())
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v", err)
	}
	parts := strings.Split(strings.ReplaceAll(string(out), dir, "/tmp/try"), mark)
	if len(parts) != len(steps) {
		t.Fatalf("%d of %d commands were run:\n%s", len(parts)-1, len(steps)-1, out)
	}
	for i, s := range steps[1:] {
		printed := map[string]bool{}
		for line := range strings.Lines(parts[i]) {
			printed[normal(line)] = true
		}
		if status := strings.Fields(parts[i+1])[0]; status != "0" {
			t.Errorf("%s: exit code %s:\n%s", s.command, status, parts[i])
		}
		for _, line := range s.shown {
			if !printed[normal(line)] {
				t.Errorf("%s: does not print %q, but\n%s", s.command, normal(line), parts[i])
			}
		}
	}
}
