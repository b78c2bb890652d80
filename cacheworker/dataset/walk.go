package dataset

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

// Part is a folder of an under store that a dataset shows, for who caches what is in it.
type Part struct {
	*part
	data *Dataset
}

// Parts are those that can be read, by where they are shown.
func (d *Dataset) Parts() (all []Part) {
	for _, at := range slices.Sorted(maps.Keys(d.parts)) {
		if p := d.parts[at]; p.err == nil {
			all = append(all, Part{p, d})
		}
	}
	return all
}

// Walk calls f with all objects of the under store whose keys begin with prefix ("" or ending in "/"), in the order
// of their keys, from behind the key after on. It asks the store and keeps nothing. An error of f ends it.
func (p Part) Walk(ctx context.Context, prefix, after string, f func(object.Object) error) error {
	rest, _ := strings.CutPrefix(after, prefix)
	in := source.ListInput{Prefix: prefix}
	if folder, deeper, ok := strings.Cut(rest, "/"); ok {
		if err := p.Walk(ctx, prefix+folder+"/", prefix+folder+"/"+deeper, f); err != nil {
			return err
		}
		in.After = source.AfterName(folder, true)
	} else if rest != "" {
		in.After = source.AfterName(rest, false)
	}
	for {
		page, err := p.src.List(ctx, in)
		if errors.Is(err, object.ErrNotFound) { // removed meanwhile
			return nil
		}
		if err != nil {
			return err
		}
		if err := p.walkPage(ctx, prefix, page, f); err != nil {
			return err
		}
		if in.After = page.Next; page.Next == "" {
			return nil
		}
	}
}

// walkPage merges files and folders: a folder sorts as its name with "/" behind it.
func (p Part) walkPage(ctx context.Context, prefix string, page source.Page, f func(object.Object) error) error {
	for len(page.Objects)+len(page.Folders) > 0 {
		if len(page.Folders) == 0 || len(page.Objects) > 0 && page.Objects[0].Key < prefix+page.Folders[0]+"/" {
			if err := f(page.Objects[0]); err != nil {
				return err
			}
			page.Objects = page.Objects[1:]
			continue
		}
		if err := p.Walk(ctx, prefix+page.Folders[0]+"/", "", f); err != nil {
			return err
		}
		page.Folders = page.Folders[1:]
	}
	return nil
}

// Head asks the store for one object.
func (p Part) Head(ctx context.Context, key string) (object.Object, error) {
	return p.src.Head(ctx, key)
}

// Load caches all of an object, at low priority, unless it is cached; present reports that.
func (p Part) Load(ctx context.Context, obj object.Object) (present bool, err error) {
	if p.data.Peek(obj.ID()).Complete {
		return true, nil
	}
	r := p.data.deps.Fills.Open(obj, p.src).For(p.data.usage())
	defer r.Close()
	return false, r.Complete(ctx)
}
