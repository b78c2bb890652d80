package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"debug/elf"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"time"

	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// spec is what an image is made of.
type spec struct {
	Name    string // reference, as in a pod's image
	Version string
	Arch    string
	Binary  []byte
}

// user is whom the image's process is where a pod says nothing: the worker, the master and the
// controller need no more. The node plugin's pod says 0.
const user = 65532

// file is an entry of a layer. Folders have a mode with ModeDir's meaning by their trailing slash.
type file struct {
	name string
	mode int64
	data []byte
}

// base changes only with the list of certificate authorities.
func base() []file {
	return []file{
		{"etc/", 0o755, nil},
		{"etc/group", 0o644, []byte("root:x:0:\nlarder:x:65532:\nnobody:x:65534:\n")},
		{"etc/nsswitch.conf", 0o644, []byte("hosts: files dns\n")},
		{"etc/passwd", 0o644, []byte("root:x:0:0:root:/:/nonexistent\n" +
			"larder:x:65532:65532:larder:/:/nonexistent\n" +
			"nobody:x:65534:65534:nobody:/:/nonexistent\n")},
		{"etc/ssl/", 0o755, nil},
		{"etc/ssl/certs/", 0o755, nil},
		{"etc/ssl/certs/ca-certificates.crt", 0o644, authorities()},
		{"tmp/", 0o1777, nil},
	}
}

// authorities are Mozilla's, without those that it distrusts for some of their certificates: a PEM
// file cannot say which.
func authorities() []byte {
	var b bytes.Buffer
	for root := range bundle.Roots() {
		if root.Constraint == nil {
			b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate}))
		}
	}
	return b.Bytes()
}

// descriptor names a blob.
type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Platform    *platform         `json:"platform,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
}

const (
	mediaIndex    = "application/vnd.oci.image.index.v1+json"
	mediaManifest = "application/vnd.oci.image.manifest.v1+json"
	mediaConfig   = "application/vnd.oci.image.config.v1+json"
	mediaLayer    = "application/vnd.oci.image.layer.v1.tar+gzip"
)

// blobs are the contents of an archive by their digests.
type blobs map[string][]byte

func (b blobs) add(mediaType string, data []byte) descriptor {
	d := fmt.Sprintf("sha256:%x", sha256.Sum256(data))
	b[d] = data
	return descriptor{MediaType: mediaType, Digest: d, Size: len(data)}
}

func (b blobs) addJSON(mediaType string, v any) (descriptor, error) {
	data, err := json.Marshal(v)
	return b.add(mediaType, data), err
}

// write writes the archive and returns the digest of the image's manifest.
func write(w io.Writer, s spec) (digest string, err error) {
	if err := s.check(); err != nil {
		return "", err
	}
	all := blobs{}
	var layers []descriptor
	var diffs []string
	for _, files := range [][]file{base(), {{"larder", 0o755, s.Binary}}} { // an upgrade changes the second only
		plain, packed, err := layer(files)
		if err != nil {
			return "", err
		}
		layers = append(layers, all.add(mediaLayer, packed))
		diffs = append(diffs, fmt.Sprintf("sha256:%x", sha256.Sum256(plain)))
	}
	config, err := all.addJSON(mediaConfig, s.config(diffs))
	if err != nil {
		return "", err
	}
	manifest, err := all.addJSON(mediaManifest, map[string]any{
		"schemaVersion": 2, "mediaType": mediaManifest, "config": config, "layers": layers, "annotations": s.labels(),
	})
	if err != nil {
		return "", err
	}
	manifest.Platform = &platform{s.Arch, "linux"}
	manifest.Annotations = map[string]string{"io.containerd.image.name": s.Name, "org.opencontainers.image.ref.name": s.Name}
	index, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": mediaIndex, "manifests": []descriptor{manifest}})
	if err != nil {
		return "", err
	}
	return manifest.Digest, archive(w, all, index)
}

// check refuses what would not start in an image without a loader.
func (s spec) check() error {
	f, err := elf.NewFile(bytes.NewReader(s.Binary))
	if err != nil {
		return fmt.Errorf("binary: %w", err)
	}
	machines := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}
	if m, ok := machines[s.Arch]; !ok || f.Machine != m {
		return fmt.Errorf("binary is for %v, the image for %q", f.Machine, s.Arch)
	}
	if slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
		return errors.New("binary is not static: build it with CGO_ENABLED=0")
	}
	if s.Name == "" {
		return errors.New("the image needs a name")
	}
	return nil
}

func (s spec) labels() map[string]string {
	return map[string]string{
		"org.opencontainers.image.title":       "larder",
		"org.opencontainers.image.description": "CSI driver, node cache and cache master for object-store data",
		"org.opencontainers.image.version":     s.Version,
		"org.opencontainers.image.licenses":    "Apache-2.0",
	}
}

var epoch = time.Unix(0, 0).UTC()

func (s spec) config(diffs []string) map[string]any {
	return map[string]any{
		"architecture": s.Arch,
		"os":           "linux",
		"created":      epoch.Format(time.RFC3339),
		"config": map[string]any{
			"User":       fmt.Sprintf("%d:%d", user, user),
			"Entrypoint": []string{"/larder"},
			"Env":        []string{"PATH=/"},
			"WorkingDir": "/",
			"Labels":     s.labels(),
		},
		"rootfs":  map[string]any{"type": "layers", "diff_ids": diffs},
		"history": []map[string]string{{"created_by": "deploy/image: base"}, {"created_by": "deploy/image: larder " + s.Version}},
	}
}

// layer is the files as a tar, plain and packed.
func layer(files []file) (plain, packed []byte, err error) {
	var t, z bytes.Buffer
	tw := tar.NewWriter(&t)
	for _, f := range files {
		if err := put(tw, f); err != nil {
			return nil, nil, err
		}
	}
	zw := gzip.NewWriter(&z) // its header has no time and no name
	if err := errors.Join(tw.Close(), flush(zw, t.Bytes())); err != nil {
		return nil, nil, err
	}
	return t.Bytes(), z.Bytes(), nil
}

func flush(zw *gzip.Writer, data []byte) error {
	_, err := zw.Write(data)
	return errors.Join(err, zw.Close())
}

func put(tw *tar.Writer, f file) error {
	h := &tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.data)), Typeflag: tar.TypeReg, ModTime: epoch, Format: tar.FormatUSTAR}
	if f.name[len(f.name)-1] == '/' {
		h.Typeflag = tar.TypeDir
	}
	if err := tw.WriteHeader(h); err != nil {
		return fmt.Errorf("%s: %w", f.name, err)
	}
	_, err := tw.Write(f.data)
	return err
}

// archive writes an OCI image layout as one tar.
func archive(w io.Writer, all blobs, index []byte) error {
	tw := tar.NewWriter(w)
	files := []file{{"oci-layout", 0o644, []byte(`{"imageLayoutVersion":"1.0.0"}`)}, {"index.json", 0o644, index},
		{"blobs/", 0o755, nil}, {"blobs/sha256/", 0o755, nil}}
	var names []string
	for d := range all {
		names = append(names, d)
	}
	slices.Sort(names)
	for _, d := range names {
		files = append(files, file{path.Join("blobs/sha256", d[len("sha256:"):]), 0o644, all[d]})
	}
	for _, f := range files {
		if err := put(tw, f); err != nil {
			return err
		}
	}
	return tw.Close()
}
