package cachestore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"golang.org/x/sys/unix"
)

// When the index is lost nobody knows what the cache files are. They are set aside by one rename, so that a start does
// not wait for their removal, and removed beside all else: those that somebody still holds become held ones.

// setAside takes all cache files away from where new ones are made.
func (s *Store) setAside() error {
	to := fmt.Sprintf("%s%016x", asidePrefix, newNonce())
	if err := s.dir.rename(objectsName, to); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return s.dir.mkdir(objectsName)
}

// removeAside removes what this process or an earlier one has set aside, as far as it can.
func (s *Store) removeAside(ctx context.Context) {
	names, err := s.dir.names(".")
	for _, name := range names {
		if strings.HasPrefix(name, asidePrefix) {
			err = errors.Join(err, s.removeFolder(ctx, name, 1))
		}
	}
	if err != nil && ctx.Err() == nil {
		s.log.Error("remove cache files of a lost index", "dir", s.cfg.Dir, "err", err)
	}
}

// removeFolder removes a folder with so many levels of folders in it.
func (s *Store) removeFolder(ctx context.Context, folder string, levels int) error {
	names, err := s.dir.names(folder)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		p := folder + "/" + name
		if levels > 0 {
			errs = append(errs, s.removeFolder(ctx, p, levels-1))
		} else {
			errs = append(errs, s.removeLost(name, p))
		}
	}
	if err := unix.Unlinkat(s.dir.fd(), folder, unix.AT_REMOVEDIR); err != nil && err != unix.ENOENT {
		errs = append(errs, &fs.PathError{Op: "rmdir", Path: folder, Err: err})
	}
	return errors.Join(errs...)
}

// removeLost removes a cache file, or counts it among the held ones.
func (s *Store) removeLost(name, path string) error {
	id, nonce, ok := parseFileName(name)
	if !ok {
		return s.dir.unlink(path)
	}
	s.evicting.Lock()
	defer s.evicting.Unlock()
	k := heldKey{id, nonce}
	if s.unlinkUnheld(k, path) {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstatat(s.dir.fd(), path, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if err := s.dir.rename(path, heldPath(id, nonce)); err != nil {
		return err
	}
	s.mu.Lock()
	s.hold(k, st.Blocks*512)
	s.mu.Unlock()
	return nil
}
