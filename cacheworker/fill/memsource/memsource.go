// Package memsource is an under store in memory, for tests: it keeps the promises of
// source.Source, counts its requests, and lets a test hold or fail each of them.
package memsource

import (
	"bytes"
	"cmp"
	"context"
	"crypto/md5"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

// Request is one that a source was asked.
type Request struct {
	Kind      source.Kind
	Principal object.Principal
	Key       string // or the prefix of a list
	After     string // of a list
	Off, N    int64  // of a GET
}

// Store holds files. The zero value is an empty one with pages of 1000.
type Store struct {
	PageSize int // entries of a list

	// Before, if set, is called before each request is answered, without locks; its error is the
	// answer.
	Before func(context.Context, Request) error

	// Reading, if set, is called before each piece of a GET's body, of which n bytes were read.
	Reading func(ctx context.Context, r Request, n int64) error
	Piece   int // bytes of the body at once; 0 means 64 KiB

	mu       sync.Mutex // guards the fields below
	files    map[string]file
	sorted   map[string][]string // names by prefix, until something is written
	requests []Request
}

type file struct {
	data    []byte
	version string
	mtime   time.Time
}

// SetBefore changes Before while requests may be under way.
func (s *Store) SetBefore(f func(context.Context, Request) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.Before = f
}

// Put writes a file.
func (s *Store) Put(key string, data []byte) object.Object {
	sum := md5.Sum(data)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.files == nil {
		s.files = map[string]file{}
	}
	f := file{data, hex.EncodeToString(sum[:]), time.Now()}
	s.files[key] = f
	s.sorted = nil
	return f.object(key)
}

// Get returns a file; ok is false if there is none.
func (s *Store) Get(key string) (data []byte, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, ok := s.files[key]
	return f.data, ok
}

// Delete removes a file.
func (s *Store) Delete(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.files, key)
	s.sorted = nil
}

// Requests returns what was asked since the last call.
func (s *Store) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.requests
	s.requests = nil
	return r
}

// Count is how many of the requests are of the kind.
func Count(rs []Request, kind source.Kind) (n int) {
	for _, r := range rs {
		if r.Kind == kind {
			n++
		}
	}
	return n
}

// Source reads the store as the principal of that name.
func (s *Store) Source(principal string) *Source {
	src := &Source{s: s}
	copy(src.principal[:], principal)
	return src
}

// Source reads a [Store].
type Source struct {
	s         *Store
	principal object.Principal
}

// Store is the same for all memory stores.
func (m *Source) Store() object.Store { return "memory://test" }

// Principal is the name that was given.
func (m *Source) Principal() object.Principal { return m.principal }

func (m *Source) ask(ctx context.Context, r Request) error {
	r.Principal = m.principal
	m.s.mu.Lock()
	m.s.requests = append(m.s.requests, r)
	m.s.mu.Unlock()
	m.s.mu.Lock()
	before := m.s.Before
	m.s.mu.Unlock()
	if before != nil {
		if err := before(ctx, r); err != nil {
			return err
		}
	}
	return context.Cause(ctx)
}

func (m *Source) file(key string) (file, error) {
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	f, ok := m.s.files[key]
	if !ok {
		return file{}, fmt.Errorf("%w: %s", object.ErrNotFound, key)
	}
	return f, nil
}

func (f file) object(key string) object.Object {
	return object.Object{Store: "memory://test", Key: key, Version: f.version, Size: int64(len(f.data)), ModTime: f.mtime}
}

// Head implements source.Source.
func (m *Source) Head(ctx context.Context, key string) (object.Object, error) {
	if err := source.CheckKey(key); err != nil {
		return object.Object{}, err
	}
	if err := m.ask(ctx, Request{Kind: source.Head, Key: key}); err != nil {
		return object.Object{}, err
	}
	f, err := m.file(key)
	return f.object(key), err
}

// List implements source.Source.
func (m *Source) List(ctx context.Context, in source.ListInput) (source.Page, error) {
	if err := source.CheckPrefix(in.Prefix); err != nil {
		return source.Page{}, err
	}
	if err := m.ask(ctx, Request{Kind: source.List, Key: in.Prefix, After: in.After}); err != nil {
		return source.Page{}, err
	}
	limit := cmp.Or(in.Max, m.s.PageSize, 1000)
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	var p source.Page
	last, n := "", 0
	names := m.s.names(in.Prefix)
	first, _ := slices.BinarySearch(names, in.After)
	for _, name := range names[max(0, first-1):] { // one before: it may be the folder that After lies in
		name, isFolder := strings.CutSuffix(name, "/")
		behind := source.AfterName(name, isFolder)
		if behind <= in.After {
			continue
		}
		if n == limit {
			p.Next = last
			break
		}
		last = behind
		switch {
		case !source.ValidName(name):
			p.Hidden++
			continue
		case isFolder:
			p.Folders = append(p.Folders, name)
		default:
			key := in.Prefix + name
			p.Objects = append(p.Objects, m.s.files[key].object(key))
		}
		n++
	}
	return p, nil
}

// names are those directly below prefix in key order, with "/" behind folders. Requires s.mu.
func (s *Store) names(prefix string) []string {
	if names, ok := s.sorted[prefix]; ok {
		return names
	}
	var names []string
	for key := range s.files {
		rest, ok := strings.CutPrefix(key, prefix)
		if !ok || rest == "" {
			continue
		}
		if name, _, folder := strings.Cut(rest, "/"); folder {
			rest = name + "/"
		}
		names = append(names, rest)
	}
	slices.Sort(names)
	names = slices.Compact(names)
	if s.sorted == nil {
		s.sorted = map[string][]string{}
	}
	s.sorted[prefix] = names
	return names
}

// Get implements source.Source.
func (m *Source) Get(ctx context.Context, obj object.Object, off, n int64) (io.ReadCloser, error) {
	if err := errors.Join(source.CheckKey(obj.Key), source.CheckRange(obj, off, n)); err != nil {
		return nil, err
	}
	r := Request{Kind: source.Get, Key: obj.Key, Off: off, N: n}
	if err := m.ask(ctx, r); err != nil {
		return nil, err
	}
	f, err := m.file(obj.Key)
	if err != nil {
		return nil, err
	}
	if f.version != obj.Version || int64(len(f.data)) != obj.Size {
		return nil, fmt.Errorf("%w: %v is now %s", object.ErrChanged, obj, f.version)
	}
	return &body{ctx: ctx, s: m.s, r: r, data: bytes.NewReader(f.data[off : off+n])}, nil
}

type body struct {
	ctx  context.Context // of the request, as in net/http
	s    *Store
	r    Request
	data *bytes.Reader
}

func (b *body) Read(p []byte) (int, error) {
	if b.s.Reading != nil {
		if err := b.s.Reading(b.ctx, b.r, b.r.N-int64(b.data.Len())); err != nil {
			return 0, err
		}
	}
	if err := context.Cause(b.ctx); err != nil {
		return 0, err
	}
	return b.data.Read(p[:min(len(p), cmp.Or(b.s.Piece, 64<<10))])
}

func (b *body) Close() error { return nil }
