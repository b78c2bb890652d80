package dataset

import (
	"context"
	"errors"
	"strings"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

// Walk calls f with all objects of the under store whose keys begin with prefix ("" or ending in "/"), in the order
// of their keys, from behind the key after on. It asks the store and keeps nothing. An error of f ends it.
func (d *Dataset) Walk(ctx context.Context, prefix, after string, f func(object.Object) error) error {
	rest, _ := strings.CutPrefix(after, prefix)
	in := source.ListInput{Prefix: prefix}
	if folder, deeper, ok := strings.Cut(rest, "/"); ok {
		if err := d.Walk(ctx, prefix+folder+"/", prefix+folder+"/"+deeper, f); err != nil {
			return err
		}
		in.After = source.AfterName(folder, true)
	} else if rest != "" {
		in.After = source.AfterName(rest, false)
	}
	for {
		p, err := d.src.List(ctx, in)
		if errors.Is(err, object.ErrNotFound) { // removed meanwhile
			return nil
		}
		if err != nil {
			return err
		}
		if err := d.walkPage(ctx, prefix, p, f); err != nil {
			return err
		}
		if in.After = p.Next; p.Next == "" {
			return nil
		}
	}
}

// walkPage merges files and folders: a folder sorts as its name with "/" behind it.
func (d *Dataset) walkPage(ctx context.Context, prefix string, p source.Page, f func(object.Object) error) error {
	for len(p.Objects)+len(p.Folders) > 0 {
		if len(p.Folders) == 0 || len(p.Objects) > 0 && p.Objects[0].Key < prefix+p.Folders[0]+"/" {
			if err := f(p.Objects[0]); err != nil {
				return err
			}
			p.Objects = p.Objects[1:]
			continue
		}
		if err := d.Walk(ctx, prefix+p.Folders[0]+"/", "", f); err != nil {
			return err
		}
		p.Folders = p.Folders[1:]
	}
	return nil
}

// Head asks the store for one object.
func (d *Dataset) Head(ctx context.Context, key string) (object.Object, error) {
	return d.src.Head(ctx, key)
}

// Load caches all of an object, at low priority, unless it is cached; present reports that.
func (d *Dataset) Load(ctx context.Context, obj object.Object) (present bool, err error) {
	if d.Peek(obj.ID()).Complete {
		return true, nil
	}
	r := d.Reader(obj)
	defer r.Close()
	return false, r.Complete(ctx)
}
