// Package shaper is a proxy before an S3 server that gives it an object store's manners: the
// first byte of an answer comes late, a connection is only so fast, and so are all together.
//
// No byte passes before its time on its connection and on the link. It passes without being
// copied into this process (splice), because whoever measures shares the processors with it. Requests
// are counted by kind. It is for reading: a request with a body is refused.
package shaper

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"
)

// Limits of what passes. The zero value has none.
type Limits struct {
	FirstByte      time.Duration // from the request to the first byte of its answer
	ConnectionRate float64       // bytes a second; 0 means any
	LinkRate       float64       // of all connections together
}

// Kind of a request.
type Kind string

// The kinds; Other is everything that is not about objects.
const (
	List  Kind = "LIST"
	Head  Kind = "HEAD"
	Get   Kind = "GET"
	Other Kind = "OTHER"
)

// Request is one that came.
type Request struct {
	Kind  Kind
	Key   string // of an object, or the prefix of a LIST
	Range string // the header of a GET
	Bytes int64  // of the answer's body that were sent
	At    time.Time
}

// Proxy stands before one server.
type Proxy struct {
	Endpoint string

	target   string // host:port
	listener *net.TCPListener
	ctx      context.Context // of every connection: ended by Close
	cancel   context.CancelFunc
	wg       sync.WaitGroup
	link     clock

	mu     sync.Mutex // guards the fields below
	limits Limits
	log    []*Request
	conns  map[net.Conn]struct{}
}

// Listen starts a proxy before the server at endpoint, "http://host:port", on a free loopback port.
func Listen(endpoint string) (*Proxy, error) {
	u, err := url.Parse(endpoint)
	if err != nil {
		return nil, err
	}
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, err
	}
	p := &Proxy{Endpoint: "http://" + l.Addr().String(), target: u.Host, listener: l, conns: map[net.Conn]struct{}{}}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.wg.Go(p.accept)
	return p, nil
}

// Close ends all connections.
func (p *Proxy) Close() error {
	p.cancel()
	err := p.listener.Close()
	p.mu.Lock()
	for c := range p.conns {
		c.Close()
	}
	p.mu.Unlock()
	p.wg.Wait()
	return err
}

// Shape sets the limits of requests that come from now on.
func (p *Proxy) Shape(l Limits) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.limits = l
}

// Take returns the requests since the last call, in the order they came.
func (p *Proxy) Take() []Request {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]Request, len(p.log))
	for i, r := range p.log {
		out[i] = *r
	}
	p.log = nil
	return out
}

// Count is how many of the requests are of the kind, and the bytes of their answers.
func Count(rs []Request, kind Kind) (n int, bytes int64) {
	for _, r := range rs {
		if r.Kind == kind {
			n++
			bytes += r.Bytes
		}
	}
	return n, bytes
}

func (p *Proxy) accept() {
	for {
		c, err := p.listener.AcceptTCP()
		if err != nil {
			return // closed
		}
		p.wg.Go(func() { p.serve(c) })
	}
}

// keep has Close close the connection; false: that was already.
func (p *Proxy) keep(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx.Err() != nil {
		c.Close()
		return false
	}
	p.conns[c] = struct{}{}
	return true
}

func (p *Proxy) drop(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
	c.Close()
}

// serve passes the requests of one connection on, over one of its own. Whatever goes wrong ends both: the
// client sees a broken connection, as it would without us.
func (p *Proxy) serve(client *net.TCPConn) {
	if !p.keep(client) {
		return
	}
	defer p.drop(client)
	var d net.Dialer
	c, err := d.DialContext(p.ctx, "tcp", p.target)
	if err != nil || !p.keep(c) {
		return
	}
	defer p.drop(c)
	pair := &pair{p: p, client: client, server: c.(*net.TCPConn), answers: bufio.NewReader(c)}
	requests := bufio.NewReader(client)
	for {
		req, err := http.ReadRequest(requests)
		if err != nil || !pair.pass(req) {
			return
		}
	}
}

// note logs a request and returns the limits for it.
func (p *Proxy) note(req *http.Request, at time.Time) (*Request, Limits) {
	r := &Request{Range: req.Header.Get("Range"), At: at}
	r.Kind, r.Key = classify(req)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.log = append(p.log, r)
	return r, p.limits
}

// classify tells what a path-style request is about.
func classify(req *http.Request) (Kind, string) {
	_, key, _ := strings.Cut(strings.TrimPrefix(req.URL.Path, "/"), "/")
	q := req.URL.Query()
	switch {
	case key == "" && req.Method == http.MethodGet && (q.Has("list-type") || q.Has("delimiter")):
		return List, q.Get("prefix")
	case key != "" && req.Method == http.MethodGet:
		return Get, key
	case key != "" && req.Method == http.MethodHead:
		return Head, key
	}
	return Other, key
}

// sent counts bytes of a request's answer.
func (p *Proxy) sent(r *Request, n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r.Bytes += n
}

// until waits for a moment; false: the proxy is closed.
func (p *Proxy) until(at time.Time) bool {
	d := time.Until(at)
	if d <= 0 {
		return p.ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-p.ctx.Done():
		return false
	}
}

// pair is a client's connection and ours to the server.
type pair struct {
	p              *Proxy
	client, server *net.TCPConn
	answers        *bufio.Reader // of server
	clock          clock
}

const (
	firstPiece = 16 << 10 // the first byte does not wait for more than this
	nextPiece  = 256 << 10
)

// pass sends a request to the server and its answer back, and reports whether both connections are good for
// another one.
func (c *pair) pass(req *http.Request) bool {
	at := time.Now()
	logged, limits := c.p.note(req, at)
	if req.ContentLength != 0 {
		fmt.Fprintf(c.client, "HTTP/1.1 501 Not Implemented\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
		return false
	}
	if _, err := c.server.Write(head(req)); err != nil {
		return false
	}
	resp, err := http.ReadResponse(c.answers, req)
	if err != nil || !c.p.until(at.Add(limits.FirstByte)) {
		return false
	}
	if !c.answer(resp, logged, limits) {
		return false
	}
	return !req.Close && !resp.Close
}

// head is the request as it came; what is signed is unchanged.
func head(req *http.Request) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: %s\r\n", req.Method, req.RequestURI, req.Host)
	req.Header.Write(&b)
	b.WriteString("\r\n")
	return b.Bytes()
}

func (c *pair) answer(resp *http.Response, logged *Request, limits Limits) bool {
	var b bytes.Buffer
	if resp.ContentLength < 0 { // in pieces of the server's making
		if resp.Write(&b) != nil {
			return false
		}
		return c.write(b.Bytes(), int64(b.Len()), logged, limits)
	}
	fmt.Fprintf(&b, "HTTP/1.1 %s\r\n", resp.Status)
	resp.Header.Write(&b)
	b.WriteString("\r\n")
	left := resp.ContentLength
	if resp.Request.Method == http.MethodHead {
		left = 0
	}
	n := min(left, int64(c.answers.Buffered()))
	io.CopyN(&b, c.answers, n) // cannot fail: it is there
	if !c.write(b.Bytes(), n, logged, limits) {
		return false
	}
	return c.body(left-n, logged, limits)
}

// write sends what is in memory, of which body bytes count.
func (c *pair) write(b []byte, body int64, logged *Request, limits Limits) bool {
	if !c.wait(int64(len(b)), limits) {
		return false
	}
	_, err := c.client.Write(b)
	c.p.sent(logged, body)
	return err == nil
}

// body moves the rest of an answer from one connection to the other, piece by piece.
func (c *pair) body(left int64, logged *Request, limits Limits) bool {
	for piece := int64(firstPiece); left > 0; piece = nextPiece {
		n := min(piece, left)
		if !c.wait(n, limits) {
			return false
		}
		moved, err := io.CopyN(c.client, c.server, n)
		c.p.sent(logged, moved)
		if err != nil {
			return false
		}
		left -= n
	}
	return true
}

// wait returns when n more bytes may be sent.
func (c *pair) wait(n int64, limits Limits) bool {
	now := time.Now()
	at := c.clock.reserve(now, n, limits.ConnectionRate)
	if link := c.p.link.reserve(now, n, limits.LinkRate); link.After(at) {
		at = link
	}
	return c.p.until(at)
}

// clock is when something of limited speed has sent what was asked of it.
type clock struct {
	mu   sync.Mutex // guards next
	next time.Time
}

// late is how far a clock may lag behind the real one, so that a timer that wakes late costs no speed.
const late = 3 * time.Millisecond

// reserve returns the time at which n more bytes have passed.
func (c *clock) reserve(now time.Time, n int64, rate float64) time.Time {
	if rate <= 0 {
		return now
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if earliest := now.Add(-late); c.next.Before(earliest) {
		c.next = earliest
	}
	c.next = c.next.Add(time.Duration(float64(n) / rate * float64(time.Second)))
	return c.next
}
