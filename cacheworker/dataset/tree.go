package dataset

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/metadata"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
	"github.com/larderfs/larder/master/namespace"
	"github.com/larderfs/larder/master/record"
)

// OpenPath opens what mounts show at the path of a volume. A mount that cannot be opened, or is not for
// the volume, hides what is below it all the same. It asks the stores nothing; see Check.
func OpenPath(v brokerwire.Volume, mounts []record.Mount, deps Deps) *Dataset {
	return openPath(v, mounts, deps, func(m record.Mount, w namespace.Who) bool { return m.Allows(w.Inline, w.Namespace) })
}

// OpenAll is OpenPath for an administrator, who is in no list of a mount.
func OpenAll(v brokerwire.Volume, mounts []record.Mount, deps Deps) *Dataset {
	return openPath(v, mounts, deps, func(record.Mount, namespace.Who) bool { return true })
}

func openPath(v brokerwire.Volume, mounts []record.Mount, deps Deps, allows func(record.Mount, namespace.Who) bool) *Dataset {
	d := newDataset(v, deps)
	d.none = fmt.Errorf("%s: %w", namespace.Nothing(v.Path), object.ErrNotFound)
	view, _ := namespace.At(mounts, v.Path)
	who := namespace.Who{Inline: v.Inline, Namespace: v.Tenant}
	shown := map[string]map[string]bool{}
	d.hidden = map[string]map[string]bool{}
	note := func(in map[string]map[string]bool, dir, name string) {
		if in[dir] == nil {
			in[dir] = map[string]bool{}
		}
		in[dir][name] = true
	}
	for _, np := range view.Parts {
		p := d.openMount(np, who, allows)
		d.parts[np.At] = p
		if dir, name := path.Split(strings.TrimSuffix(np.At, "/")); errors.Is(p.err, errNotAllowed) {
			note(d.hidden, dir, name)
			continue
		}
		for dir, rest := "", np.At; rest != ""; {
			name, after, _ := strings.Cut(rest, "/")
			note(shown, dir, name)
			dir, rest = dir+name+"/", after
		}
	}
	d.joints = map[string][]string{}
	for dir, names := range shown {
		d.joints[dir] = slices.SortedFunc(maps.Keys(names), func(a, b string) int { return strings.Compare(a+"/", b+"/") })
	}
	return d
}

// OpenUnknown is the dataset of a path while nobody knows what is mounted there.
func OpenUnknown(v brokerwire.Volume, why error, deps Deps) *Dataset {
	d := newDataset(v, deps)
	d.parts[""] = &part{err: why}
	return d
}

// errNotAllowed is wrapped, with ErrDenied, by the error of a part that is not for the volume.
var errNotAllowed = errors.New("the mount's list of namespaces")

func (d *Dataset) openMount(np namespace.Part, who namespace.Who, allows func(record.Mount, namespace.Who) bool) *part {
	p, err := d.tryMount(np, who, allows)
	if err != nil {
		return &part{Origin: Origin{At: np.At}, err: err}
	}
	return p
}

func (d *Dataset) tryMount(np namespace.Part, who namespace.Who, allows func(record.Mount, namespace.Who) bool) (*part, error) {
	m := np.Mount
	if err := m.Validate(); err != nil { // an older master took it
		return nil, fmt.Errorf("mount %s: %v: %w", m.Path, err, object.ErrInvalid)
	}
	if !allows(m, who) {
		return nil, fmt.Errorf("%s: %w: %w", namespace.Refusal(m, who), errNotAllowed, object.ErrDenied)
	}
	spec, err := json.Marshal(np)
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", m.Path, err)
	}
	p, err := d.openSpec(np)
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", m.Path, err)
	}
	p.spec = string(spec)
	return p, nil
}

// openSpec opens the store of a mount, with the mount's credential, or, where it has none, the
// volume's own. What an administrator wrote is not bound by the rules of inline volumes; but the
// worker's own credential is not for them.
func (d *Dataset) openSpec(np namespace.Part) (*part, error) {
	v, m := d.volume, np.Mount
	ambient := v.Ambient()
	if m.Credential != "" {
		c, err := d.deps.Sources.Credential(m.Credential, v)
		if err != nil {
			return nil, err
		}
		v.Credentials, ambient = c, false
	}
	v.Source, v.Inline = np.URI, false
	v.Endpoint, v.Region = m.Options[record.OptionEndpoint], m.Options[record.OptionRegion]
	v.PathStyle = v.Endpoint != ""
	if style := m.Options[record.OptionPathStyle]; style != "" {
		v.PathStyle = style == "true"
	}
	return d.open(np.At, v, ambient)
}

// reopen opens what was a part of an earlier dataset.
func (d *Dataset) reopen(spec string) (*part, error) {
	var np namespace.Part
	if err := json.Unmarshal([]byte(spec), &np); err != nil {
		return nil, fmt.Errorf("a mount that was: %v: %w", err, object.ErrInvalid)
	}
	return d.openSpec(np)
}

// isJoint reports whether a name is a mount, or leads to one.
func (d *Dataset) isJoint(dir, name string) bool {
	_, ok := slices.BinarySearchFunc(d.joints[dir], name+"/", func(a, b string) int { return strings.Compare(a+"/", b) })
	return ok
}

// Name is a name in a folder.
type Name struct{ Dir, Name string }

// Joined are the names that are mounts, or lead to some, in one of two datasets and not in the other: what
// was told of them may not be true any more.
func (d *Dataset) Joined(before *Dataset) (changed []Name) {
	add := func(dir string, names, others []string) {
		for _, n := range names {
			if !slices.Contains(others, n) {
				changed = append(changed, Name{dir, n})
			}
		}
	}
	for dir, names := range d.joints {
		add(dir, names, before.joints[dir])
	}
	for dir, names := range before.joints {
		add(dir, names, d.joints[dir])
	}
	return changed
}

// listBoth lists a folder of a part in which mounts begin: they hide what has their name.
func (d *Dataset) listBoth(ctx context.Context, p *part, joints []string, dir, after string, maxAge time.Duration) ([]metadata.Entry, bool, error) {
	for {
		es, more, err := p.view.List(ctx, p.Key(dir), after, maxAge)
		if errors.Is(err, object.ErrNotFound) && len(joints) > 0 {
			err = nil // a store with folders of their own has not got this one
		}
		if err != nil {
			return nil, false, err
		}
		end := ""
		if more {
			end = es[len(es)-1].Cookie()
		}
		es = slices.DeleteFunc(es, func(e metadata.Entry) bool { return d.isJoint(dir, e.Name) || d.hidden[dir][e.Name] })
		es = append(es, jointsBetween(joints, after, end)...)
		slices.SortFunc(es, func(a, b metadata.Entry) int { return strings.Compare(a.Cookie(), b.Cookie()) })
		if len(es) > 0 || !more {
			return es, more, nil
		}
		after = end
	}
}

// jointsBetween are those behind a cookie, up to another one; "" is no end.
func jointsBetween(joints []string, after, end string) (es []metadata.Entry) {
	for _, name := range joints {
		e := metadata.Entry{Name: name, Folder: true, At: time.Now()}
		if c := e.Cookie(); c > after && (end == "" || c <= end) {
			es = append(es, e)
		}
	}
	return es
}

// gone is the store of a mount that was removed and cannot be opened again.
type gone struct{ store object.Store }

var _ source.Source = gone{}

func (g gone) err() error {
	return fmt.Errorf("%s: its mount is gone: %w", g.store, object.ErrChanged)
}

func (g gone) Store() object.Store         { return g.store }
func (g gone) Principal() object.Principal { return object.Principal{} }
func (g gone) Head(context.Context, string) (object.Object, error) {
	return object.Object{}, g.err()
}
func (g gone) List(context.Context, source.ListInput) (source.Page, error) {
	return source.Page{}, g.err()
}
func (g gone) Get(context.Context, object.Object, int64, int64) (io.ReadCloser, error) {
	return nil, g.err()
}
