package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/larderfs/larder/cacheworker"
	"github.com/larderfs/larder/master/client"
)

// The namespace can be looked into where there is no volume of it.
func TestTheNamespaceIsShownWithoutAVolume(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{"a/2026/f": "of a", "a/top": "top", "a/old/hidden": "x", "b/g": "of b, longer"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	target, dir := startMaster(t), t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "run"), 0o755); err != nil {
		t.Fatal(err)
	}
	w, err := cacheworker.New(cacheworker.Config{Node: "n", Tiers: []cacheworker.Tier{{Dir: t.TempDir(), CapacityBytes: 1 << 30}}, Master: target, FileRoot: root,
		BrokerSocket: filepath.Join(dir, "run/broker.sock"), ControlSocket: filepath.Join(dir, "run/worker.sock"), Version: "test", Log: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer running(t, w.Run)()
	m, err := client.New(client.Config{Target: target})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	for path, uri := range map[string]string{"/sales": "file://" + root + "/a", "/sales/old": "file://" + root + "/b"} {
		if err := m.PutMount(t.Context(), client.Mount{Path: path, URI: uri, AllowClass: []string{"-"}}); err != nil { // an administrator needs no list
			t.Fatal(err)
		}
	}
	run := func(args ...string) (string, error) {
		var out strings.Builder
		err := larder(t.Context(), &out, append(append([]string{"fs"}, args...), "--dir", dir)...)
		return out.String(), err
	}
	var all []pathInfo
	eventually(t, "the worker knows both mounts", func() bool {
		out, err := run("ls", "/sales", "-o", "json")
		return err == nil && json.Unmarshal([]byte(out), &all) == nil && len(all) == 3
	})
	if all[0].Path != "/sales/2026" || !all[1].Folder || all[1].Path != "/sales/old" || all[2].Size != 3 || all[2].Modified == nil {
		t.Errorf("%+v", all)
	}
	if out, err := run("cat", "/sales/old/g", "/sales/2026/f"); out != "of b, longerof a" || err != nil {
		t.Errorf("%q, %v", out, err)
	}
	var u usage
	eventually(t, "what was read is written to the cache", func() bool {
		out, err := run("du", "/", "-o", "json")
		return err == nil && json.Unmarshal([]byte(out), &u) == nil && u.CachedBytes == 16
	})
	var one pathInfo
	if out, err := run("stat", "/sales/old/g", "-o", "json"); err != nil || json.Unmarshal([]byte(out), &one) != nil || one.Size != 12 || one.CachedBytes != 12 || one.Version == "" {
		t.Errorf("%+v, %v", one, err)
	}
	if u.Bytes != 4+3+12 || u.Files != 3 || u.Folders != 3 || len(u.Entries) != 1 {
		t.Errorf("%+v", u)
	}
	out, err := run("tree", "/")
	if want := "/\n└── sales/\n    ├── 2026/\n    │   └── f\n    ├── old/\n    │   └── g\n    └── top\n"; out != want || err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	for path, want := range map[string]string{"/sales/nope": "not found", "/hr": "not found", "sales": "absolute", "/a/../b": "no name"} {
		if out, err := run("ls", path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %q, %v; want %q", path, out, err, want)
		}
	}
	if _, err := run("cat", "/sales"); err == nil || !strings.Contains(err.Error(), "is a folder") {
		t.Errorf("%v", err)
	}
	var out2 strings.Builder
	if err := larder(t.Context(), &out2, "fs", "ls", "--run-dir", t.TempDir()); err == nil || !strings.Contains(err.Error(), "nobody answers") {
		t.Errorf("%v", err)
	}
}
