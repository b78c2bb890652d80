package metadata

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

// flightKey says what is being asked.
type flightKey struct {
	t    *table
	kind string // "list", "head" or "probe"
	dir  string
	arg  string // a cookie, or a name
}

// listed is the page that a list of this key would bring, if it is remembered. Requires Cache.mu.
func (k flightKey) listed() *segment {
	f := k.t.folders[k.dir]
	if k.kind != "list" || f == nil {
		return nil
	}
	if seg := f.covering(above(k.arg)); seg != nil && seg.page && seg.lo == above(k.arg) {
		return seg
	}
	return nil
}

// flight is one request that several callers wait for. It belongs to all of them: the
// first one's context does not end it, the last one out does.
type flight struct {
	seq     uint64
	at      time.Duration
	cancel  context.CancelFunc
	waiters int  // guarded by Cache.mu
	ahead   bool // asked for before somebody wanted it; guarded by Cache.mu

	done chan struct{} // closed when seg and err are set
	seg  *segment
	err  error
}

// do asks, or joins a request that satisfies a. While one is under way that was sent too
// early, it waits for its end, so that all who wait meanwhile share the next one.
func (v *View) do(ctx context.Context, key flightKey, a ask, call func(context.Context) (*segment, error)) (*segment, error) {
	c := v.c
	for {
		c.mu.Lock()
		fl := c.flights[key]
		if seg := key.listed(); fl == nil && a.accepts(seg) { // it came between the caller's look and now
			c.mu.Unlock()
			return seg, nil
		}
		late := fl != nil && !a.fresh(fl.seq, fl.at)
		if fl == nil {
			fl = v.start(context.WithoutCancel(ctx), key, call)
		}
		if !late {
			fl.waiters++
		}
		c.mu.Unlock()

		select {
		case <-fl.done:
			if !late {
				return fl.seg, fl.err
			}
		case <-ctx.Done():
			if !late {
				c.leave(key, fl)
			}
			return nil, fmt.Errorf("wait for the store: %w", context.Cause(ctx))
		}
	}
}

// start sends a request. Requires c.mu.
func (v *View) start(ctx context.Context, key flightKey, call func(context.Context) (*segment, error)) *flight {
	c := v.c
	c.seq++
	fl := &flight{seq: c.seq, at: c.now(), done: make(chan struct{})}
	ctx, fl.cancel = context.WithCancel(ctx)
	c.flights[key] = fl
	if key.kind == "head" {
		c.stats.Heads++
	} else {
		c.stats.Lists++
	}
	go func() { // ends with the request; those who wait for done, or its cancel, wait for it
		defer fl.cancel()
		seg, err := call(ctx)
		if object.Refused(err) {
			c.denied(v.t)
		}
		c.mu.Lock()
		fresh := 0
		if err == nil {
			seg.seq, seg.at, seg.cache = fl.seq, fl.at, c
			if f := key.t.folders[key.dir]; f != nil && f.scan != nil {
				fresh = f.scan.news(f, seg)
			}
			c.insert(key.t, key.dir, seg)
		} else if object.Refused(err) && key.kind == "list" {
			c.listDenied(key.t, key.dir)
		}
		if c.flights[key] == fl {
			delete(c.flights, key)
		}
		if fl.ahead {
			c.ahead--
		}
		if key.kind == "list" {
			c.listed(key.t, key.dir, seg, fresh)
		}
		c.mu.Unlock()
		fl.seg, fl.err = seg, err
		close(fl.done)
	}()
	return fl
}

func (c *Cache) leave(key flightKey, fl *flight) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if fl.waiters--; fl.waiters > 0 {
		return
	}
	fl.cancel()
	if c.flights[key] == fl {
		delete(c.flights, key) // nobody joins a request that is being given up
	}
}

// listDenied notes that a folder cannot be listed. Requires c.mu.
func (c *Cache) listDenied(t *table, dir string) {
	f := t.folders[dir]
	if f == nil {
		f = &folder{t: t, prefix: dir}
		t.folders[dir] = f
	}
	f.deniedAt = c.now()
}

// load lists one page of dir behind the cookie.
func (v *View) load(ctx context.Context, dir, after string, a ask) (*segment, error) {
	return v.do(ctx, flightKey{v.t, "list", dir, after}, a, v.lister(dir, after))
}

// lister is what asks for a page.
func (v *View) lister(dir, after string) func(context.Context) (*segment, error) {
	return func(ctx context.Context) (*segment, error) {
		seg := &segment{lo: above(after), page: true, from: after}
		in := source.ListInput{Prefix: dir, After: v.c.listAfter(v.t, dir, after)}
		for {
			page, err := v.src.List(ctx, in)
			if errors.Is(err, object.ErrNotFound) { // a store with folders of its own
				page, err = source.Page{}, nil
			}
			if err != nil {
				return nil, err
			}
			v.hidden(page.Hidden, dir)
			seg.hidden += page.Hidden
			seg.slots = append(seg.slots, slots(page, dir)...)
			if page.Next == "" {
				return seg, nil
			}
			if n := len(seg.slots); n > 0 {
				seg.next = page.Next
				seg.hi = above(seg.slots[n-1].key[len(dir):])
				return seg, nil
			}
			in.After = page.Next // all of it was hidden
		}
	}
}

// listAfter is the After of a list that goes on behind the cookie: what the store said with the
// page that ends there, if that is remembered.
func (c *Cache) listAfter(t *table, dir, cookie string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := t.folders[dir]; f != nil && cookie != "" {
		if seg := f.covering(cookie); seg != nil && seg.hi == above(cookie) && seg.next != "" {
			return seg.next
		}
	}
	return afterOf(cookie)
}

// slots merges a page in key order.
func slots(p source.Page, dir string) []slot {
	out := make([]slot, 0, len(p.Objects)+len(p.Folders))
	for _, o := range p.Objects {
		out = append(out, slotOf(o))
	}
	for _, name := range p.Folders {
		out = append(out, slot{key: dir + name + "/"})
	}
	out = slices.DeleteFunc(out, func(s slot) bool {
		name, ok := strings.CutPrefix(strings.TrimSuffix(s.key, "/"), dir)
		return !ok || !source.ValidName(name)
	})
	slices.SortFunc(out, func(a, b slot) int { return strings.Compare(a.key, b.key) })
	return out
}

func slotOf(o object.Object) slot {
	s := slot{key: o.Key, version: o.Version, size: o.Size}
	if !o.ModTime.IsZero() {
		s.mtime = o.ModTime.UnixNano()
	}
	return s
}

func (v *View) hidden(n int, dir string) {
	if n == 0 {
		return
	}
	v.c.mu.Lock()
	first := !v.c.logged[v.t.store]
	v.c.logged[v.t.store] = true
	v.c.mu.Unlock()
	if first {
		v.c.cfg.Log.Warn("keys that no path can express are hidden; further ones are only counted",
			"store", v.t.store, "prefix", dir, "keys", n)
	}
}

// head asks for the file name.
func (v *View) head(ctx context.Context, dir, name string, a ask) (Entry, error) {
	seg, err := v.do(ctx, flightKey{v.t, "head", dir, name}, a, func(ctx context.Context) (*segment, error) {
		sent := time.Now()
		seg := &segment{lo: name, hi: above(name)}
		o, err := v.src.Head(ctx, dir+name)
		if errors.Is(err, object.ErrNotFound) {
			return seg, nil
		}
		if err != nil {
			return nil, err
		}
		if v.c.cfg.OnHead != nil {
			v.c.cfg.OnHead(o, v.t.principal, sent)
		}
		seg.slots = []slot{slotOf(o)}
		return seg, nil
	})
	if err != nil {
		return Entry{}, err
	}
	if len(seg.slots) == 0 {
		return Entry{At: seg.time()}, object.ErrNotFound
	}
	return v.t.entry(seg.slots[0], name, seg), nil
}

// probe asks for the folder name, by a list of one entry of its parent: that finds an empty
// one too where the store has such.
func (v *View) probe(ctx context.Context, dir, name string, a ask) (Entry, error) {
	seg, err := v.do(ctx, flightKey{v.t, "probe", dir, name}, a, func(ctx context.Context) (*segment, error) {
		seg := &segment{lo: name + "/", hi: above(name + "/")}
		page, err := v.src.List(ctx, source.ListInput{Prefix: dir, After: name + ".\U0010FFFF", Max: 1})
		if errors.Is(err, object.ErrNotFound) {
			return seg, nil
		}
		if err != nil {
			return nil, err
		}
		if slices.Contains(page.Folders, name) {
			seg.slots = []slot{{key: dir + name + "/"}}
		}
		return seg, nil
	})
	if err != nil {
		return Entry{}, err
	}
	if len(seg.slots) == 0 {
		return Entry{At: seg.time()}, object.ErrNotFound
	}
	return Entry{Name: name, Folder: true, At: seg.time()}, nil
}
