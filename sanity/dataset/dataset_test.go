package dataset

import (
	"context"
	"crypto/sha256"
	"encoding/csv"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/larderfs/larder/sanity/leak"
)

func TestMain(m *testing.M) { os.Exit(leak.Run(m)) }

func TestSalesAreTheSameEverywhere(t *testing.T) {
	dir := t.TempDir()
	files, err := WriteSales(t.Context(), dir, 8, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 8 || files.Bytes() < 1<<20 || files.Bytes() > 1<<20+8*256 {
		t.Errorf("%d files of %d bytes, want 8 of 1 MiB", len(files), files.Bytes())
	}
	const want = "3a2fec4eb535176fc0979e190fbfb21c2fe3b2233541fd890be5e4949bd95d87"
	if files[0].SHA256 != want {
		t.Errorf("first quarter: SHA-256 %s, want %s", files[0].SHA256, want)
	}
	for _, f := range files {
		checkFile(t, dir, f)
	}
}

func TestSalesAreCSV(t *testing.T) {
	dir := t.TempDir()
	files, err := WriteSales(t.Context(), dir, 8, 4<<20)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		in, err := os.Open(filepath.Join(dir, f.Path))
		if err != nil {
			t.Fatal(err)
		}
		rows, err := csv.NewReader(in).ReadAll() // checks that all rows have as many fields as the first
		in.Close()
		if err != nil {
			t.Fatalf("%s: %v", f.Path, err)
		}
		if got := strings.Join(rows[0], ",") + "\n"; got != header || len(rows) < 1000 {
			t.Errorf("%s: %d rows below %q", f.Path, len(rows), got)
		}
		if !slices.IsSortedFunc(rows[1:], func(a, b []string) int { return strings.Compare(a[1], b[1]) }) {
			t.Errorf("%s is not in order of time", f.Path)
		}
	}
}

func TestTreeIsCopiedThroughLinksAtItsTop(t *testing.T) {
	root, elsewhere, dir := t.TempDir(), t.TempDir(), t.TempDir()
	for name, text := range map[string]string{
		filepath.Join(root, "VERSION"):           "go1\n",
		filepath.Join(root, "bin", "go"):         "binary",
		filepath.Join(elsewhere, "fmt", "x.go"):  "package fmt\n",
		filepath.Join(elsewhere, "fmt", "empty"): "",
	} {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	os.Symlink(elsewhere, filepath.Join(root, "src"))
	os.Symlink("x.go", filepath.Join(elsewhere, "fmt", "link"))

	files, err := CopyTree(t.Context(), dir, "go", root, func(rel string) bool { return strings.HasPrefix(rel, "bin/") })
	if err != nil {
		t.Fatal(err)
	}
	if n, err := TreeBytes(root); err != nil || n != files.Bytes()+int64(len("binary")) {
		t.Errorf("TreeBytes = %d, %v; copied %d", n, err, files.Bytes())
	}
	var paths []string
	for _, f := range files {
		paths = append(paths, f.Path)
		checkFile(t, dir, f)
	}
	slices.Sort(paths)
	if want := []string{"go/VERSION", "go/src/fmt/empty", "go/src/fmt/x.go"}; !slices.Equal(paths, want) {
		t.Errorf("copied %q, want %q", paths, want)
	}
}

func TestWritingStopsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := WriteSales(ctx, t.TempDir(), 8, 1<<30); !errors.Is(err, context.Canceled) {
		t.Errorf("WriteSales = %v, want it canceled", err)
	}
}

func checkFile(t *testing.T, dir string, f File) {
	t.Helper()
	in, err := os.Open(filepath.Join(dir, f.Path))
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	sum := sha256.New()
	n, err := io.Copy(sum, in)
	if err != nil || n != f.Size || hex.EncodeToString(sum.Sum(nil)) != f.SHA256 {
		t.Errorf("%s: read %d bytes with another sum (%v), want %d", f.Path, n, err, f.Size)
	}
}

func BenchmarkSales(b *testing.B) {
	b.SetBytes(64 << 20)
	for b.Loop() {
		if err := writeQuarter(b.Context(), io.Discard, 0, 64<<20); err != nil {
			b.Fatal(err)
		}
	}
}
