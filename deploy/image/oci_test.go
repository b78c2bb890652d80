package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// compile builds a program and returns its bytes.
func compile(t *testing.T, cgo string, flags ...string) []byte {
	t.Helper()
	dir := t.TempDir()
	src := filepath.Join(dir, "main.go")
	if err := os.WriteFile(src, []byte("package main\n\nfunc main() { println(\"hello\") }\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", append(append([]string{"build", "-trimpath", "-o", filepath.Join(dir, "out")}, flags...), src)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	b, err := os.ReadFile(filepath.Join(dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func tarFiles(t *testing.T, r io.Reader) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if !h.ModTime.Equal(epoch) || h.Uid != 0 || h.Uname != "" {
			t.Errorf("%s: time %v, owner %d %q", h.Name, h.ModTime, h.Uid, h.Uname)
		}
		if files[h.Name], err = io.ReadAll(tr); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSameInputIsSameImage(t *testing.T) {
	s := spec{Name: "localhost/larder:1", Version: "1", Arch: runtime.GOARCH, Binary: compile(t, "0")}
	var a, b bytes.Buffer
	da, err := write(&a, s)
	if err != nil {
		t.Fatal(err)
	}
	s.Binary = compile(t, "0") // in another folder
	db, err := write(&b, s)
	if err != nil || da != db || !bytes.Equal(a.Bytes(), b.Bytes()) {
		t.Errorf("second image: %s, %v; want %s", db, err, da)
	}
	s.Version = "2"
	if dc, err := write(io.Discard, s); err != nil || dc == da {
		t.Errorf("another version: %s, %v; want another digest", dc, err)
	}
}

func TestImageIsWhatItsDescriptorsSay(t *testing.T) {
	s := spec{Name: "localhost/larder:1", Version: "1", Arch: runtime.GOARCH, Binary: compile(t, "0")}
	var a bytes.Buffer
	digest, err := write(&a, s)
	if err != nil {
		t.Fatal(err)
	}
	files := tarFiles(t, &a)
	blob := func(d string) []byte {
		b := files["blobs/sha256/"+strings.TrimPrefix(d, "sha256:")]
		if got := fmt.Sprintf("sha256:%x", sha256.Sum256(b)); got != d {
			t.Errorf("blob %s has digest %s", d, got)
		}
		return b
	}
	var index struct{ Manifests []descriptor }
	if err := json.Unmarshal(files["index.json"], &index); err != nil || len(index.Manifests) != 1 {
		t.Fatalf("index: %v, %v", index, err)
	}
	if m := index.Manifests[0]; m.Digest != digest || m.Annotations["io.containerd.image.name"] != s.Name {
		t.Errorf("manifest %+v; want digest %s and name %s", m, digest, s.Name)
	}
	var manifest struct {
		Config descriptor
		Layers []descriptor
	}
	if err := json.Unmarshal(blob(digest), &manifest); err != nil {
		t.Fatal(err)
	}
	var config struct {
		Config struct {
			User       string
			Entrypoint []string
		}
		RootFS struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	if err := json.Unmarshal(blob(manifest.Config.Digest), &config); err != nil {
		t.Fatal(err)
	}
	if config.Config.User != "65532:65532" || len(config.Config.Entrypoint) != 1 || config.Config.Entrypoint[0] != "/larder" {
		t.Errorf("config %+v", config.Config)
	}
	root := map[string][]byte{}
	for i, l := range manifest.Layers {
		z, err := gzip.NewReader(bytes.NewReader(blob(l.Digest)))
		if err != nil {
			t.Fatal(err)
		}
		plain, err := io.ReadAll(z)
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprintf("sha256:%x", sha256.Sum256(plain)); got != config.RootFS.DiffIDs[i] {
			t.Errorf("layer %d has diff id %s, the config says %s", i, got, config.RootFS.DiffIDs[i])
		}
		for name, data := range tarFiles(t, bytes.NewReader(plain)) {
			root[name] = data
		}
	}
	if !bytes.Equal(root["larder"], s.Binary) {
		t.Error("/larder is not the binary")
	}
	if !x509.NewCertPool().AppendCertsFromPEM(root["etc/ssl/certs/ca-certificates.crt"]) {
		t.Error("no certificate authority in the image")
	}
}

func TestRefusesWhatWouldNotStart(t *testing.T) {
	good := compile(t, "0")
	other := map[string]string{"amd64": "arm64", "arm64": "amd64"}[runtime.GOARCH]
	for name, s := range map[string]spec{
		"a script":             {Name: "x", Arch: runtime.GOARCH, Binary: []byte("#!/bin/sh\n")},
		"another architecture": {Name: "x", Arch: other, Binary: good},
		"no name":              {Arch: runtime.GOARCH, Binary: good},
		"needs a loader":       {Name: "x", Arch: runtime.GOARCH, Binary: compile(t, "0", "-buildmode=pie")},
	} {
		if d, err := write(io.Discard, s); err == nil {
			t.Errorf("%s: image %s; want an error", name, d)
		}
	}
}
