// Package namespace says what a path of the namespace shows, by the mount table.
//
// It is pure. Of two mounts the deeper one counts: it hides what the store of the other has at
// its path. That holds for those who may not use it too, or what a folder shows would depend on
// who looks.
package namespace

import (
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/larderfs/larder/master/record"
)

// View is what a volume at a path of the namespace shows.
type View struct {
	Path  string
	Parts []Part // by At; the first one is at "" if the folder itself is of a mount, else all are below
}

// Part is a mount's share of a view.
type Part struct {
	At    string // where in the view it begins: "" or ending in "/"
	URI   string // of the folder that is shown there, without a slash at the end; %XX stands for a byte
	Mount record.Mount
}

// Who wants to use a mount.
type Who struct {
	Inline    bool   // by a volume whose attributes a user wrote
	Namespace string // the Kubernetes namespace; "" if it is not known
}

// At is the view of a path; ok is false if nothing is mounted at it, above it or below it.
func At(mounts []record.Mount, path string) (v View, ok bool) {
	v.Path = path
	var base *Part
	for _, m := range mounts {
		if rest, ok := below(m.Path, path); ok { // at it or above it: the deepest counts
			if base == nil || len(m.Path) > len(base.Mount.Path) {
				base = &Part{URI: join(m.URI, rest), Mount: m}
			}
		} else if rest, ok := below(path, m.Path); ok {
			v.Parts = append(v.Parts, Part{At: rest + "/", URI: m.URI, Mount: m})
		}
	}
	slices.SortFunc(v.Parts, func(a, b Part) int { return strings.Compare(a.At, b.At) })
	if base != nil {
		v.Parts = slices.Insert(v.Parts, 0, *base)
	}
	return v, len(v.Parts) > 0
}

// URIs are where in the under stores lies what a path, as it is written, shows: of a folder if it ends in a slash.
func URIs(mounts []record.Mount, written string) ([]string, error) {
	path, err := record.ParsePath(written)
	if err != nil {
		return nil, err
	}
	v, ok := At(mounts, path)
	if !ok {
		return nil, fmt.Errorf("%s: %w", Nothing(path), record.ErrNotFound)
	}
	var uris []string
	for _, p := range v.Parts {
		uri := p.URI
		if strings.HasSuffix(written, "/") || p.At != "" || path == p.Mount.Path {
			uri = strings.TrimSuffix(uri, "/") + "/" // a mount is a folder
		}
		uris = append(uris, uri)
	}
	return uris, nil
}

// below is path relative to root, if it is root or below it.
func below(root, path string) (rest string, ok bool) {
	if path == root {
		return "", true
	}
	return strings.CutPrefix(path, strings.TrimSuffix(root, "/")+"/")
}

// join adds names to a URI. What stands for something else there is escaped: a user may have written the names.
func join(uri, rest string) string {
	if rest == "" {
		return uri
	}
	uri = strings.TrimSuffix(uri, "/")
	for name := range strings.SplitSeq(rest, "/") {
		uri += "/" + url.PathEscape(name)
	}
	return uri
}

// Refused says in the words of an error why somebody may not have the view's own folder, and what to do;
// "" if he may. What is mounted below and not for him, he does not see.
func (v View) Refused(w Who) string {
	if v.Parts[0].At != "" {
		if slices.ContainsFunc(v.Parts, func(p Part) bool { return p.Mount.Allows(w.Inline, w.Namespace) }) {
			return ""
		}
	} else if v.Parts[0].Mount.Allows(w.Inline, w.Namespace) {
		return ""
	}
	return Refusal(v.Parts[0].Mount, w)
}

// Refusal says that a mount is not for somebody, and who can change that, how.
func Refusal(m record.Mount, w Who) string {
	kind, flag, list := "volumes of StorageClasses", "--allow-class", m.AllowClass
	if w.Inline {
		kind, flag, list = "inline volumes", "--allow-inline", m.AllowInline
	}
	allowed := "none"
	switch {
	case len(list) > 0 && list[0] != record.NoNamespace:
		allowed = strings.Join(list, ",")
	case len(list) == 0 && !w.Inline:
		allowed = record.AllNamespaces
	}
	who := fmt.Sprintf("those of Kubernetes namespace %q", w.Namespace)
	name := w.Namespace
	if w.Namespace == "" {
		who, name = "those of a pod whose Kubernetes namespace is not known (is podInfoOnMount set in the CSIDriver?)", record.AllNamespaces
	}
	with := name
	if allowed != "none" && name != record.AllNamespaces {
		with = allowed + "," + name
	}
	text := fmt.Sprintf("mount %s does not allow %s to use it; %s that may: %s. An administrator changes that with: larder mount set %s %s %s",
		m.Path, strings.Replace(who, "those", kind, 1), "namespaces", allowed, m.Path, flag, with)
	if m.Object != "" {
		text += fmt.Sprintf(" (or in the object mounts.larder.dev/%s)", m.Object)
	}
	return text
}

// Nothing says that nothing is mounted at a path.
func Nothing(path string) string {
	return fmt.Sprintf("nothing is mounted at %s, above it or below it; an administrator mounts a store with: larder mount add %s s3://bucket/prefix (larder mount ls shows what is mounted)", path, path)
}
