package fill

import (
	"context"
	"fmt"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

type headKey struct {
	id        object.ID
	principal object.Principal
}

// head is one request for a grant that several readers wait for.
type head struct {
	cancel  context.CancelFunc
	waiters int // guarded by Fills.mu

	done chan struct{} // closed when err is set
	err  error
}

// Granted reports whether the principal of the reader may have the object's bytes now.
func (r *Reader) Granted() bool {
	return r.f.store.Granted(r.id, r.principal) || r.f.remembers(headKey{r.id, r.principal})
}

// Authorize is for opening: nil if the principal has a grant, or if nothing of the object is here
// but what the principal's own GETs are bringing, because then such a GET is the grant.
// Otherwise the store is asked.
func (r *Reader) Authorize(ctx context.Context) error {
	if r.Granted() {
		return nil
	}
	if r.f.store.Peek(r.id).PresentBytes == 0 && !r.othersBring() {
		return nil
	}
	if err := r.authorize(ctx); err != nil {
		return fmt.Errorf("open %v: %w", r.obj, err)
	}
	return nil
}

// othersBring reports whether another principal is fetching some of the object.
func (r *Reader) othersBring() bool {
	r.f.mu.Lock()
	defer r.f.mu.Unlock()
	for k, c := range r.f.chunks {
		if k.id == r.id && c.fetch.principal != r.principal {
			return true
		}
	}
	return false
}

// authorize returns nil under a grant, for which it asks the store if need be.
func (r *Reader) authorize(ctx context.Context) error {
	if r.Granted() {
		return nil
	}
	f := r.f
	key := headKey{r.id, r.principal}
	f.mu.Lock()
	h := f.heads[key]
	if h == nil {
		if f.closed {
			f.mu.Unlock()
			return errClosed
		}
		h = f.startHead(context.WithoutCancel(ctx), key, r.obj, r.src)
	}
	h.waiters++
	f.mu.Unlock()

	select {
	case <-h.done:
		return h.err
	case <-ctx.Done():
		f.mu.Lock()
		defer f.mu.Unlock()
		if h.waiters--; h.waiters == 0 {
			h.cancel()
			if f.heads[key] == h {
				delete(f.heads, key)
			}
		}
		return fmt.Errorf("wait for a grant: %w", context.Cause(ctx))
	}
}

// startHead requires f.mu.
func (f *Fills) startHead(ctx context.Context, key headKey, obj object.Object, src source.Source) *head {
	h := &head{done: make(chan struct{})}
	ctx, h.cancel = context.WithCancel(ctx)
	f.heads[key] = h
	f.count.heads.Add(1)
	f.wg.Go(func() {
		defer h.cancel()
		h.err = f.ask(ctx, key, obj, src)
		f.mu.Lock()
		if f.heads[key] == h {
			delete(f.heads, key)
		}
		f.mu.Unlock()
		close(h.done)
	})
	return h
}

// ask makes the request and notes what it means.
func (f *Fills) ask(ctx context.Context, key headKey, obj object.Object, src source.Source) error {
	asked := time.Now()
	now, err := src.Head(ctx, obj.Key)
	if object.Refused(err) {
		f.Revoke(key.principal, obj.Store)
	}
	if err != nil {
		return err
	}
	if now.ID() != key.id {
		return object.ErrChanged
	}
	f.granted(obj, key, asked)
	return nil
}

// Grant notes that the store answered a HEAD of the principal with this version, asked at
// that time.
func (f *Fills) Grant(obj object.Object, p object.Principal, asked time.Time) {
	f.granted(obj, headKey{obj.ID(), p}, asked)
}

func (f *Fills) granted(obj object.Object, key headKey, asked time.Time) {
	f.mu.Lock()
	if l, ok := f.lost[key.id]; ok && asked.After(l.at) { // it is back
		delete(f.lost, key.id)
	}
	f.mu.Unlock()
	f.grant(obj, key, asked)
}

// memoryGrant is one for an object for which the cache has no room, so that it has no place
// for its grants either.
type memoryGrant struct {
	store object.Store
	asked time.Time
}

type refusal struct {
	principal object.Principal
	store     object.Store
}

const maxMemoryGrants = 4096

// grant notes that the store answered the principal, asked at that time: with the cache file,
// or until there is one, in memory.
func (f *Fills) grant(obj object.Object, key headKey, asked time.Time) {
	if !f.store.Peek(key.id).Exists {
		f.mu.Lock()
		f.remember(obj, key, asked)
		f.mu.Unlock()
	}
	if f.store.Peek(key.id).Exists { // now, or meanwhile
		f.store.Grant(obj, key.principal, asked)
	}
}

// remember requires f.mu.
func (f *Fills) remember(obj object.Object, key headKey, asked time.Time) {
	if at, ok := f.refused[refusal{key.principal, obj.Store}]; ok && !asked.After(at) {
		return
	}
	for k := range f.grants {
		if len(f.grants) < maxMemoryGrants {
			break
		}
		delete(f.grants, k)
	}
	f.grants[key] = memoryGrant{obj.Store, asked}
}

// keepGrant hands a grant from memory to the cache file that was opened.
func (f *Fills) keepGrant(obj object.Object, key headKey) {
	f.mu.Lock()
	g, ok := f.grants[key]
	f.mu.Unlock()
	if ok {
		f.store.Grant(obj, key.principal, g.asked)
	}
}

func (f *Fills) remembers(key headKey) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	g, ok := f.grants[key]
	return ok && time.Since(g.asked) < f.cfg.GrantTTL
}

// Revoke takes all grants of the principal in the store away, those in the cache included: it
// was refused there.
func (f *Fills) Revoke(p object.Principal, store object.Store) {
	f.store.Revoke(p, store)
	f.count.denied.Add(1)
	now := time.Now()
	f.mu.Lock()
	defer f.mu.Unlock()
	for r, at := range f.refused {
		if now.Sub(at) > time.Hour { // longer than any request takes
			delete(f.refused, r)
		}
	}
	f.refused[refusal{p, store}] = now
	for k, g := range f.grants {
		if k.principal == p && g.store == store {
			delete(f.grants, k)
		}
	}
}
