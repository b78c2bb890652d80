package source_test

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
	"github.com/larderfs/larder/cacheworker/source/file"
	"github.com/larderfs/larder/cacheworker/source/sourcetest"
)

func open(t *testing.T, root string) source.Source {
	t.Helper()
	s, err := file.New(file.Config{Root: root, NodeKey: []byte("n")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func put(t *testing.T, root, key string, data []byte) {
	t.Helper()
	path := filepath.Join(root, key)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	temp := filepath.Join(t.TempDir(), "new")
	if err := errors.Join(os.WriteFile(temp, data, 0o644), os.Rename(temp, path)); err != nil {
		t.Fatal(err)
	}
}

func TestFaultyWithoutRulesIsTheSource(t *testing.T) {
	sourcetest.Test(t, func(t *testing.T) sourcetest.Store {
		root := t.TempDir()
		return sourcetest.Store{
			Open: func(t *testing.T) source.Source { return source.NewFaulty(open(t, root)) },
			Put:  func(t *testing.T, key string, data []byte) { put(t, root, key, data) },
			Delete: func(t *testing.T, key string) {
				if err := os.Remove(filepath.Join(root, key)); err != nil {
					t.Fatal(err)
				}
			},
		}
	})
}

func TestFaultsHappenWhereTheScriptSays(t *testing.T) {
	root := t.TempDir()
	put(t, root, "a", []byte("0123456789"))
	f := source.NewFaulty(open(t, root))
	o, err := f.Head(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	read := func() (string, error) {
		r, err := f.Get(t.Context(), o, 0, 10)
		if err != nil {
			return "", err
		}
		defer r.Close()
		got, err := io.ReadAll(r)
		return string(got), err
	}
	f.On(source.Nth(source.Get, 2), source.Fault{Err: object.ErrUnavailable})
	f.On(source.Nth(source.Get, 3), source.Fault{Body: io.ErrUnexpectedEOF, After: 4})
	f.On(source.Nth(source.Head, 2), source.Fault{Version: "another"})
	f.On(source.Every(source.List), source.Fault{Version: "another"})
	for i, want := range []struct {
		text string
		err  error
	}{{"0123456789", nil}, {"", object.ErrUnavailable}, {"0123", io.ErrUnexpectedEOF}, {"0123456789", nil}} {
		if got, err := read(); got != want.text || !errors.Is(err, want.err) {
			t.Errorf("get %d: %q, %v", i+1, got, err)
		}
	}
	if h, err := f.Head(t.Context(), "a"); err != nil || h.Version != "another" || h.Size != 10 {
		t.Errorf("head: %+v, %v", h, err)
	}
	if p, err := f.List(t.Context(), source.ListInput{}); err != nil || len(p.Objects) != 1 || p.Objects[0].Version != "another" {
		t.Errorf("list: %+v, %v", p, err)
	}
	f.Clear()
	f.On(source.Every(source.Get), source.Fault{Version: "another"})
	if _, err := read(); !errors.Is(err, object.ErrChanged) {
		t.Errorf("get of the version before: %v", err)
	}
}

func TestSlowCallWaitsUntilLetGoOrGivenUp(t *testing.T) {
	root := t.TempDir()
	put(t, root, "a", []byte("x"))
	f := source.NewFaulty(open(t, root))
	gate := make(chan struct{})
	f.On(source.Every(source.Head), source.Fault{Wait: gate})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.Head(ctx, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
	done := make(chan error)
	go func() {
		_, err := f.Head(t.Context(), "a")
		done <- err
	}()
	select {
	case err := <-done:
		t.Errorf("answered before it was let go: %v", err)
	default:
	}
	close(gate)
	if err := <-done; err != nil {
		t.Error(err)
	}
}
