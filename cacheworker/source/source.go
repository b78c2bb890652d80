// Package source reads under stores: one package each below it, one conformance suite
// ([sourcetest]) over all of them.
package source

import (
	"context"
	"io"

	"github.com/larderfs/larder/cacheworker/object"
)

// Source reads one under store with one credential. All methods are safe for concurrent
// use, retry what is worth it (5xx, resets, timeouts: jittered, bounded), and return errors
// that wrap the sentinels of package object.
type Source interface {
	// Store is the identity of the under store; equal for all credentials.
	Store() object.Store

	// Principal is whose credential this is.
	Principal() object.Principal

	// Head asks the store about one key: ErrNotFound, ErrDenied. The answer is a grant.
	Head(ctx context.Context, key string) (object.Object, error)

	// List returns one page of what is directly below prefix ("" or ending in "/"), in key
	// order (a folder sorts as its name with "/" behind it). A page with a Next has at least
	// one entry. A prefix that is not there is an empty page where folders are only parts of
	// keys (s3), ErrNotFound where they are things of their own (file). A list grants nothing.
	List(ctx context.Context, in ListInput) (Page, error)

	// Get reads the n bytes of obj from off on, 0 < n <= obj.Size-off. The reader yields
	// exactly n bytes and then io.EOF, or an error: ErrChanged where the store now holds
	// another version (noticed before the first byte, or while reading), never bytes of
	// two versions. A body that breaks off is resumed by the implementation. Getting the
	// reader without an error means that the store answered this credential: a grant.
	Get(ctx context.Context, obj object.Object, off, n int64) (io.ReadCloser, error)
}

// ListInput names one page.
type ListInput struct {
	Prefix string // "" or ending in "/"
	After  string // a Next of an earlier page, or a name (see AfterName); "" for the first
	Max    int    // entries at most; 0 means the store's own page size
}

// Page is one page of a list. Names are relative to the prefix, without slashes.
type Page struct {
	Objects []object.Object // files directly below the prefix; full keys, in key order
	Folders []string        // names of folders directly below it, in key order
	Next    string          // continue with After: Next; "" when this was the last page
	Hidden  int             // keys that no path can express ("..", NUL, empty or over-long segments): left out
}

// AfterName is the After of a list that goes on behind the entry with that name.
func AfterName(name string, folder bool) string {
	if folder {
		return name + "/\U0010FFFF" // behind every key in the folder
	}
	return name
}
