package cachestore

import (
	"bytes"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// TestAViewCannotBeOpenedAgainForWriting is invariant 6. We are root, and the file is ours.
func TestAViewCannotBeOpenedAgainForWriting(t *testing.T) {
	t.Parallel()
	cfg, _ := viewConfig(t, 16*chunk)
	s := open(t, cfg)
	o := obj("a", 2*chunk)
	f := lease(t, s, o)
	put(t, f, 0)
	if _, err := f.View(); !errors.Is(err, object.ErrIncomplete) {
		t.Errorf("view of an incomplete file: %v", err)
	}
	put(t, f, 1)
	v, err := f.View()
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	got, err := io.ReadAll(v)
	if err != nil || !bytes.Equal(got, slices.Concat(content(o, 0), content(o, 1))) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	again := dir{f: v}.path()
	if w, err := os.OpenFile(again, os.O_RDWR, 0); !errors.Is(err, syscall.EROFS) {
		w.Close()
		t.Errorf("opened again for writing: %v", err)
	}
	if err := os.Truncate(again, 0); !errors.Is(err, syscall.EROFS) {
		t.Errorf("truncated: %v", err)
	}
	if err := v.Chmod(0o777); !errors.Is(err, syscall.EROFS) {
		t.Errorf("chmod: %v", err)
	}
	// The same descriptor without the read-only mount, or the test above proves nothing.
	plain, err := os.Open(cfg.Dir + "/" + objectPath(o.ID(), f.e.nonce))
	if err != nil {
		t.Fatal(err)
	}
	w, err := os.OpenFile(dir{f: plain}.path(), os.O_RDWR, 0)
	if err != nil {
		t.Errorf("a plain read-only descriptor is safe already: %v", err)
	}
	w.Close()
	plain.Close()

	// A view is a description of its own.
	u, err := f.View()
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	if at, _ := u.Seek(0, io.SeekCurrent); at != 0 {
		t.Errorf("a fresh view starts at %d", at)
	}
	s.Evict(o.ID())
	if _, err := f.View(); !errors.Is(err, object.ErrIncomplete) {
		t.Errorf("view of an evicted file: %v", err)
	}
	f.Close()
	if s.Stats().UnlinkedBytes != 2*chunk {
		t.Errorf("views are not counted: %+v", s.Stats())
	}
	wantSame := make([]byte, chunk)
	if _, err := v.ReadAt(wantSame, chunk); err != nil || !bytes.Equal(wantSame, content(o, 1)) {
		t.Errorf("an evicted view reads something else: %v", err)
	}
	v.Close()
	u.Close()
	eventually(t, "unlinked bytes are released", func() bool { return s.Stats().UnlinkedBytes == 0 })
}

func TestAViewThroughTheWrongMountIsRefused(t *testing.T) {
	o := obj("a", chunk)
	t.Run("writable", func(t *testing.T) {
		cfg := testConfig(t, t.TempDir(), 16*chunk)
		cfg.ViewDir = cfg.Dir
		s := open(t, cfg)
		f := lease(t, s, o)
		putAll(t, f)
		if _, err := f.View(); err == nil || !strings.Contains(err.Error(), "not read-only") {
			t.Errorf("view: %v", err)
		}
	})
	t.Run("another directory", func(t *testing.T) {
		other, view := viewConfig(t, 16*chunk)
		cfg := testConfig(t, t.TempDir(), 16*chunk)
		cfg.ViewDir = view
		s := open(t, cfg)
		f := lease(t, s, o)
		putAll(t, f)
		name := objectPath(o.ID(), f.e.nonce)
		if err := os.MkdirAll(other.Dir+"/objects/"+o.ID().String()[:2], 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(other.Dir+"/"+name, content(o, 0), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := f.View(); err == nil || !strings.Contains(err.Error(), "not the cache directory") {
			t.Errorf("view: %v", err)
		}
	})
	t.Run("none", func(t *testing.T) {
		s := open(t, testConfig(t, t.TempDir(), 16*chunk))
		f := lease(t, s, o)
		putAll(t, f)
		if _, err := f.View(); err == nil || errors.Is(err, object.ErrIncomplete) {
			t.Errorf("view: %v", err)
		}
	})
	t.Run("a symbolic link", func(t *testing.T) {
		cfg, _ := viewConfig(t, 16*chunk)
		s := open(t, cfg)
		f := lease(t, s, o)
		putAll(t, f)
		name := cfg.Dir + "/" + objectPath(o.ID(), f.e.nonce)
		if err := errors.Join(os.Rename(name, name+"-"), os.Symlink(name+"-", name)); err != nil {
			t.Fatal(err)
		}
		if _, err := f.View(); !errors.Is(err, unix.ELOOP) {
			t.Errorf("view: %v", err)
		}
		if err := os.Rename(name+"-", name); err != nil {
			t.Fatal(err)
		}
	})
}
