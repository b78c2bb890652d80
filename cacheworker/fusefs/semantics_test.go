package fusefs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// documented are the rows of the table in SEMANTICS.md, as "error errno".
func documented(t *testing.T) (rows []string) {
	t.Helper()
	text, err := os.ReadFile("../SEMANTICS.md")
	if err != nil {
		t.Fatal(err)
	}
	row := regexp.MustCompile("(?m)^\\| `([a-zA-Z]+\\.[a-zA-Z]+)` \\| (E[A-Z]+) \\|")
	for _, m := range row.FindAllStringSubmatch(string(text), -1) {
		rows = append(rows, m[1]+" "+m[2])
	}
	return rows
}

// errorNames are the first members of errnos, as they are written: an error does not know
// the name of its variable.
func errorNames(t *testing.T) (names []string) {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), "fs.go", nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(f, func(n ast.Node) bool {
		v, ok := n.(*ast.ValueSpec)
		if !ok || v.Names[0].Name != "errnos" {
			return true
		}
		for _, row := range v.Values[0].(*ast.CompositeLit).Elts {
			names = append(names, types.ExprString(row.(*ast.CompositeLit).Elts[0]))
		}
		return false
	})
	return names
}

func TestErrnosAreAsDocumented(t *testing.T) {
	var code []string
	for i, name := range errorNames(t) {
		code = append(code, name+" "+unix.ErrnoName(syscall.Errno(errnos[i].errno)))
	}
	if want := documented(t); len(want) == 0 || !slices.Equal(code, want) {
		t.Errorf("the code has\n%s\nSEMANTICS.md has\n%s", strings.Join(code, "\n"), strings.Join(want, "\n"))
	}
}
