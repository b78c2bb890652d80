package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/larderfs/larder/sanity/dataset"
	"github.com/larderfs/larder/sanity/leak"
	"github.com/larderfs/larder/sanity/s3test"
)

func TestMain(m *testing.M) { os.Exit(leak.Run(m)) }

// perform is what a child process does.
func perform(t *testing.T, in task) (report, error) {
	t.Helper()
	text, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := read(t.Context(), bytes.NewReader(text), &out); err != nil {
		return report{}, err
	}
	var r report
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatal(err)
	}
	return r, nil
}

func sales(t *testing.T) (dir string, files dataset.Files) {
	t.Helper()
	dir = t.TempDir()
	files, err := dataset.WriteSales(t.Context(), dir, 8, 3<<20)
	if err != nil {
		t.Fatal(err)
	}
	empty := dataset.File{Path: "empty", SHA256: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
	if err := os.WriteFile(filepath.Join(dir, empty.Path), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	return dir, append(files, empty)
}

func TestFolderAndStoreReadTheSameFiles(t *testing.T) {
	dir, files := sales(t)
	server := s3test.Start(t)
	if err := dataset.Upload(t.Context(), server.DirectClient(), server.Bucket, "a/b", dir, files); err != nil {
		t.Fatal(err)
	}
	for name, in := range map[string]task{
		"folder": {Folder: dir, Touch: true, Drop: true},
		"store": {S3: &store{
			Endpoint: server.Endpoint, Region: server.Region, Bucket: server.Bucket, Prefix: "a/b",
			AccessKey: server.AccessKey, SecretKey: server.SecretKey,
		}},
	} {
		in.Files, in.Verify = files, true
		r, err := perform(t, in)
		if err != nil || r.Bad != "" || r.Files != 9 || r.Bytes != files.Bytes() || r.Seconds <= 0 {
			t.Errorf("%s: %+v, %v; want %d bytes in 9 right files", name, r, err, files.Bytes())
		}
		in.Files, in.Verify, in.Random = files[:8], false, 50*time.Millisecond
		if r, err = perform(t, in); err != nil || r.Ops == 0 {
			t.Errorf("%s at random places: %+v, %v", name, r, err)
		}
	}
}

func TestWrongAndMissingBytesAreFound(t *testing.T) {
	dir, files := sales(t)
	f, err := os.OpenFile(filepath.Join(dir, files[3].Path), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("!"), files[3].Size-1); err != nil {
		t.Fatal(err)
	}
	if r, err := perform(t, task{Folder: dir, Files: files, Verify: true}); err != nil || r.Bad != files[3].Path {
		t.Errorf("found %q, %v; want %s", r.Bad, err, files[3].Path)
	}
	if err := f.Truncate(files[3].Size - 1); err != nil {
		t.Fatal(err)
	}
	_, err = perform(t, task{Folder: dir, Files: files})
	if err == nil || !strings.Contains(err.Error(), files[3].Path) {
		t.Errorf("a file that is too short: %v; want an error that names it", err)
	}
}
