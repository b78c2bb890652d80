package cacheworker

import (
	"context"
	"fmt"
	"os"
	"path"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/cachestore"
	"github.com/larderfs/larder/cacheworker/dataset"
	"github.com/larderfs/larder/cacheworker/domainsocket"
	"github.com/larderfs/larder/cacheworker/fill"
	"github.com/larderfs/larder/cacheworker/metadata"
	"github.com/larderfs/larder/cacheworker/object"
)

// socketVolume is what a volume's domain socket serves: the same dataset, with the same
// freshness and the same principal as its mount.
type socketVolume struct {
	ms *mounts
	h  *held
}

func (v socketVolume) dataset() *dataset.Dataset {
	v.ms.mu.Lock()
	defer v.ms.mu.Unlock()
	return v.h.data
}

func (v socketVolume) find(ctx context.Context, p string) (metadata.Entry, error) {
	d := v.dataset()
	if p == "" {
		return metadata.Entry{Folder: true}, nil
	}
	dir, name := path.Split(p)
	return d.Lookup(ctx, dir, name, d.Freshness)
}

// Stat implements domainsocket.Volume.
func (v socketVolume) Stat(ctx context.Context, p string) (domainsocket.Entry, error) {
	e, err := v.find(ctx, p)
	return entryOf(v.dataset(), e), err
}

func entryOf(d *dataset.Dataset, e metadata.Entry) domainsocket.Entry {
	out := domainsocket.Entry{Name: e.Name, Folder: e.Folder, Size: e.Object.Size, ModTime: e.Object.ModTime, Version: e.Object.Version}
	if !e.Folder {
		out.CachedBytes = d.Peek(e.Object.ID()).PresentBytes
	}
	return out
}

// List implements domainsocket.Volume.
func (v socketVolume) List(ctx context.Context, p, after string, max int) ([]domainsocket.Entry, bool, error) {
	d, dir := v.dataset(), ""
	if p != "" {
		e, err := v.find(ctx, p)
		if err != nil {
			return nil, false, err
		}
		if !e.Folder {
			return nil, false, fmt.Errorf("%s is not a folder: %w", p, object.ErrInvalid)
		}
		dir += p + "/"
	}
	es, more, err := d.List(ctx, dir, after, d.Freshness)
	if err != nil {
		return nil, false, err
	}
	if len(es) > max {
		es, more = es[:max], true
	}
	out := make([]domainsocket.Entry, len(es))
	for i, e := range es {
		out[i] = entryOf(d, e)
	}
	return out, more, nil
}

// Open implements domainsocket.Volume.
func (v socketVolume) Open(ctx context.Context, p string) (domainsocket.File, error) {
	e, err := v.find(ctx, p)
	if err != nil {
		return nil, err
	}
	if e.Folder {
		return nil, fmt.Errorf("%s is a folder: %w", p, object.ErrInvalid)
	}
	d := v.dataset()
	dir, _ := path.Split(p)
	o, ok := d.Origin(dir)
	if !ok || o.Store != e.Object.Store { // what is mounted has changed since
		return nil, fmt.Errorf("%s: %w", p, object.ErrChanged)
	}
	spec := d.Spec(dir)
	r := d.Reader(o, spec, e.Object)
	if err := r.Authorize(ctx); err != nil {
		r.Close()
		if isGone(err) {
			d.Changed(o, e.Object.Key)
		}
		return nil, err
	}
	if d.Complete == brokerwire.CompleteAlways || d.Complete == brokerwire.CompleteAuto && d.Peek(e.Object.ID()).PresentBytes > 0 {
		d.CompleteLater(o, spec, e.Object) // opened again: the next open gets a descriptor
	}
	return &socketFile{Reader: r, d: d, o: o}, nil
}

// Status implements domainsocket.Volume.
func (v socketVolume) Status(context.Context) domainsocket.Status {
	s := v.ms.w.store.Stats()
	return domainsocket.Status{VolumeID: v.h.volume.ID, Worker: v.ms.w.store.UUID().String(), CachedBytes: s.CachedBytes, CapacityBytes: s.CapacityBytes}
}

// socketFile is an open object of a client.
type socketFile struct {
	*fill.Reader
	d *dataset.Dataset
	o dataset.Origin
}

// Descriptor implements domainsocket.File. Bytes without a grant are not given away.
func (f *socketFile) Descriptor() (*os.File, error) {
	var file *cachestore.File
	if f.Granted() {
		file = f.File()
	}
	if file == nil {
		return nil, object.ErrIncomplete
	}
	return file.View()
}

// ReadAt implements domainsocket.File.
func (f *socketFile) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	n, err := f.Reader.ReadAt(ctx, p, off)
	if isGone(err) {
		f.d.Changed(f.o, f.Object().Key)
	}
	return n, err
}
