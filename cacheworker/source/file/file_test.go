package file

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/larderfs/larder/cacheworker/source"
	"github.com/larderfs/larder/cacheworker/source/sourcetest"
)

func open(t *testing.T, root string) *Source {
	t.Helper()
	s, err := New(Config{Root: root, NodeKey: []byte("node")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// put replaces a file at once, as a rename does.
func put(t *testing.T, root, key string, data []byte) {
	t.Helper()
	path := filepath.Join(root, key)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	temp := filepath.Join(t.TempDir(), "new")
	if err := os.WriteFile(temp, data, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(temp, path); err != nil {
		t.Fatal(err)
	}
}

func TestConformance(t *testing.T) {
	sourcetest.Test(t, func(t *testing.T) sourcetest.Store {
		root := t.TempDir()
		return sourcetest.Store{
			Open: func(t *testing.T) source.Source { return open(t, root) },
			Put:  func(t *testing.T, key string, data []byte) { put(t, root, key, data) },
			Delete: func(t *testing.T, key string) {
				if err := os.Remove(filepath.Join(root, key)); err != nil {
					t.Fatal(err)
				}
			},
		}
	})
}
