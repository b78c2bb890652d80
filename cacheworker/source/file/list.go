package file

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

// defaultPage is how many entries a page has when nobody says, as in S3.
const defaultPage = 1000

// item is a name in a folder. Its key is the name, with "/" behind a folder's, which makes
// the order that of S3.
type item struct {
	key  string
	link bool // a symbolic link: what it leads to is in the key
	none bool // neither file nor folder: hidden
}

// List returns one page of a folder.
func (s *Source) List(ctx context.Context, in source.ListInput) (_ source.Page, err error) {
	defer s.observe(source.List, time.Now(), &err)
	if err := source.CheckPrefix(in.Prefix); err != nil {
		return source.Page{}, err
	}
	if err := context.Cause(ctx); err != nil {
		return source.Page{}, err
	}
	dir, err := s.root.OpenRoot(local(in.Prefix))
	if err != nil {
		return source.Page{}, s.wrap("list", in.Prefix, err)
	}
	defer dir.Close()
	items, state, err := s.items(dir, in)
	if err != nil {
		return source.Page{}, s.wrap("list", in.Prefix, err)
	}
	page, err := s.page(ctx, dir, in, items)
	if err != nil {
		return source.Page{}, err
	}
	if page.Next != "" {
		s.lists.put(in.Prefix, state, items)
	}
	return page, nil
}

// items are all names of a folder in key order: those of the page before, if the folder is
// unchanged since.
func (s *Source) items(dir *os.Root, in source.ListInput) ([]item, string, error) {
	state, settled, err := stateOf(dir)
	if err != nil {
		return nil, "", err
	}
	if in.After != "" {
		if items, ok := s.lists.take(in.Prefix, state); ok {
			return items, state, nil
		}
	}
	f, err := dir.Open(".")
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	entries, err := f.ReadDir(-1)
	if err != nil {
		return nil, "", err
	}
	items := make([]item, 0, len(entries))
	for _, e := range entries {
		items = append(items, s.item(in.Prefix, e))
	}
	slices.SortFunc(items, func(a, b item) int { return cmp.Compare(a.key, b.key) })
	if !settled {
		state = "" // a further change could leave the same times behind
	}
	return items, state, nil
}

// stateOf is the version of a folder's list of names; settled says that any later change
// leads to another one.
func stateOf(dir *os.Root) (state string, settled bool, err error) {
	info, err := dir.Stat(".")
	if err != nil {
		return "", false, err
	}
	changed := time.Unix(0, info.Sys().(*syscall.Stat_t).Ctim.Nano())
	return version(info), time.Since(changed) > tick, nil
}

func (s *Source) item(prefix string, e fs.DirEntry) item {
	it := item{key: e.Name()}
	mode := e.Type()
	if mode&fs.ModeSymlink != 0 {
		it.link = true
		info, err := s.root.Stat(prefix + e.Name())
		if err != nil {
			it.none = true
			return it
		}
		mode = info.Mode()
	}
	switch {
	case mode.IsDir():
		it.key += "/"
	case !mode.IsRegular():
		it.none = true
	}
	return it
}

// page takes the entries behind in.After and looks at each file.
func (s *Source) page(ctx context.Context, dir *os.Root, in source.ListInput, items []item) (page source.Page, err error) {
	limit := in.Max
	if limit <= 0 {
		limit = defaultPage
	}
	first, found := slices.BinarySearchFunc(items, in.After, func(it item, after string) int { return cmp.Compare(it.key, after) })
	if found {
		first++
	}
	n, last := 0, ""
	for _, it := range items[first:] {
		if err := context.Cause(ctx); err != nil {
			return source.Page{}, err
		}
		if it.none {
			page.Hidden++
			continue
		}
		name, folder := strings.CutSuffix(it.key, "/")
		if n == limit {
			page.Next = last
			return page, nil
		}
		if folder {
			page.Folders = append(page.Folders, name)
		} else {
			info, err := s.look(dir, in.Prefix, it)
			if errors.Is(err, object.ErrNotFound) {
				continue // it went away, or became something else, meanwhile
			}
			if err != nil {
				return source.Page{}, err
			}
			page.Objects = append(page.Objects, s.object(in.Prefix+name, info))
		}
		n, last = n+1, source.AfterName(name, folder)
	}
	return page, nil
}

// look stats a file: relative to its folder where it can, because os.Root walks a path step by step.
func (s *Source) look(dir *os.Root, prefix string, it item) (info fs.FileInfo, err error) {
	if it.link {
		info, err = s.root.Stat(prefix + it.key)
	} else {
		info, err = dir.Lstat(it.key)
	}
	if err != nil {
		return nil, s.wrap("list", prefix+it.key, err)
	}
	if !info.Mode().IsRegular() {
		return nil, object.ErrNotFound
	}
	return info, nil
}

// lists remembers the names of folders whose lists are going on, so that a long one is not
// read and sorted again for each page.
type lists struct {
	mu  sync.Mutex
	all []listed // oldest first
}

type listed struct {
	prefix, state string
	at            time.Time
	items         []item
}

const (
	maxLists = 4
	listLife = 10 * time.Second
)

func (l *lists) put(prefix, state string, items []item) {
	if state == "" {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, listed{prefix, state, time.Now(), items})
	if len(l.all) > maxLists {
		l.all = slices.Delete(l.all, 0, 1)
	}
}

// take also forgets what has grown old.
func (l *lists) take(prefix, state string) ([]item, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = slices.DeleteFunc(l.all, func(x listed) bool { return time.Since(x.at) > listLife })
	i := slices.IndexFunc(l.all, func(x listed) bool { return x.prefix == prefix && x.state == state })
	if i < 0 {
		return nil, false
	}
	items := l.all[i].items
	l.all = slices.Delete(l.all, i, i+1)
	return items, true
}
