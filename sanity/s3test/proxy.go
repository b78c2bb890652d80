package s3test

import (
	"context"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Kind of a request.
type Kind string

// The kinds; Other is everything that is not about objects.
const (
	List   Kind = "LIST"
	Head   Kind = "HEAD"
	Get    Kind = "GET"
	Put    Kind = "PUT"
	Delete Kind = "DELETE"
	Other  Kind = "OTHER"
)

// Request is one that came through the proxy.
type Request struct {
	Kind      Kind
	Key       string // of an object, or the prefix of a LIST
	Range     string // the header of a GET
	AccessKey string // who signed it; "" if nobody did
	Status    int    // of the answer; 0 while there is none
	Bytes     int64  // of the answer's body
	At        time.Time
}

// Counts of requests since the start or the last ResetCounts.
type Counts struct {
	List, Head, Get, Put, Delete, Other int64
	GetBytes                            int64 // bodies of GETs that were not refused, as sent
}

// Hook sees a request before the gateway does. It answers itself, or calls next, then or
// later, with w or with a writer of its own; it may block (the request's context ends with
// the client or the server).
type Hook func(w http.ResponseWriter, r *http.Request, req Request, next http.Handler)

// maxLogged bounds Requests, for benchmarks that run for long.
const maxLogged = 200_000

type proxy struct {
	bucket string
	next   *httputil.ReverseProxy
	hook   atomic.Pointer[Hook]
	ctx    context.Context // of every request: cancelled by close
	cancel context.CancelFunc

	mu     sync.Mutex // guards the fields below
	counts Counts
	log    []*Request
}

func newProxy(target, bucket string) *proxy {
	u, err := url.Parse(target)
	if err != nil {
		panic(err) // we made it
	}
	p := &proxy{bucket: bucket}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.next = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = u.Scheme, u.Host
			r.Out.URL.RawQuery = r.In.URL.RawQuery
			r.Out.Host = r.In.Host // it is signed
		},
		Transport:     &http.Transport{MaxIdleConnsPerHost: 256, DisableCompression: true, ReadBufferSize: 64 << 10, WriteBufferSize: 64 << 10},
		FlushInterval: -1,
		BufferPool:    &buffers{},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if r.Context().Err() != nil {
				panic(http.ErrAbortHandler)
			}
			http.Error(w, err.Error(), http.StatusBadGateway)
		},
	}
	return p
}

func (p *proxy) close() {
	p.cancel()
	p.next.Transport.(*http.Transport).CloseIdleConnections()
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(p.ctx, cancel)()
	r = r.WithContext(ctx)
	req := p.begin(r)
	seen := *req
	cw := &countingWriter{ResponseWriter: w}
	defer func() { p.end(req, cw) }()
	if hook := p.hook.Load(); hook != nil {
		(*hook)(cw, r, seen, p.next)
		return
	}
	p.next.ServeHTTP(cw, r)
}

func (p *proxy) begin(r *http.Request) *Request {
	req := &Request{At: time.Now(), Range: r.Header.Get("Range"), AccessKey: signer(r)}
	req.Kind, req.Key = classify(r, p.bucket)
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.log) < maxLogged {
		p.log = append(p.log, req)
	}
	switch req.Kind {
	case List:
		p.counts.List++
	case Head:
		p.counts.Head++
	case Get:
		p.counts.Get++
	case Put:
		p.counts.Put++
	case Delete:
		p.counts.Delete++
	default:
		p.counts.Other++
	}
	return req
}

func (p *proxy) end(req *Request, w *countingWriter) {
	p.mu.Lock()
	defer p.mu.Unlock()
	req.Status, req.Bytes = w.status, w.bytes
	if req.Kind == Get && w.status < 300 {
		p.counts.GetBytes += w.bytes
	}
}

// classify tells what a path-style request is about.
func classify(r *http.Request, bucket string) (Kind, string) {
	path, ok := strings.CutPrefix(r.URL.Path, "/"+bucket)
	if !ok || path != "" && path[0] != '/' {
		return Other, ""
	}
	key := strings.TrimPrefix(path, "/")
	q := r.URL.Query()
	switch {
	case key == "" && r.Method == http.MethodGet && (q.Has("list-type") || q.Has("delimiter")):
		return List, q.Get("prefix")
	case key == "":
		return Other, ""
	case r.Method == http.MethodHead:
		return Head, key
	case r.Method == http.MethodGet:
		return Get, key
	case r.Method == http.MethodPut || r.Method == http.MethodPost:
		return Put, key
	case r.Method == http.MethodDelete:
		return Delete, key
	}
	return Other, key
}

func signer(r *http.Request) string {
	scope := r.URL.Query().Get("X-Amz-Credential")
	if _, after, ok := strings.Cut(r.Header.Get("Authorization"), "Credential="); ok {
		scope = after
	}
	id, _, _ := strings.Cut(scope, "/")
	return id
}

// countingWriter sees the status and counts the body.
type countingWriter struct {
	http.ResponseWriter
	status int
	bytes  int64
}

func (w *countingWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *countingWriter) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	n, err := w.ResponseWriter.Write(p)
	w.bytes += int64(n)
	return n, err
}

// Unwrap lets http.ResponseController flush and hijack.
func (w *countingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

type buffers struct{ pool sync.Pool }

func (b *buffers) Get() []byte {
	if p, ok := b.pool.Get().(*[]byte); ok {
		return *p
	}
	return make([]byte, 256<<10)
}

func (b *buffers) Put(p []byte) { b.pool.Put(&p) }

// Counts are the requests that came through the proxy since the last ResetCounts. The
// bytes of a GET are counted when its answer has ended.
func (s *Server) Counts() Counts {
	s.proxy.mu.Lock()
	defer s.proxy.mu.Unlock()
	return s.proxy.counts
}

// Requests are those that came through the proxy since the last ResetCounts, in the order
// they came (the first 200 000 of them).
func (s *Server) Requests() []Request {
	s.proxy.mu.Lock()
	defer s.proxy.mu.Unlock()
	out := make([]Request, len(s.proxy.log))
	for i, r := range s.proxy.log {
		out[i] = *r
	}
	return out
}

// ResetCounts forgets all requests so far.
func (s *Server) ResetCounts() {
	s.proxy.mu.Lock()
	defer s.proxy.mu.Unlock()
	s.proxy.counts, s.proxy.log = Counts{}, nil
}

// SetHook puts h before the gateway; nil takes the last one away.
func (s *Server) SetHook(h Hook) {
	if h == nil {
		s.proxy.hook.Store(nil)
		return
	}
	s.proxy.hook.Store(&h)
}
