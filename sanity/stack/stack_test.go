package stack

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/larderfs/larder/sanity/leak"
)

func TestMain(m *testing.M) { os.Exit(leak.Run(withLarder{m})) }

// larder is built once for all tests.
var larder string

type withLarder struct{ m *testing.M }

func (w withLarder) Run() int {
	dir, err := os.MkdirTemp("", "bin")
	if err == nil {
		defer os.RemoveAll(dir)
		larder = filepath.Join(dir, "larder")
		err = Build(context.Background(), larder)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return w.m.Run()
}

// begin starts a stack with a folder to publish, which holds one file.
func begin(t *testing.T) (s *Stack, in PublishInput) {
	t.Helper()
	data := t.TempDir()
	if err := os.WriteFile(filepath.Join(data, "f"), []byte("hello"), 0o644); err != nil {
		t.Fatal(err)
	}
	s, err := Start(t.Context(), Config{Binary: larder, Args: []string{"--file-root", data}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, PublishInput{Name: "v", Parameters: map[string]string{"source": "file://" + data}}
}

// readFile reads the volume's file as a pod would: in a process of its own.
func readFile(t *testing.T, s *Stack, target string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var diag bytes.Buffer
	cmd := s.Command(ctx, "cat", filepath.Join(target, "data", "f"))
	cmd.Stderr = &diag
	out, err := cmd.Output()
	if err != nil {
		t.Errorf("read: %v: %s", err, &diag)
	}
	return string(out)
}

func checkGone(t *testing.T, s *Stack) {
	t.Helper()
	if left := leak.Find(s.dir); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	if _, err := os.Lstat(s.dir); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", s.dir, err)
	}
}

func TestVolumesComeAndGoAsInKubernetes(t *testing.T) {
	s, in := begin(t)
	v, err := s.Publish(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	second, err := s.PublishPod(t.Context(), v, "another")
	if err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{v.Targets[0], second} {
		if got := readFile(t, s, target); got != "hello" {
			t.Errorf("read %q at %s", got, target)
		}
	}
	if st, err := s.Status(t.Context()); err != nil || st.CachedBytes != 5 {
		t.Errorf("status %+v, %v; want 5 bytes cached", st, err)
	}
	if err := s.Unpublish(t.Context(), v); err != nil {
		t.Error(err)
	}
	if left := leak.Mounts(filepath.Join(s.dir, "kubelet")); len(left) > 0 {
		t.Errorf("mounted after Unpublish: %v", left)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	checkGone(t, s)
}

func TestPublishedVolumesAreUnpublishedAfterARestart(t *testing.T) {
	s, in := begin(t)
	v, err := s.Publish(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := s.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Unpublish(t.Context(), v); err != nil {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	checkGone(t, s)
}

func TestCloseCleansUpAfterAKilledLarder(t *testing.T) {
	s, in := begin(t)
	v, err := s.Publish(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	if got := readFile(t, s, v.Targets[0]); got != "hello" {
		t.Errorf("read %q", got)
	}
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	s.Close() // has nothing good to say of what it found
	checkGone(t, s)
}

func TestStartSaysWhatLarderSaid(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "s")
	_, err := Start(t.Context(), Config{Dir: dir, Binary: larder, Args: []string{"--no-such-flag"}})
	if err == nil || !strings.Contains(err.Error(), "no-such-flag") {
		t.Errorf("Start = %v, want larder's own words", err)
	}
	checkGone(t, &Stack{dir: dir})
}
