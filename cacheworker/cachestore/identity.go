package cachestore

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// Identity is what outlives the cache's contents: who the worker is, and the secret under which principals are made. All tiers
// of a worker keep the same.
type Identity struct {
	UUID    uuid.UUID
	NodeKey []byte // 32 bytes
}

// NewIdentity makes one.
func NewIdentity() Identity {
	key := make([]byte, 32)
	rand.Read(key)
	return Identity{uuid.New(), key}
}

// ReadIdentity reads what a tier keeps; the error is fs.ErrNotExist if it keeps none.
func ReadIdentity(tier string) (Identity, error) {
	d, err := openDir(tier, kernel{})
	if err != nil {
		return Identity{}, err
	}
	defer d.f.Close()
	return d.identity()
}

func (d dir) identity() (id Identity, err error) {
	text, err := d.read(uuidName)
	if err != nil {
		return id, err
	}
	if id.UUID, err = uuid.ParseBytes(bytes.TrimSpace(text)); err != nil {
		return id, fmt.Errorf("%s: %w", uuidName, err)
	}
	if id.NodeKey, err = d.read(nodeKeyName); err == nil && len(id.NodeKey) != 32 {
		err = fmt.Errorf("%s: %d bytes instead of 32", nodeKeyName, len(id.NodeKey))
	}
	return id, err
}

// openIdentity keeps the worker's identity, or reads or makes the tier's own.
func (s *Store) openIdentity() error {
	want := s.cfg.Identity
	if want == nil {
		id := NewIdentity()
		want = &id
	}
	text, err := s.keep(uuidName, []byte(want.UUID.String()+"\n"))
	if err != nil {
		return err
	}
	if s.uuid, err = uuid.ParseBytes(bytes.TrimSpace(text)); err != nil {
		return fmt.Errorf("%s: %w", uuidName, err)
	}
	s.nodeKey, err = s.keep(nodeKeyName, want.NodeKey)
	if err == nil && len(s.nodeKey) != 32 {
		err = fmt.Errorf("%s: %d bytes instead of 32", nodeKeyName, len(s.nodeKey))
	}
	return err
}

// keep returns what a small file has; if it is not there, or the worker's identity is given, it has content then.
func (s *Store) keep(name string, content []byte) ([]byte, error) {
	have, err := s.dir.read(name)
	if err == nil && (s.cfg.Identity == nil || bytes.Equal(have, content)) || err != nil && !errors.Is(err, fs.ErrNotExist) {
		return have, err
	}
	return content, s.dir.write(name, content)
}

func (d dir) read(name string) ([]byte, error) {
	f, err := d.open(name, unix.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

// write makes a small file whole: written aside, synced, renamed.
func (d dir) write(name string, content []byte) error {
	tmp := name + ".new"
	f, err := d.open(tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := d.rename(tmp, name); err != nil {
		return err
	}
	return d.f.Sync()
}

// Lock takes a tier for this process, waiting so long for another one to end; ask, unless nil, is called now and then while
// there is one. The lock is for [Config.Lock].
func Lock(ctx context.Context, tier string, wait time.Duration, ask func()) (*os.File, error) {
	d, err := openDir(tier, kernel{})
	if err != nil {
		return nil, err
	}
	defer d.f.Close()
	f, err := d.lock(ctx, cmp.Or(wait, lockWait), ask)
	if err != nil {
		return nil, fmt.Errorf("open cache %s: %w", tier, err)
	}
	return f, nil
}
