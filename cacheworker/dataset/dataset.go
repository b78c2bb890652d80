// Package dataset is one volume's view of its data: where a path lies in the under store,
// what is there, and how to read it.
//
// Everything a dataset asks or reads, it asks and reads as its own principal. Objects, fills
// and (within one principal) metadata are shared with all other datasets of the worker.
package dataset

import (
	"context"
	"fmt"
	"net/url"
	"path"
	"strings"
	"time"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/cachestore"
	"github.com/larderfs/larder/cacheworker/fill"
	"github.com/larderfs/larder/cacheworker/metadata"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

// Sources opens under stores; the worker implements it.
type Sources interface {
	// S3 opens a bucket; with zero credentials anonymously, or as the worker itself if ambient.
	S3(bucket string, v brokerwire.Volume, ambient bool) (source.Source, error)
	// File opens the file root and says which path below it the given absolute one is.
	File(absolute string) (src source.Source, rel string, err error)
}

// Deps is what all datasets of a worker share.
type Deps struct {
	Sources  Sources
	Metadata *metadata.Cache
	Fills    *fill.Fills
	Store    *cachestore.Store

	Usage func() *fill.Usage // for whom reads are counted; nil counts them for nobody
}

// Dataset is safe for concurrent use and never changes; new credentials make a new one.
type Dataset struct {
	deps   Deps
	src    source.Source
	view   *metadata.View
	prefix string // "" or ending in "/"

	Freshness time.Duration
	Complete  brokerwire.Complete
}

// Open parses the volume's source. It asks the store nothing; see Check.
func Open(v brokerwire.Volume, deps Deps) (*Dataset, error) {
	u, err := url.Parse(v.Source)
	if err != nil {
		return nil, fmt.Errorf("source %q: %v: %w", v.Source, err, object.ErrInvalid)
	}
	d := &Dataset{deps: deps, Freshness: v.Freshness, Complete: v.Complete}
	prefix := strings.TrimPrefix(u.Path, "/")
	switch u.Scheme {
	case "s3":
		d.src, err = deps.Sources.S3(u.Host, v, v.Credentials.IsZero() && !v.Inline)
	case "file":
		d.src, prefix, err = deps.Sources.File(u.Path)
	default:
		err = fmt.Errorf("source %q: scheme %q is not known (s3, file): %w", v.Source, u.Scheme, object.ErrInvalid)
	}
	if err != nil {
		return nil, err
	}
	if prefix = strings.Trim(prefix, "/"); prefix != "" {
		d.prefix = prefix + "/"
	}
	d.view = deps.Metadata.View(d.src)
	return d, nil
}

// Check reports whether the dataset can be listed with this credential. What is asked is
// the first page of its root, which is kept: the next volume of the same principal asks
// nothing. Where that is empty the store is asked again, for a bucket or folder that does not exist
// looks empty too.
func (d *Dataset) Check(ctx context.Context) error {
	es, _, err := d.view.List(ctx, d.prefix, "", d.Freshness)
	if err == nil && len(es) == 0 {
		err = d.view.Check(ctx, d.prefix)
	}
	return err
}

// Store is the identity of the under store.
func (d *Dataset) Store() object.Store { return d.src.Store() }

// Root is the key prefix of the dataset: "" or ending in "/".
func (d *Dataset) Root() string { return d.prefix }

// Lookup finds a name in a folder, whose key prefix is "" or ends in "/". The answer is at
// most maxAge old.
func (d *Dataset) Lookup(ctx context.Context, dir, name string, maxAge time.Duration) (metadata.Entry, error) {
	return d.view.Lookup(ctx, dir, name, maxAge)
}

// List returns entries behind a cookie ([metadata.Entry.Cookie]).
func (d *Dataset) List(ctx context.Context, dir, after string, maxAge time.Duration) ([]metadata.Entry, bool, error) {
	return d.view.List(ctx, dir, after, maxAge)
}

// Changed says that a read met another version of the object than the one that was looked up.
func (d *Dataset) Changed(key string) {
	dir, name := path.Split(key)
	d.view.Invalidate(dir, name)
}

// Reader opens an object for reading as the dataset's principal. It asks nothing yet.
func (d *Dataset) Reader(obj object.Object) *fill.Reader {
	return d.deps.Fills.Open(obj, d.src).For(d.usage())
}

func (d *Dataset) usage() *fill.Usage {
	if d.deps.Usage == nil {
		return nil
	}
	return d.deps.Usage()
}

// CompleteLater fills the rest of an object when there is nothing better to do.
func (d *Dataset) CompleteLater(obj object.Object) { d.deps.Fills.CompleteLater(obj, d.src, d.usage()) }

// Peek says what of an object is cached.
func (d *Dataset) Peek(id object.ID) cachestore.Info { return d.deps.Store.Peek(id) }

// Capacity is the cache's, in bytes: all of it and what is used.
func (d *Dataset) Capacity() (total, used int64) {
	s := d.deps.Store.Stats()
	return s.CapacityBytes, s.CachedBytes
}
