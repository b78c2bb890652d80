package source

import (
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/larderfs/larder/cacheworker/object"
)

// Faulty is a source that fails by script, for the tests of those who use sources. What it
// returns is what a real one returns when its retries have not helped.
type Faulty struct {
	Source

	mu    sync.Mutex // guards the fields below
	seen  map[Kind]int
	rules []rule
}

type rule struct {
	when  When
	fault Fault
}

// NewFaulty wraps next; without rules it changes nothing.
func NewFaulty(next Source) *Faulty {
	return &Faulty{Source: next, seen: map[Kind]int{}}
}

// Call is one call of a source.
type Call struct {
	Kind   Kind
	Key    string // or the prefix of a list
	Off, N int64  // of a Get
	Seq    int    // among the calls of its kind, from 1
}

// When chooses calls.
type When func(Call) bool

// Nth is the n-th call of a kind, counted from 1.
func Nth(kind Kind, n int) When {
	return func(c Call) bool { return c.Kind == kind && c.Seq == n }
}

// Every is all calls of a kind.
func Every(kind Kind) When {
	return func(c Call) bool { return c.Kind == kind }
}

// Fault is what happens to a call. Its parts go together, in this order.
type Fault struct {
	Wait    <-chan struct{} // slow: the call waits until this is closed, or its context ends
	Err     error           // it fails with this: object.ErrUnavailable stands for 5xx and resets
	Version string          // Head and List tell this version; a Get of another one is ErrChanged
	Body    error           // a Get's body fails with this, behind After bytes
	After   int64
}

// On adds a rule. The first rule that matches a call decides.
func (f *Faulty) On(when When, fault Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = append(f.rules, rule{when, fault})
}

// Clear takes all rules away; the numbers of calls go on.
func (f *Faulty) Clear() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = nil
}

// enter counts a call and lets its fault's beginning happen.
func (f *Faulty) enter(ctx context.Context, c Call) (Fault, error) {
	fault := f.find(c)
	if fault.Wait != nil {
		select {
		case <-fault.Wait:
		case <-ctx.Done():
			return fault, context.Cause(ctx)
		}
	}
	if fault.Err != nil {
		return fault, fmt.Errorf("%s %q: injected: %w", c.Kind, c.Key, fault.Err)
	}
	return fault, nil
}

func (f *Faulty) find(c Call) Fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.seen[c.Kind]++
	c.Seq = f.seen[c.Kind]
	for _, r := range f.rules {
		if r.when(c) {
			return r.fault
		}
	}
	return Fault{}
}

// Head asks the wrapped source unless a rule says otherwise.
func (f *Faulty) Head(ctx context.Context, key string) (object.Object, error) {
	fault, err := f.enter(ctx, Call{Kind: Head, Key: key})
	if err != nil {
		return object.Object{}, err
	}
	o, err := f.Source.Head(ctx, key)
	if err == nil && fault.Version != "" {
		o.Version = fault.Version
	}
	return o, err
}

// List asks the wrapped source unless a rule says otherwise.
func (f *Faulty) List(ctx context.Context, in ListInput) (Page, error) {
	fault, err := f.enter(ctx, Call{Kind: List, Key: in.Prefix})
	if err != nil {
		return Page{}, err
	}
	p, err := f.Source.List(ctx, in)
	if fault.Version != "" {
		for i := range p.Objects {
			p.Objects[i].Version = fault.Version
		}
	}
	return p, err
}

// Get asks the wrapped source unless a rule says otherwise.
func (f *Faulty) Get(ctx context.Context, obj object.Object, off, n int64) (io.ReadCloser, error) {
	fault, err := f.enter(ctx, Call{Kind: Get, Key: obj.Key, Off: off, N: n})
	if err != nil {
		return nil, err
	}
	if fault.Version != "" && fault.Version != obj.Version {
		return nil, fmt.Errorf("get %q: injected: %w", obj.Key, object.ErrChanged)
	}
	rc, err := f.Source.Get(ctx, obj, off, n)
	if err != nil || fault.Body == nil {
		return rc, err
	}
	return &brokenBody{ReadCloser: rc, left: fault.After, err: fault.Body}, nil
}

// brokenBody fails with err behind the next left bytes.
type brokenBody struct {
	io.ReadCloser
	left int64
	err  error
}

func (b *brokenBody) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, fmt.Errorf("injected: %w", b.err)
	}
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}
