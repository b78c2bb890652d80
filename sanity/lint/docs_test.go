package lint

import (
	"go/ast"
	"go/token"
	"maps"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// literals calls f for the strings in the calls and constants of the non-test files below folder.
func literals(t *testing.T, folder string, f func(s source, lit string, in ast.Node)) {
	t.Helper()
	for _, s := range sources(t) {
		if s.test() || !strings.HasPrefix(s.name, folder) {
			continue
		}
		var above []ast.Node
		ast.Inspect(s.File, func(n ast.Node) bool {
			if n == nil {
				above = above[:len(above)-1]
				return true
			}
			if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
				if text, err := strconv.Unquote(lit.Value); err == nil {
					f(s, text, above[len(above)-1])
				}
			}
			above = append(above, n)
			return true
		})
	}
}

// same compares what the README names with what the code has.
func same(t *testing.T, what string, readme, code map[string]bool) {
	t.Helper()
	if len(code) == 0 {
		t.Fatalf("found no %s in the code", what)
	}
	for _, name := range slices.Sorted(maps.Keys(code)) {
		if !readme[name] {
			t.Errorf("README.md does not name the %s %s", what, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(readme)) {
		if !code[name] {
			t.Errorf("README.md names the %s %s, which is not there", what, name)
		}
	}
}

func matches(t *testing.T, file, pattern string) map[string]bool {
	t.Helper()
	text, err := os.ReadFile(root + "/" + file)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(string(text), -1) {
		found[m[1]] = true
	}
	return found
}

// The reference has every metric that the code has (package cmd/larder tests that); what other documents name is there.
func TestMetricsInDocumentsExist(t *testing.T) {
	have := matches(t, "cmd/larder/REFERENCE.md", "[`](larder_[a-z_]+)")
	if len(have) == 0 {
		t.Fatal("found no metric in the reference")
	}
	documents(t, func(name, text string) {
		for _, m := range regexp.MustCompile("[`](larder_[a-z_]+)").FindAllStringSubmatch(text, -1) {
			if !have[m[1]] {
				t.Errorf("%s: there is no metric %s", name, m[1])
			}
		}
	})
}

func TestReadmeNamesEveryFlag(t *testing.T) {
	code, hidden := map[string]bool{}, map[string]bool{}
	literals(t, "cmd/larder/", func(_ source, lit string, in ast.Node) {
		call, ok := in.(*ast.CallExpr)
		if !ok {
			return
		}
		sel, ok := call.Fun.(*ast.SelectorExpr)
		switch {
		case !ok || strings.HasPrefix(lit, "-"):
		case sel.Sel.Name == "MarkHidden":
			hidden[lit] = true
		case strings.HasSuffix(sel.Sel.Name, "Var") && isText(call.Args, 1, lit): // StringVar(&x, name, …)
			code[lit] = true
		case strings.HasSuffix(sel.Sel.Name, "VarP") && isText(call.Args, 1, lit):
			code[lit] = true
		}
	})
	maps.DeleteFunc(code, func(name string, _ bool) bool { return hidden[name] || name == "unmount-at-exit" }) // of a hidden command
	readme := matches(t, "README.md", "[`](--[a-z-]+)[` ]")
	named := map[string]bool{}
	for f := range readme {
		named[strings.TrimPrefix(f, "--")] = true
	}
	delete(code, "output") // named by its short form
	same(t, "flag", named, code)
}

func isText(args []ast.Expr, i int, text string) bool {
	lit, ok := args[min(i, len(args)-1)].(*ast.BasicLit)
	if !ok {
		return false
	}
	got, err := strconv.Unquote(lit.Value)
	return err == nil && got == text
}

func TestReadmeNamesEveryParameter(t *testing.T) {
	code := map[string]bool{}
	literals(t, "driver/request.go", func(_ source, lit string, in ast.Node) {
		spec, ok := in.(*ast.ValueSpec)
		if ok && strings.HasPrefix(spec.Names[0].Name, "key") && !strings.Contains(lit, "/") {
			code[lit] = true
		}
	})
	text, err := os.ReadFile(root + "/README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(text), "| parameter |")
	table, _, _ = strings.Cut(table, "\n\n")
	readme := map[string]bool{}
	for line := range strings.Lines(table) {
		cell, _, _ := strings.Cut(strings.TrimPrefix(line, "|"), "|")
		for _, m := range regexp.MustCompile("`([a-zA-Z]+)`").FindAllStringSubmatch(cell, -1) {
			readme[m[1]] = true
		}
	}
	same(t, "parameter", readme, code)
}

func TestReadmeNamesEveryTarget(t *testing.T) {
	code := matches(t, "Makefile", `(?m)^([a-z0-9-]+):.*##`)
	for target := range matches(t, "README.md", "make ([a-z0-9-]+)") {
		if !code[target] {
			t.Errorf("README.md names make %s, which is not there", target)
		}
	}
}

func TestTestsInDocumentsExist(t *testing.T) {
	tests := map[string]bool{}
	for _, s := range sources(t) {
		for _, d := range s.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok {
				tests[fn.Name.Name] = true
			}
		}
	}
	documents(t, func(name, text string) {
		for _, m := range regexp.MustCompile("`((?:Test|Benchmark|Fuzz)[A-Z0-9][A-Za-z0-9]*)`").FindAllStringSubmatch(text, -1) {
			if !tests[m[1]] {
				t.Errorf("%s: there is no %s", name, m[1])
			}
		}
	})
}

func TestLinksInDocumentsLeadSomewhere(t *testing.T) {
	documents(t, func(name, text string) {
		for _, m := range regexp.MustCompile(`\]\(([^)#:]+)\)`).FindAllStringSubmatch(text, -1) {
			if _, err := os.Stat(path.Join(root, path.Dir(name), m[1])); err != nil {
				t.Errorf("%s: link to %s: %v", name, m[1], err)
			}
		}
	})
}

func documents(t *testing.T, f func(name, text string)) {
	t.Helper()
	found := false
	walk(t, func(name string, text []byte) {
		if strings.HasSuffix(name, ".md") {
			found = true
			f(name, string(text))
		}
	})
	if !found {
		t.Fatal("no document found")
	}
}

// Comments name sections and invariants by their number: cacheworker/DESIGN.md has them all.
func TestSectionsNamedInCommentsExist(t *testing.T) {
	sections := matches(t, "cacheworker/DESIGN.md", `(?m)^(?:- )?\*\*(\d+\.\d+) `)
	named := regexp.MustCompile(`DESIGN §(\d+\.\d+)`)
	for _, s := range sources(t) {
		for _, m := range named.FindAllStringSubmatch(string(s.text), -1) {
			if !sections[m[1]] {
				t.Errorf("%s: cacheworker/DESIGN.md has no %s", s.name, m[1])
			}
		}
	}
}
