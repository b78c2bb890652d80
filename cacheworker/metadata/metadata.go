// Package metadata remembers what the under stores said about names.
//
// Every answer carries when the store was asked, and nobody is given one that is older than
// it allows. What one principal was told is never told to another; within one principal all
// volumes share answers and requests, so that twenty of them make the traffic of one.
//
// What is known of a folder is a set of intervals of its names (see [segment]): a page of a
// LIST is one, the answer of a HEAD is one of a single name. Within an interval a name that
// is not there does not exist.
package metadata

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

const (
	defaultMaxEntries = 1_000_000
	listLimit         = 1024             // entries of one List at most
	loneHeads         = 3                // HEADs in the unlisted part of a folder before it is listed there
	deniedMemory      = 10 * time.Minute // for so long a folder whose LIST was refused is not listed for a Lookup
	maxTables         = 1024             // above that, those that hold nothing are dropped
)

// Config of a [Cache]. The zero value works.
type Config struct {
	MaxEntries int // remembered over all views; 0 means 1 000 000

	// OnDenied is told that the store refused a LIST or HEAD of this principal, after its
	// entries are forgotten: its grants there are lost. Called without locks.
	OnDenied func(object.Principal, object.Store)

	// OnHead is told that the store answered this principal's HEAD, asked at that time: a
	// grant. Called without locks.
	OnHead func(object.Object, object.Principal, time.Time)

	Log *slog.Logger // nil discards
}

// Cache holds the answers of all stores and principals.
type Cache struct {
	cfg   Config
	start time.Time // origin of segment.at

	mu      sync.Mutex // guards everything below and all tables; never held while asking a store
	seq     uint64     // counts requests sent, asks and invalidations: what came later is greater
	tables  map[tableKey]*table
	lru     list.List // of *segment, youngest in front
	flights map[flightKey]*flight
	ahead   int                   // flights that nobody waited for when they began
	logged  map[object.Store]bool // hidden keys were reported
	stats   Stats
}

// Stats are counters since the start, and Entries and Hidden as they are now.
type Stats struct {
	Entries  int    // remembered, absent names included
	Hidden   int    // keys among them that no path can express
	Shadowed uint64 // files left out of a list because a folder has their name
	Hits     uint64 // lookups and lists answered without a request
	Misses   uint64
	Lists    uint64 // requests
	Heads    uint64
	Evicted  uint64 // entries

	Flights      int // now, requests
	AheadFlights int // of them, for what nobody waits for yet
}

type tableKey struct {
	store     object.Store
	principal object.Principal
}

// table is what one principal knows of one store.
type table struct {
	tableKey
	folders map[string]*folder // by prefix
	begun   begun
}

// View reads one store as one principal. Views of the same store and principal share
// everything.
type View struct {
	c   *Cache
	t   *table
	src source.Source
}

// Entry is one name in a folder.
type Entry struct {
	Name   string
	Folder bool
	Object object.Object // of a file
	At     time.Time     // when the store was asked
}

// Cookie is the after of a [View.List] that goes on behind the entry.
func (e Entry) Cookie() string {
	if e.Folder {
		return e.Name + "/"
	}
	return e.Name
}

// New returns an empty cache.
func New(cfg Config) *Cache {
	if cfg.MaxEntries <= 0 {
		cfg.MaxEntries = defaultMaxEntries
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Cache{
		cfg:     cfg,
		start:   time.Now(),
		tables:  map[tableKey]*table{},
		flights: map[flightKey]*flight{},
		logged:  map[object.Store]bool{},
	}
}

// View returns a view that asks through src.
func (c *Cache) View(src source.Source) *View {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := tableKey{src.Store(), src.Principal()}
	t := c.tables[k]
	if t == nil {
		if len(c.tables) >= maxTables {
			c.dropTables()
		}
		t = &table{tableKey: k, folders: map[string]*folder{}}
		c.tables[k] = t
	}
	return &View{c: c, t: t, src: src}
}

// dropTables forgets the tables that hold nothing: credentials come and go. A view of one goes on with it alone.
// Requires c.mu.
func (c *Cache) dropTables() {
	for k, t := range c.tables {
		if len(t.folders) == 0 {
			delete(c.tables, k)
		}
	}
}

// Stats returns the counters.
func (c *Cache) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.stats
	s.Flights, s.AheadFlights = len(c.flights), c.ahead
	return s
}

// Check asks the store whether prefix ("" or ending in "/") can be listed. A prefix without
// keys is an empty folder where the store has no folders of its own.
func (v *View) Check(ctx context.Context, prefix string) error {
	_, err := v.src.List(ctx, source.ListInput{Prefix: prefix, Max: 1})
	if object.Refused(err) {
		v.c.denied(v.t)
	}
	if err != nil {
		return fmt.Errorf("check %s/%s: %w", v.t.store, prefix, err)
	}
	return nil
}

// Lookup finds name in the folder dir ("" or ending in "/", the full key prefix). The answer
// is at most maxAge old; with maxAge 0 the store is asked after the call began. A name
// that does not exist is object.ErrNotFound, and that is remembered too (the entry's At says when
// the store was asked, if it was). A folder hides a
// file of the same name as soon as it is known; a HEAD alone does not look for it.
func (v *View) Lookup(ctx context.Context, dir, name string, maxAge time.Duration) (Entry, error) {
	e, err := v.lookup(ctx, dir, name, maxAge)
	if err != nil {
		return Entry{At: e.At}, fmt.Errorf("look up %s/%s%s: %w", v.t.store, dir, name, err)
	}
	return e, nil
}

func (v *View) lookup(ctx context.Context, dir, name string, maxAge time.Duration) (Entry, error) {
	if !source.ValidName(name) {
		return Entry{}, object.ErrNotFound
	}
	k := v.c.known(v.t, dir, name, maxAge)
	switch {
	case k.answered:
		return k.entry, k.err
	case k.single:
		return v.askOne(ctx, dir, name, k)
	}
	page, err := v.load(ctx, dir, k.after, k.ask)
	if err != nil && !errors.Is(err, object.ErrDenied) {
		return Entry{}, err
	}
	if err == nil {
		if e, err, ok := v.in(page, dir, name); ok {
			return e, err
		}
	}
	return v.askOne(ctx, dir, name, k)
}

// knowledge is what [Cache.known] found out about a name: an answer, or how to get one.
type knowledge struct {
	answered bool
	entry    Entry
	err      error

	ask    ask
	single bool   // ask for the name alone
	folder bool   // it was a folder: ask for that first
	after  string // otherwise list behind this cookie
}

func (c *Cache) known(t *table, dir, name string, maxAge time.Duration) (k knowledge) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k.ask = c.newAsk(maxAge)
	f := t.folders[dir]
	if f == nil {
		c.stats.Misses++
		k.single = maxAge <= 0
		return k
	}
	file, folder := f.find(name), f.find(name+"/")
	k.folder = folder.present
	if k.answered = k.decide(t, name, file, folder); k.answered {
		c.stats.Hits++
		c.touch(file.seg)
		c.touch(folder.seg)
		return k
	}
	c.stats.Misses++
	switch {
	case maxAge <= 0:
		k.single = true
	case file.void() || folder.void():
		k.ask, k.single = ask{seq: max(file.voidSeq(), folder.voidSeq())}, true // whatever was sent after the invalidation will do
	case c.now()-f.deniedAt < deniedMemory:
		k.single = true
	case file.seg != nil && file.seg.page:
		k.after = file.seg.from
	case file.seg != nil || f.lone < loneHeads && len(f.segs) > 0:
		f.lone++
		k.single = true
	case len(f.segs) > 0:
		k.after = justBefore(name)
	}
	return k
}

// decide makes an answer of two facts, if they are fresh enough.
func (k *knowledge) decide(t *table, name string, file, folder fact) bool {
	switch {
	case k.ask.accepts(folder.seg) && folder.present:
		k.entry = Entry{Name: name, Folder: true, At: folder.seg.time()}
	case k.ask.accepts(file.seg) && file.present:
		k.entry = t.entry(file.slot, name, file.seg)
	case k.ask.accepts(file.seg) && k.ask.accepts(folder.seg):
		k.entry.At, k.err = earlier(file.seg.time(), folder.seg.time()), object.ErrNotFound
	default:
		return false
	}
	return true
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// in looks name up in a page; ok is false where the page does not say.
func (v *View) in(page *segment, dir, name string) (e Entry, err error, ok bool) {
	one := &folder{prefix: dir, segs: []*segment{page}}
	k := knowledge{}
	file, folder := one.find(name), one.find(name+"/")
	switch {
	case folder.seg == nil && !file.present, file.seg == nil && !folder.present:
		return Entry{}, nil, false
	}
	ok = k.decide(v.t, name, file, folder)
	return k.entry, k.err, ok
}

// askOne asks for one name: a HEAD for a file, then a LIST of one for a folder, the other
// way round where it was a folder.
func (v *View) askOne(ctx context.Context, dir, name string, k knowledge) (Entry, error) {
	first, then := v.head, v.probe
	if k.folder {
		first, then = v.probe, v.head
	}
	a, err := first(ctx, dir, name, k.ask)
	if !errors.Is(err, object.ErrNotFound) && !(k.folder && errors.Is(err, object.ErrDenied)) {
		return a, err
	}
	b, err := then(ctx, dir, name, k.ask)
	if errors.Is(err, object.ErrNotFound) {
		b.At = earlier(a.At, b.At)
	}
	return b, err
}

// List returns entries of dir behind after, in key order: at least one, unless that was the
// end. After is "" or the [Entry.Cookie] of an entry (a plain name will do as long as its folder
// is remembered). Files that a folder hides are left out.
func (v *View) List(ctx context.Context, dir, after string, maxAge time.Duration) (entries []Entry, more bool, err error) {
	entries, more, err = v.list(ctx, dir, after, maxAge)
	if err != nil {
		return nil, false, fmt.Errorf("list %s/%s: %w", v.t.store, dir, err)
	}
	return entries, more, nil
}

func (v *View) list(ctx context.Context, dir, after string, maxAge time.Duration) ([]Entry, bool, error) {
	c := v.c
	c.mu.Lock()
	a := c.newAsk(maxAge)
	if f := v.t.folders[dir]; f != nil && after != "" && f.find(after+"/").present {
		after += "/"
	}
	v.reading(dir, after, a)
	c.mu.Unlock()

	var extra []*segment // loaded by this call: counts even if it was evicted meanwhile
	for {
		r := c.gather(v.t, dir, after, a, extra)
		entries, held := v.visible(r)
		done := r.end && held == ""
		if len(entries) > 0 || done {
			c.count(len(extra) == 0)
			return entries, !done, nil
		}
		if held != "" && len(extra) > 0 { // a page more did not tell either: a name and thousands of name-… behind it
			_, err := v.probe(ctx, dir, held, a)
			if errors.Is(err, object.ErrNotFound) {
				return v.only(r, held), true, nil
			}
			if err != nil {
				return nil, false, err
			}
			after = held
			continue
		}
		for cookie := cookieBefore(r.key); ; {
			page, err := v.load(ctx, dir, cookie, r.ask)
			if err != nil {
				return nil, false, err
			}
			extra = append(extra, page)
			if below(r.key, page.hi) {
				break
			}
			cookie = cookieBefore(page.hi)
		}
	}
}

func (c *Cache) count(hit bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if hit {
		c.stats.Hits++
	} else {
		c.stats.Misses++
	}
}

// region is what is known behind a cookie without a gap.
type region struct {
	items []item
	key   string // where it ends: what sorts below is in it
	end   bool   // it reaches the end of the folder
	ask   ask    // what a page behind it must satisfy
}

type item struct {
	slot
	name string // with "/" for a folder
	seg  *segment
}

// gather collects what is remembered behind after, and in extra where nothing is.
func (c *Cache) gather(t *table, dir, after string, a ask, extra []*segment) region {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := region{key: above(after), ask: a}
	f := t.folders[dir]
	for len(r.items) < listLimit && !r.end {
		var seg *segment
		if f != nil {
			seg = f.covering(r.key)
		}
		if seg != nil && seg.void {
			r.ask = ask{seq: max(a.seq, seg.seq)}
		}
		if !a.accepts(seg) {
			seg = newest(extra, r.key)
		}
		if seg == nil {
			break
		}
		c.touch(seg)
		for _, s := range seg.onward(r.key, len(dir)) {
			r.items = append(r.items, item{s, s.key[len(dir):], seg})
		}
		r.end = seg.hi == ""
		r.key = seg.hi
	}
	return r
}

// newest returns the newest of the segments that hold key.
func newest(segs []*segment, key string) (n *segment) {
	for _, s := range segs {
		if s.lo <= key && below(key, s.hi) && (n == nil || s.seq > n.seq) {
			n = s
		}
	}
	return n
}

// visible makes entries of a region, up to the first file of which the region does not tell
// whether a folder hides it: held.
func (v *View) visible(r region) (entries []Entry, held string) {
	entries = make([]Entry, 0, len(r.items))
	folders := map[string]bool{}
	for _, it := range r.items {
		if n, ok := strings.CutSuffix(it.name, "/"); ok {
			folders[n] = true
		}
	}
	shadowed := uint64(0)
	for _, it := range r.items {
		n, isFolder := strings.CutSuffix(it.name, "/")
		switch {
		case isFolder:
			entries = append(entries, Entry{Name: n, Folder: true, At: it.seg.time()})
		case folders[n]:
			shadowed++
		case !r.end && n+"/" >= r.key:
			held = n
		default:
			entries = append(entries, v.t.entry(it.slot, n, it.seg))
		}
		if held != "" {
			break
		}
	}
	if shadowed > 0 {
		v.c.mu.Lock()
		v.c.stats.Shadowed += shadowed
		v.c.mu.Unlock()
	}
	return entries, held
}

func (v *View) only(r region, name string) []Entry {
	for _, it := range r.items {
		if it.name == name {
			return []Entry{v.t.entry(it.slot, name, it.seg)}
		}
	}
	return nil
}

// Invalidate says that what is known of name is wrong (a read met another version): the
// next Lookup asks the store, whatever its maxAge.
func (v *View) Invalidate(dir, name string) {
	c := v.c
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seq++
	void := func(key string) {
		c.insert(v.t, dir, &segment{lo: key, hi: above(key), void: true, at: c.now(), seq: c.seq, cache: c})
	}
	if f := v.t.folders[dir]; f != nil && f.find(name+"/").present {
		void(name + "/")
	}
	void(name)
}

// ask is what an answer must satisfy.
type ask struct {
	seq    uint64        // sent later than this is always new enough
	oldest time.Duration // and so is what was sent not before this, if aged
	aged   bool
}

// newAsk requires c.mu.
func (c *Cache) newAsk(maxAge time.Duration) ask {
	c.seq++
	return ask{seq: c.seq, oldest: c.now() - maxAge, aged: maxAge > 0}
}

func (a ask) fresh(seq uint64, at time.Duration) bool {
	return seq > a.seq || a.aged && at >= a.oldest
}

func (a ask) accepts(s *segment) bool { return s != nil && !s.void && a.fresh(s.seq, s.at) }

func (c *Cache) now() time.Duration { return time.Since(c.start) }

func (t *table) entry(s slot, name string, seg *segment) Entry {
	o := object.Object{Store: t.store, Key: s.key, Version: s.version, Size: s.size}
	if s.mtime != 0 {
		o.ModTime = time.Unix(0, s.mtime).UTC()
	}
	return Entry{Name: name, Object: o, At: seg.time()}
}

// above is the smallest key greater than the cookie: a list behind it begins there.
func above(cookie string) string {
	if cookie == "" {
		return ""
	}
	return cookie + "\x00"
}

// cookieBefore is a cookie behind which a list has key and what follows, and little else.
func cookieBefore(key string) string {
	if cookie, ok := strings.CutSuffix(key, "\x00"); ok || key == "" {
		return cookie
	}
	return justBefore(key)
}

// justBefore is a cookie with name behind it and hardly anything between.
func justBefore(name string) string {
	r, n := utf8.DecodeLastRuneInString(name)
	cut := name[:len(name)-n]
	if r <= ' ' || !utf8.ValidRune(r-1) || r == utf8.RuneError {
		return cut
	}
	return cut + string(r-1) + "\U0010FFFF"
}

// afterOf is the After of a source's list that goes on behind the cookie.
func afterOf(cookie string) string {
	if n, ok := strings.CutSuffix(cookie, "/"); ok {
		return source.AfterName(n, true)
	}
	return cookie
}
