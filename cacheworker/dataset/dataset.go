// Package dataset is one volume's view of its data: where a path lies in the under stores,
// what is there, and how to read it.
//
// A path of a volume is of one part of it: a folder of one store, read as one principal. A
// volume of a source has one part; one of a path of the namespace has as many as mounts show
// there. Everything a dataset asks or reads, it asks and reads as the part's own principal.
// Objects, fills and (within one principal) metadata are shared with all other datasets of the
// worker.
package dataset

import (
	"context"
	"errors"
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
	// Credential is what a mount says where it is; v has those that the node service brought.
	Credential(where string, v brokerwire.Volume) (brokerwire.Credentials, error)
}

// Deps is what all datasets of a worker share.
type Deps struct {
	Sources  Sources
	Metadata *metadata.Cache
	Fills    *fill.Fills
	Store    Store

	Usage func() *fill.Usage // for whom reads are counted; nil counts them for nobody
}

// Store is what a dataset asks of the cache beside its fills.
type Store interface {
	Peek(object.ID) cachestore.Info
	Stats() cachestore.Stats
	Use(object.ID)
	Bring(ids []object.ID, got func(object.ID, []byte))
	Unlinked(object.ID) bool
}

// Dataset is safe for concurrent use and never changes; new credentials, and other mounts, make a
// new one.
type Dataset struct {
	deps   Deps
	volume brokerwire.Volume
	parts  map[string]*part           // by At
	joints map[string][]string        // by folder: names in it that are mounts, or lead to some; sorted
	hidden map[string]map[string]bool // by folder: names in it that are mounts, but not for this volume
	none   error                      // why a folder that is of no part is not there

	Freshness time.Duration
	Complete  brokerwire.Complete
}

// Origin is where files of a part come from: the one at a path of the volume, which begins with At, is
// the object of Store whose key is Prefix and the rest of the path.
type Origin struct {
	At     string       `json:"at,omitempty"` // "" or ending in "/"
	Store  object.Store `json:"store"`
	Prefix string       `json:"prefix,omitempty"` // "" or ending in "/"
}

// Key is that of the file at a path of the volume.
func (o Origin) Key(path string) string { return o.Prefix + strings.TrimPrefix(path, o.At) }

// part is a folder of a store, and how it is read.
type part struct {
	Origin
	src  source.Source
	view *metadata.View
	spec string // how to open it again; "" for the only part of a volume of a source
	err  error  // why it cannot be asked; nothing above but At is set then
}

// Open parses the source of a volume that has one. It asks the store nothing; see Check.
func Open(v brokerwire.Volume, deps Deps) (*Dataset, error) {
	d := newDataset(v, deps)
	p, err := d.open("", v, v.Ambient())
	if err != nil {
		return nil, err
	}
	d.parts[""] = p
	return d, nil
}

func newDataset(v brokerwire.Volume, deps Deps) *Dataset {
	return &Dataset{deps: deps, volume: v, parts: map[string]*part{}, none: object.ErrNotFound, Freshness: v.Freshness, Complete: v.Complete}
}

// open opens the source of v as the part at a path.
func (d *Dataset) open(at string, v brokerwire.Volume, ambient bool) (*part, error) {
	u, err := url.Parse(v.Source)
	if err != nil {
		return nil, fmt.Errorf("source %q: %v: %w", v.Source, err, object.ErrInvalid)
	}
	p := &part{}
	prefix := strings.TrimPrefix(u.Path, "/")
	switch u.Scheme {
	case "s3":
		p.src, err = d.deps.Sources.S3(u.Host, v, ambient)
	case "file":
		p.src, prefix, err = d.deps.Sources.File(u.Path)
	default:
		err = fmt.Errorf("source %q: scheme %q is not known (s3, file): %w", v.Source, u.Scheme, object.ErrInvalid)
	}
	if err != nil {
		return nil, err
	}
	if prefix = strings.Trim(prefix, "/"); prefix != "" {
		prefix += "/"
	}
	if err := source.CheckPrefix(prefix); err != nil {
		return nil, fmt.Errorf("source %q: %w", v.Source, err)
	}
	p.Origin = Origin{At: at, Store: p.src.Store(), Prefix: prefix}
	p.view = d.deps.Metadata.View(p.src)
	return p, nil
}

// Check reports whether the dataset can be listed with this credential. What is asked is
// the first page of its root, which is kept: the next volume of the same principal asks
// nothing. Where that is empty the store is asked again, for a bucket or folder that does not exist
// looks empty too. What is mounted below the root is not asked.
func (d *Dataset) Check(ctx context.Context) error {
	p := d.parts[""]
	switch {
	case d.volume.CredentialsOf == brokerwire.CredentialsPod && d.volume.Credentials.IsZero():
		return nil // whether it can be will be known when a pod has brought its token
	case p == nil && len(d.parts) == 0:
		return d.none
	case p == nil:
		return nil
	case errors.Is(p.err, errNotAllowed) && !d.volume.Inline && d.volume.Tenant == "":
		return nil // whose it is will be known when it is published
	case p.err != nil:
		return p.err
	}
	es, _, err := p.view.List(ctx, p.Prefix, "", d.Freshness)
	if err == nil && len(es) == 0 {
		err = p.view.Check(ctx, p.Prefix)
	}
	return err
}

// owner is the part that a folder is of; nil if it is of none. A folder is "" or ends in "/".
func (d *Dataset) owner(dir string) *part {
	for len(d.parts) > 0 {
		if p := d.parts[dir]; p != nil || dir == "" {
			return p
		}
		dir, _ = path.Split(strings.TrimSuffix(dir, "/"))
	}
	return nil
}

// Origin is that of the files in a folder; ok is false if there can be none now.
func (d *Dataset) Origin(dir string) (o Origin, ok bool) {
	p := d.owner(dir)
	if p == nil || p.err != nil {
		return o, false
	}
	return p.Origin, true
}

// Lookup finds a name in a folder of the volume, "" or ending in "/". The answer is at
// most maxAge old.
func (d *Dataset) Lookup(ctx context.Context, dir, name string, maxAge time.Duration) (metadata.Entry, error) {
	if d.isJoint(dir, name) {
		return metadata.Entry{Name: name, Folder: true, At: time.Now()}, nil
	}
	p := d.parts[dir+name+"/"] // one that is not for this volume
	if p == nil {
		p = d.owner(dir)
	}
	switch {
	case p == nil:
		return metadata.Entry{At: time.Now()}, d.noneIn(dir)
	case p.err != nil:
		return metadata.Entry{}, p.err
	}
	return p.view.Lookup(ctx, p.Key(dir), name, maxAge)
}

// List returns entries behind a cookie ([metadata.Entry.Cookie]).
func (d *Dataset) List(ctx context.Context, dir, after string, maxAge time.Duration) ([]metadata.Entry, bool, error) {
	p, joints := d.owner(dir), d.joints[dir]
	switch {
	case p == nil && len(joints) == 0:
		return nil, false, d.noneIn(dir)
	case p != nil && p.err != nil && (len(joints) == 0 || !errors.Is(p.err, errNotAllowed)):
		return nil, false, p.err
	case p == nil || p.err != nil:
		return jointsBetween(joints, after, ""), false, nil
	case len(joints) == 0 && len(d.hidden[dir]) == 0:
		return p.view.List(ctx, p.Key(dir), after, maxAge)
	}
	return d.listBoth(ctx, p, joints, dir, after, maxAge)
}

// Behind are at most n files that follow a name in a folder, without asking for them.
func (d *Dataset) Behind(dir, name string, n int) []metadata.Entry {
	p := d.owner(dir)
	if p == nil || p.err != nil {
		return nil
	}
	return p.view.Behind(p.Key(dir), name, n)
}

// noneIn is why there is nothing in a folder that is of no part. One that leads to mounts has just not
// got the name.
func (d *Dataset) noneIn(dir string) error {
	if len(d.joints[dir]) > 0 {
		return object.ErrNotFound
	}
	return d.none
}

// Reader opens an object for reading as the principal of its part. It asks nothing yet. A part that is
// not the dataset's any more is opened again, as its spec says: what was opened is read to its end.
func (d *Dataset) Reader(o Origin, spec string, obj object.Object) *fill.Reader {
	return d.deps.Fills.Open(obj, d.source(o, spec)).For(d.usage())
}

// CompleteLater fills the rest of an object when there is nothing better to do.
func (d *Dataset) CompleteLater(o Origin, spec string, obj object.Object) {
	d.deps.Fills.CompleteLater(obj, d.source(o, spec), d.usage())
}

// Changed says that a read met another version of the object than the one that was looked up.
func (d *Dataset) Changed(o Origin, key string) {
	if p := d.owner(o.At); p != nil && p.err == nil && p.Origin == o {
		dir, name := path.Split(key)
		p.view.Invalidate(dir, name)
	}
}

func (d *Dataset) usage() *fill.Usage {
	if d.deps.Usage == nil {
		return nil
	}
	return d.deps.Usage()
}

// Peek says what of an object is cached.
func (d *Dataset) Peek(id object.ID) cachestore.Info { return d.deps.Store.Peek(id) }

// Used says that an object was opened without its reader, which nobody else would tell the cache.
func (d *Dataset) Used(id object.ID) { d.deps.Store.Use(id) }

// Bring reads objects that are cached and will be opened soon.
func (d *Dataset) Bring(ids []object.ID, got func(object.ID, []byte)) { d.deps.Store.Bring(ids, got) }

// Unlinked reports whether somebody holds a file of the object that was evicted.
func (d *Dataset) Unlinked(id object.ID) bool { return d.deps.Store.Unlinked(id) }

// Capacity is the cache's, in bytes: all of it and what is used.
func (d *Dataset) Capacity() (total, used int64) {
	s := d.deps.Store.Stats()
	return s.CapacityBytes, s.CachedBytes
}

// Spec says how to open the part of a folder again, for who remembers it; "" where there is no need.
func (d *Dataset) Spec(dir string) string {
	if p := d.owner(dir); p != nil {
		return p.spec
	}
	return ""
}

// source is what files of an origin are read from.
func (d *Dataset) source(o Origin, spec string) source.Source {
	p := d.owner(o.At)
	if p != nil && p.err == nil && p.Origin == o {
		return p.src
	}
	if spec == "" {
		return gone{o.Store}
	}
	p, err := d.reopen(spec)
	if err == nil && p.Origin != o {
		err = errors.New("its mount was another one")
	}
	if err != nil {
		return gone{o.Store}
	}
	return p.src
}
