package lint

import (
	"bytes"
	"encoding/json"
	"errors"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const (
	root   = "../.."
	module = "github.com/larderfs/larder"
)

// sleepers are the test functions that may call time.Sleep, and why, as "folder.Function". No
// reason is needed inside a synctest bubble, whose clock is not the real one, and in a
// function named eventually, which asks again until a deadline.
var sleepers = map[string]string{
	"cacheworker/metadata.model":    "is called in a synctest bubble",
	"cacheworker/fill.model":        "is called in a synctest bubble",
	"sanity.TestKilledWhileLoading": "kills at a random moment, a second after a status",
	"sanity.await":                  "no event tells of a mount",
	"sanity/chaos.idle":             "readers on two CPUs let each other run",
	"sanity/leak.await":             "ending a process is an event for its parent only",
	"sanity/leak.Kill":              "ending a process is an event for its parent only",
}

// source is one Go file of the module, parsed.
type source struct {
	name string // relative to the module's root
	text []byte
	*ast.File
}

func (s source) test() bool {
	return strings.HasSuffix(s.name, "_test.go") || strings.HasPrefix(s.name, "sanity/") ||
		strings.HasSuffix(path.Dir(s.name), "test")
}

func (s source) generated() bool { return ast.IsGenerated(s.File) }

var fset = token.NewFileSet()

// sources are all Go files of the module; reading them here is also what tells go test's
// cache that the result depends on them.
func sources(t *testing.T) []source {
	t.Helper()
	var all []source
	walk(t, func(name string, text []byte) {
		if !strings.HasSuffix(name, ".go") {
			return
		}
		f, err := parser.ParseFile(fset, name, text, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, source{name, text, f})
	})
	if len(all) == 0 {
		t.Fatal("no Go file found")
	}
	return all
}

// walk calls f for the files of the module, relative to its root.
func walk(t *testing.T, f func(name string, text []byte)) {
	t.Helper()
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		rel := filepath.ToSlash(strings.TrimPrefix(p, root+"/"))
		switch {
		case err != nil:
			return err
		case d.IsDir() && (rel == ".git" || rel == "build"):
			return filepath.SkipDir
		case !d.Type().IsRegular():
			return nil
		}
		text, err := os.ReadFile(p)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		f(rel, text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestFilesAreFormatted(t *testing.T) {
	for _, s := range sources(t) {
		want, err := format.Source(s.text)
		if err != nil {
			t.Errorf("%s: %v", s.name, err)
		} else if !bytes.Equal(want, s.text) {
			t.Errorf("%s: run gofmt", s.name)
		}
	}
}

func TestVetFindsNothing(t *testing.T)         { mustPass(t, "go", "vet", "./...") }
func TestStaticcheckFindsNothing(t *testing.T) { mustPass(t, "go", "tool", "staticcheck", "./...") }
func TestGeneratedCodeIsUpToDate(t *testing.T) {
	mustPass(t, "go", "run", "./sanity/protogen", "-check")
}

func mustPass(t *testing.T, command string, args ...string) {
	t.Helper()
	if out, err := run(command, args...); err != nil {
		t.Errorf("%s %s: %v\n%s", command, strings.Join(args, " "), err, out)
	}
}

func run(command string, args ...string) ([]byte, error) {
	cmd := exec.Command(command, args...)
	cmd.Dir = root
	return cmd.CombinedOutput()
}

// layers are the folders that may hold packages, with their rank: a package imports only from
// lower ranks and from its own folder's entry. The longest prefix counts.
var layers = map[string]int{
	"cmd":                      10,
	"driver":                   9,
	"driver/broker":            8,
	"cacheworker":              7, // the wiring
	"cacheworker/fusefs":       6,
	"cacheworker/domainsocket": 6,
	"cacheworker/dataset":      5,
	"cacheworker/fill":         4,
	"cacheworker/metadata":     4,
	"cacheworker/tiers":        4,
	"cacheworker/cachestore":   3,
	"cacheworker/source":       3,
	"cacheworker/workerpb":     3,
	"master":                   2,
	"cacheworker/policy":       1,
	"cacheworker/brokerwire":   1,
	"driver/mounttable":        0,
	"driver/takeover":          2,
	"cacheworker/telemetry":    0,
	"cacheworker/object":       0,
}

// lean packages import nothing from outside the module but the standard library and x/sys:
// the leaves, and the client that other programs import.
var lean = []string{
	"cacheworker/object", "cacheworker/brokerwire", "cacheworker/policy", "cacheworker/domainsocket/shortcircuit",
	"driver/mounttable",
}

// goPackage is what go list -json says of a package.
type goPackage struct {
	ImportPath string
	Standard   bool
	Imports    []string
}

func packages(t *testing.T, args ...string) []goPackage {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Standard,Imports"}, args...)...)
	cmd.Dir = root
	var diag strings.Builder
	cmd.Stderr = &diag
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &diag)
	}
	var all []goPackage
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// ours is the folder of a package of this module.
func ours(importPath string) (folder string, ok bool) {
	return strings.CutPrefix(importPath, module+"/")
}

func layer(folder string) (prefix string, rank int, ok bool) {
	for p := folder; p != "."; p = path.Dir(p) {
		if rank, ok := layers[p]; ok {
			return p, rank, true
		}
	}
	return "", 0, false
}

func TestImportsPointDownwards(t *testing.T) {
	for _, p := range packages(t, "./...") {
		folder, ok := ours(p.ImportPath)
		if !ok || strings.HasPrefix(folder, "sanity/") || folder == "sanity" {
			continue // stands above all others
		}
		from, rank, ok := layer(folder)
		if !ok {
			t.Errorf("%s has no rank: say in layers where it stands", folder)
			continue
		}
		for _, imported := range p.Imports {
			to, ok := ours(imported)
			if !ok {
				continue
			}
			prefix, below, ok := layer(to)
			if !ok || (below >= rank && prefix != from) {
				t.Errorf("%s (rank %d) imports %s (rank %d)", folder, rank, to, below)
			}
		}
	}
}

func TestLeavesImportOnlyTheStandardLibrary(t *testing.T) {
	for _, leaf := range lean {
		for _, p := range packages(t, "-deps", "./"+leaf) {
			inModule := strings.HasPrefix(p.ImportPath, module+"/")
			if !p.Standard && !inModule && !strings.HasPrefix(p.ImportPath, "golang.org/x/sys/") {
				t.Errorf("%s depends on %s", leaf, p.ImportPath)
			}
		}
	}
}

var unfinished = regexp.MustCompile(`\b(TODO|FIXME|XXX|HACK)\b`)

func TestNothingIsLeftUnfinished(t *testing.T) {
	for _, s := range sources(t) {
		if s.generated() {
			continue
		}
		for _, group := range s.Comments {
			if m := unfinished.FindString(group.Text()); m != "" {
				t.Errorf("%s: %s", fset.Position(group.Pos()), m)
			}
		}
		if calls(s.File, "context", "TODO") {
			t.Errorf("%s: context.TODO", s.name)
		}
	}
	others := []string{".proto", ".yaml", ".yml", ".sh", ".md", "Makefile", ".ci/run"}
	walk(t, func(name string, text []byte) {
		isOne := slices.ContainsFunc(others, func(end string) bool { return strings.HasSuffix(name, end) })
		if m := unfinished.Find(text); isOne && m != nil {
			t.Errorf("%s: %s", name, m)
		}
	})
}

func TestNobodySleepsInTests(t *testing.T) {
	unused := maps.Clone(sleepers)
	all := sources(t)
	bubbles := bubbleFuncs(all)
	for _, s := range all {
		if !s.test() {
			continue
		}
		for _, d := range s.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Name.Name == "eventually" || !sleeps(fn, bubbles[path.Dir(s.name)]) {
				continue
			}
			name := path.Dir(s.name) + "." + fn.Name.Name
			delete(unused, name)
			if sleepers[name] == "" {
				t.Errorf("%s: %s sleeps: wait for the event, or say in sleepers why there is none", fset.Position(fn.Pos()), name)
			}
		}
	}
	for name := range unused {
		t.Errorf("sleepers: %s does not sleep", name)
	}
}

// bubbleFuncs are, by folder, the functions that run what they are given in a synctest bubble.
func bubbleFuncs(all []source) map[string]map[string]bool {
	bubbles := map[string]map[string]bool{}
	for _, s := range all {
		for _, d := range s.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || !calls(fn, "synctest", "Test") {
				continue
			}
			dir := path.Dir(s.name)
			if bubbles[dir] == nil {
				bubbles[dir] = map[string]bool{}
			}
			bubbles[dir][fn.Name.Name] = true
		}
	}
	return bubbles
}

// sleeps reports whether fn calls time.Sleep outside the arguments of synctest.Test and of bubbles.
func sleeps(fn *ast.FuncDecl, bubbles map[string]bool) bool {
	found := false
	ast.Inspect(fn, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		found = found || isSelector(call.Fun, "time", "Sleep")
		name, ok := call.Fun.(*ast.Ident)
		return !isSelector(call.Fun, "synctest", "Test") && !(ok && bubbles[name.Name])
	})
	return found
}

// calls reports whether pkg.name is used in n.
func calls(n ast.Node, pkg, name string) bool {
	for sel := range selectors(n, pkg) {
		if sel.Sel.Name == name {
			return true
		}
	}
	return false
}

func isSelector(e ast.Expr, pkg, name string) bool {
	sel, ok := e.(*ast.SelectorExpr)
	if !ok || sel.Sel.Name != name {
		return false
	}
	id, ok := sel.X.(*ast.Ident)
	return ok && id.Name == pkg
}

// selectors yields pkg.Anything in n.
func selectors(n ast.Node, pkg string) func(yield func(*ast.SelectorExpr) bool) {
	return func(yield func(*ast.SelectorExpr) bool) {
		goOn := true
		ast.Inspect(n, func(n ast.Node) bool {
			if sel, ok := n.(*ast.SelectorExpr); ok && goOn && isSelector(sel, pkg, sel.Sel.Name) {
				goOn = yield(sel)
			}
			return goOn
		})
	}
}

func TestOnlyCommandsExitAndReadTheEnvironment(t *testing.T) {
	commands := map[string]bool{"Exit": true, "Getenv": true, "LookupEnv": true, "Environ": true, "Args": true}
	for _, s := range sources(t) {
		if s.test() || s.generated() || s.Name.Name == "main" {
			continue
		}
		for sel := range selectors(s.File, "os") {
			if commands[sel.Sel.Name] {
				t.Errorf("%s: os.%s below cmd", fset.Position(sel.Pos()), sel.Sel.Name)
			}
		}
		for _, d := range s.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
				t.Errorf("%s: func init", fset.Position(fn.Pos()))
			}
		}
	}
}

func TestEveryPackageHasAComment(t *testing.T) {
	documented := map[string]bool{}
	for _, s := range sources(t) {
		if strings.HasSuffix(s.name, "_test.go") {
			continue
		}
		dir := path.Dir(s.name)
		documented[dir] = documented[dir] || s.Doc != nil || s.generated()
	}
	for dir, ok := range documented {
		if !ok {
			t.Errorf("%s has no package comment", dir)
		}
	}
}

// fuzzed are what others send us; each has a fuzz test in the folder or below it.
var fuzzed = map[string]string{
	"cacheworker/domainsocket": "socket frames",
	"driver":                   "volume attributes",
	"cacheworker/source":       "object keys",
	"cacheworker/brokerwire":   "broker messages",
	"master/record":            "paths, URIs, options and credentials of mounts",
}

func TestMakeFuzzRunsEveryFuzzTest(t *testing.T) {
	out, err := run("sanity/fuzz.sh", "-list")
	if err != nil {
		t.Fatalf("sanity/fuzz.sh -list: %v\n%s", err, out)
	}
	var listed []string
	for line := range strings.Lines(string(out)) {
		listed = append(listed, strings.TrimPrefix(strings.TrimSpace(line), "./"))
	}
	var have []string
	for _, s := range sources(t) {
		for _, d := range s.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && isFuzz(fn) {
				have = append(have, path.Dir(s.name)+" "+fn.Name.Name)
			}
		}
	}
	slices.Sort(have)
	slices.Sort(listed)
	if !slices.Equal(have, listed) {
		t.Errorf("sanity/fuzz.sh runs %q, there are %q", listed, have)
	}
	for folder, what := range fuzzed {
		if !slices.ContainsFunc(have, func(f string) bool { return strings.HasPrefix(f, folder+" ") || strings.HasPrefix(f, folder+"/") }) {
			t.Errorf("no fuzz test for %s at or below %s", what, folder)
		}
	}
}

// isFuzz reports whether fn takes a *testing.F: what go test runs must also be named Fuzz….
func isFuzz(fn *ast.FuncDecl) bool {
	params := fn.Type.Params.List
	if len(params) != 1 || !strings.HasPrefix(fn.Name.Name, "Fuzz") {
		return false
	}
	star, ok := params[0].Type.(*ast.StarExpr)
	return ok && isSelector(star.X, "testing", "F")
}
