package cachestore

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// dir is a directory by descriptor: nothing in it is ever named from the root, so a worker
// needs no rights on the folders above, and renaming those changes nothing.
type dir struct {
	f   *os.File
	sys system
}

func openDir(path string, sys system) (dir, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return dir{}, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return dir{os.NewFile(uintptr(fd), path), sys}, nil
}

func (d dir) fd() int { return int(d.f.Fd()) }

// path names the directory for libraries that want text.
func (d dir) path() string { return "/proc/self/fd/" + strconv.Itoa(d.fd()) }

func (d dir) open(name string, flags int, perm uint32) (*os.File, error) {
	for {
		fd, err := d.sys.openat(d.fd(), name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, perm)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: name, Err: err}
		}
		return os.NewFile(uintptr(fd), name), nil
	}
}

func (d dir) mkdir(name string) error {
	if err := d.sys.mkdirat(d.fd(), name); err != nil && err != unix.EEXIST {
		return &fs.PathError{Op: "mkdir", Path: name, Err: err}
	}
	return nil
}

func (d dir) unlink(name string) error {
	if err := d.sys.unlinkat(d.fd(), name); err != nil && err != unix.ENOENT {
		return &fs.PathError{Op: "unlink", Path: name, Err: err}
	}
	return nil
}

func (d dir) rename(from, to string) error {
	if err := d.sys.renameat(d.fd(), from, to); err != nil {
		return &fs.PathError{Op: "rename", Path: from, Err: err}
	}
	return nil
}

// names lists a folder.
func (d dir) names(folder string) ([]string, error) {
	f, err := d.open(folder, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

// ErrTaken is when a directory stays another process's.
var ErrTaken = errors.New("another process has used it")

// lock takes the directory for this process, waiting for another one to end. ask, unless nil, is
// called once a second while there is one, at once for the first time.
func (d dir) lock(ctx context.Context, wait time.Duration, ask func()) (*os.File, error) {
	f, err := d.open(lockName, unix.O_RDWR|unix.O_CREAT, 0o600)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond) // the kernel gives no event for a lock with a deadline
	defer tick.Stop()
	for asked := (time.Time{}); ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			f.Close()
			return nil, fmt.Errorf("lock: %w", err)
		}
		if ask != nil && time.Since(asked) > time.Second {
			ask()
			asked = time.Now()
			continue
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("%w for %v: stop that one first", ErrTaken, wait)
		}
	}
}

// Await takes a tier for this process when nobody else has it, without a deadline. The lock is for
// [Config.Lock].
func Await(ctx context.Context, tier string) (*os.File, error) {
	d, err := openDir(tier, kernel{})
	if err != nil {
		return nil, err
	}
	defer d.f.Close()
	f, err := d.open(lockName, unix.O_RDWR|unix.O_CREAT, 0o600)
	if err != nil {
		return nil, err
	}
	locked := make(chan error, 1)
	go func() { locked <- flock(f) }()
	select {
	case err = <-locked:
	case <-ctx.Done():
		go func() { <-locked; f.Close() }() // nothing calls a thread back from flock(2)
		return nil, context.Cause(ctx)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", tier, err)
	}
	return f, nil
}

func flock(f *os.File) error {
	for {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != unix.EINTR {
			return err
		}
	}
}

// removeAll deletes a folder of our own, with at most one level of folders in it.
func (d dir) removeAll(folder string) error {
	names, err := d.names(folder)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, name := range names {
		p := path.Join(folder, name)
		err := unix.Unlinkat(d.fd(), p, 0)
		if err == unix.EISDIR {
			err = d.removeAll(p)
		}
		if err != nil && err != unix.ENOENT {
			return &fs.PathError{Op: "unlink", Path: p, Err: err}
		}
	}
	if err := unix.Unlinkat(d.fd(), folder, unix.AT_REMOVEDIR); err != nil && err != unix.ENOENT {
		return &fs.PathError{Op: "rmdir", Path: folder, Err: err}
	}
	return nil
}

// room is what the file system has left for us.
type room struct {
	bytes, inodes           int64
	totalBytes, totalInodes int64
}

func (d dir) room() (room, error) {
	var st unix.Statfs_t
	if err := d.sys.statfs(d.fd(), &st); err != nil {
		return room{}, fmt.Errorf("statfs: %w", err)
	}
	return room{
		bytes: int64(st.Bavail) * st.Bsize, totalBytes: int64(st.Blocks) * st.Bsize,
		inodes: int64(st.Ffree), totalInodes: int64(st.Files),
	}, nil
}

// The names in a store's directory.
const (
	lockName    = "lock"
	lostName    = "index-lost"
	uuidName    = "uuid"
	nodeKeyName = "node-key"
	indexName   = "index"
	objectsName = "objects" // objects/xx/<id>-<nonce>: the cache files
	heldName    = "held"    // held/<id>-<nonce>: evicted, but somebody still holds them
	asidePrefix = "aside-"  // aside-<nonce>/xx/…: what was objects when the index was lost
)

// fileName is unique for ever: an object that is cached again gets another nonce.
func fileName(id object.ID, nonce uint64) string {
	var b [32 + 1 + 16]byte
	hex.Encode(b[:32], id[:])
	b[32] = '-'
	for i := range 16 {
		b[33+i] = "0123456789abcdef"[nonce>>(60-4*i)&15]
	}
	return string(b[:])
}

func parseFileName(name string) (id object.ID, nonce uint64, ok bool) {
	if len(name) != 49 || name[32] != '-' {
		return id, 0, false
	}
	var digits [32]byte
	copy(digits[:], name)
	if _, err := hex.Decode(id[:], digits[:]); err != nil {
		return id, 0, false
	}
	nonce, err := strconv.ParseUint(name[33:], 16, 64)
	return id, nonce, err == nil
}

func objectPath(id object.ID, nonce uint64) string {
	name := fileName(id, nonce)
	return objectsName + "/" + name[:2] + "/" + name
}

func heldPath(id object.ID, nonce uint64) string {
	return heldName + "/" + fileName(id, nonce)
}

const blockSize = 4096

// onDisk is what n bytes of a chunk occupy.
func onDisk(n int) int64 { return (int64(n) + blockSize - 1) &^ (blockSize - 1) }
