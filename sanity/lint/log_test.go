package lint

import (
	"go/ast"
	"go/token"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

var logKey = regexp.MustCompile(`^[a-z][A-Za-z0-9]*$`)

// Whoever searches logs does so by message and key: a message is a text that does not change, keys are in one form.
func TestLogLinesCanBeSearched(t *testing.T) {
	found := 0
	for _, s := range sources(t) {
		if s.test() || s.generated() {
			continue
		}
		ast.Inspect(s.File, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			sel, ok := call.Fun.(*ast.SelectorExpr)
			if !ok || !isLogger(sel.X) || !slices.Contains([]string{"Debug", "Info", "Warn", "Error", "With"}, sel.Sel.Name) || call.Ellipsis.IsValid() {
				return true
			}
			found++
			args := call.Args
			if sel.Sel.Name != "With" {
				if _, ok := text(args[0]); !ok && !prefixed(args[0]) {
					t.Errorf("%s: the message is not a literal", fset.Position(call.Pos()))
				}
				args = args[1:]
			}
			for i := 0; i < len(args); i += 2 {
				if key, ok := text(args[i]); !ok || !logKey.MatchString(key) || i+1 == len(args) {
					t.Errorf("%s: argument %d is no key in camel case with a value behind it", fset.Position(call.Pos()), i+1)
				}
			}
			return true
		})
	}
	if found < 50 {
		t.Errorf("found only %d lines", found)
	}
}

// isLogger reports whether an expression is called log or Log.
func isLogger(e ast.Expr) bool {
	switch e := e.(type) {
	case *ast.Ident:
		return strings.ToLower(e.Name) == "log"
	case *ast.SelectorExpr:
		return strings.ToLower(e.Sel.Name) == "log"
	}
	return false
}

func text(e ast.Expr) (string, bool) {
	lit, ok := e.(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return "", false
	}
	s, err := strconv.Unquote(lit.Value)
	return s, err == nil
}

// prefixed reports whether an expression is a literal and something behind it.
func prefixed(e ast.Expr) bool {
	b, ok := e.(*ast.BinaryExpr)
	if !ok {
		return false
	}
	_, ok = text(b.X)
	return ok
}
