package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestCheckNamesWhatIsStaleAndWritesNothing(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"go.mod", "go.sum"} { // the pinned plugins
		b, err := os.ReadFile(filepath.Join("../..", name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	if err := os.Mkdir("xpb", 0o755); err != nil {
		t.Fatal(err)
	}
	proto := `syntax = "proto3"; package x; option go_package = "example.com/xpb"; import "google/protobuf/timestamp.proto";
		service S { rpc Ask(M) returns (M); } message M { google.protobuf.Timestamp at = 1; }`
	if err := os.WriteFile("xpb/x.proto", []byte(proto), 0o644); err != nil {
		t.Fatal(err)
	}
	both := []string{"xpb/x.pb.go", "xpb/x_grpc.pb.go"}
	if stale, err := generate(t.Context(), true); err != nil || !slices.Equal(stale, both) {
		t.Fatalf("absent: %v, %v", stale, err)
	}
	if stale, err := generate(t.Context(), false); err != nil || len(stale) > 0 {
		t.Fatalf("generate: %v, %v", stale, err)
	}
	if stale, err := generate(t.Context(), true); err != nil || len(stale) > 0 {
		t.Errorf("just made: %v, %v", stale, err)
	}
	if err := os.WriteFile(both[1], []byte("package xpb\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if stale, err := generate(t.Context(), true); err != nil || !slices.Equal(stale, both[1:]) {
		t.Errorf("edited: %v, %v", stale, err)
	}
	if b, err := os.ReadFile(both[1]); err != nil || string(b) != "package xpb\n" {
		t.Errorf("check wrote %q, %v", b, err)
	}
	if err := os.WriteFile("xpb/x.proto", []byte("nonsense"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := generate(t.Context(), true); err == nil {
		t.Error("nonsense compiles")
	}
}
