// Package object names what is cached: one version of one under-store file.
//
// An [Object] never changes: another etag is another object. Hence its bytes can be cached,
// shared and given away without a lock. The package is a leaf; everybody imports it.
package object

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"time"
)

// ChunkSize is the unit that is filled, checked and counted, in bytes. Chunk i of an object
// is the bytes [i*ChunkSize, (i+1)*ChunkSize) of it; the last one may be shorter.
const ChunkSize = 1 << 20

// The decisions callers make. Everything else is wrapped with what was being done to what.
// fusefs maps them to errnos, the servers to their codes.
var (
	ErrNotFound    = errors.New("object not found")
	ErrChanged     = errors.New("object version changed")       // If-Match failed, or truncated in place: look the name up again
	ErrDenied      = errors.New("access denied by the store")   // 401, 403: the credential may not
	ErrExpired     = errors.New("the credential has expired")   // beside ErrDenied: the store was not asked
	ErrUnavailable = errors.New("store unavailable")            // 5xx, network, timeout after all retries
	ErrNoSpace     = errors.New("no room in the cache")         // read through instead
	ErrBusy        = errors.New("try again")                    // no connection or capacity now
	ErrCorrupt     = errors.New("bytes do not match their sum") // a bad chunk is a miss
	ErrInvalid     = errors.New("invalid argument")             // the text says which and how to mend it
	ErrIncomplete  = errors.New("cache file is not complete")   // no descriptor of it can be given away yet
)

// Refused reports whether the store itself refused the credential, which loses its grants by that. A credential
// that could not be renewed has been refused nothing.
func Refused(err error) bool { return errors.Is(err, ErrDenied) && !errors.Is(err, ErrExpired) }

// Store identifies an under store: scheme, endpoint and bucket or root, in one canonical
// text ("s3://endpoint-host:port/bucket", "file:///root"). Mounts, volumes and credentials are no part of it.
type Store string

// Principal says whose credential it is: an HMAC under the node's key of (id, secret, token).
// The zero value is nobody and is never granted anything.
type Principal [16]byte

// Object is one version of one under-store file. Store, Key, Version and Size are its
// identity; ModTime is what the store said beside them.
type Object struct {
	Store   Store
	Key     string // full key in the store, without a leading slash
	Version string // the etag without quotes, or "mtime:…" where the store gives none
	Size    int64  // bytes
	ModTime time.Time
}

// ID is the identity of an object, for maps, files and index keys.
type ID [16]byte

func (id ID) String() string { return hex.EncodeToString(id[:]) }

// ID hashes the identity (SHA-256, first 16 bytes, each part with its length before it).
func (o Object) ID() ID {
	h := sha256.New()
	for _, s := range []string{string(o.Store), o.Key, o.Version} {
		var n [8]byte
		binary.LittleEndian.PutUint64(n[:], uint64(len(s)))
		h.Write(n[:])
		h.Write([]byte(s))
	}
	var n [8]byte
	binary.LittleEndian.PutUint64(n[:], uint64(o.Size))
	h.Write(n[:])
	var id ID
	copy(id[:], h.Sum(nil))
	return id
}

// Chunks is the number of chunks of the object; 0 for an empty one.
func (o Object) Chunks() int { return int((o.Size + ChunkSize - 1) / ChunkSize) }

// ChunkLen is the length of chunk i in bytes.
func (o Object) ChunkLen(i int) int {
	return int(min(o.Size-int64(i)*ChunkSize, ChunkSize))
}

func (o Object) String() string { return fmt.Sprintf("%s/%s@%s", o.Store, o.Key, o.Version) }
