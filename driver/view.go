package driver

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/driver/mounttable"
)

// view is what the broker and the kernel say of mounts at one moment. It is all that the
// node service knows, and it is forgotten at the end of the call.
type view struct {
	held  []brokerwire.Mount
	table mounttable.Table
}

func (n *node) look(ctx context.Context) (view, error) { return look(ctx, n.broker) }

func look(ctx context.Context, broker Broker) (v view, err error) {
	if v.held, err = broker.Mounts(ctx); err != nil {
		return v, fmt.Errorf("ask the broker for its mounts: %w", err)
	}
	v.table, err = mounttable.Read()
	return v, err
}

func (v view) volume(id string) (brokerwire.Mount, bool) {
	return v.find(func(m brokerwire.Mount) bool { return m.VolumeID == id })
}

func (v view) heldAt(path string) (brokerwire.Mount, bool) {
	return v.find(func(m brokerwire.Mount) bool { return m.Path == path })
}

// owner is the held mount whose file system p shows.
func (v view) owner(p mounttable.Entry) (brokerwire.Mount, bool) {
	return v.find(func(m brokerwire.Mount) bool { return v.is(p, m) })
}

func (v view) find(match func(brokerwire.Mount) bool) (brokerwire.Mount, bool) {
	for _, m := range v.held {
		if match(m) {
			return m, true
		}
	}
	return brokerwire.Mount{}, false
}

// live reports whether the kernel has the mount too.
func (v view) live(m brokerwire.Mount) bool {
	_, ok := v.table.At(m.Path)
	return ok
}

// is reports whether p shows the file system of m: every bind has its device number.
func (v view) is(p mounttable.Entry, m brokerwire.Mount) bool {
	main, ok := v.table.At(m.Path)
	return ok && main.Dev == p.Dev
}

// dead reports a FUSE mount at path that the broker does not hold.
func (v view) dead(path string) bool {
	p, ok := v.table.At(path)
	_, owned := v.owner(p)
	return ok && p.FUSE() && !owned
}

// belongsToOther reports whether another volume is mounted or published at path.
func (v view) belongsToOther(id, path string) bool {
	if m, ok := v.heldAt(path); ok && m.VolumeID != id {
		return true
	}
	p, ok := v.table.At(path)
	m, owned := v.owner(p)
	return ok && owned && m.VolumeID != id
}

// targets are the paths, other than target, where m is published. Mounts of a part of it
// (subPath) are not, and neither are the same mounts seen through another root.
func (v view) targets(m brokerwire.Mount, target string) []string {
	var paths []string
	for _, p := range v.table {
		whole := p.Root == "/" || p.Root == "/data"
		seen := strings.HasSuffix(p.Path, m.Path) || target != "" && strings.HasSuffix(p.Path, target)
		if whole && !seen && v.is(p, m) {
			paths = append(paths, p.Path)
		}
	}
	return paths
}

// inlinePath is where the FUSE file system of an inline volume is mounted. Its id may be
// any text, so it is hashed.
func (n *node) inlinePath(id string) string {
	sum := sha256.Sum256([]byte(id))
	return filepath.Join(n.inline, hex.EncodeToString(sum[:16]))
}
