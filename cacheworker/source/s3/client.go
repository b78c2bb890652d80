package s3

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"syscall"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
	"github.com/larderfs/larder/cacheworker/telemetry"
)

// TransportConfig of the connections to stores.
type TransportConfig struct {
	Proxy           func(*http.Request) (*url.URL, error) // nil means none
	RefuseLoopback  bool                                  // connect to no loopback address
	RefuseLinkLocal bool                                  // connect to no link-local one, where clouds keep their metadata
	MaxIdlePerHost  int                                   // 0 means 256
	Resolver        *net.Resolver                         // nil means the system's
}

// NewTransport makes connections that suit many ranged GETs at once. Addresses are refused
// after names have been resolved, so that no name can lead there. Redirects are never followed.
func NewTransport(cfg TransportConfig) *http.Transport {
	if cfg.MaxIdlePerHost == 0 {
		cfg.MaxIdlePerHost = 256
	}
	dialer := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second, Control: cfg.control, Resolver: cfg.Resolver}
	return &http.Transport{
		Proxy:               cfg.Proxy,
		DialContext:         dialer.DialContext,
		TLSHandshakeTimeout: 10 * time.Second,
		TLSNextProto:        map[string]func(string, *tls.Conn) http.RoundTripper{}, // one connection per GET beats HTTP/2 here
		MaxIdleConnsPerHost: cfg.MaxIdlePerHost,
		IdleConnTimeout:     30 * time.Second,
		DisableCompression:  true, // or bytes would not be those of the object
		ReadBufferSize:      64 << 10,
		WriteBufferSize:     4 << 10,
	}
}

// awsMetadataV6 is not link-local although its IPv4 twin is.
var awsMetadataV6 = netip.MustParseAddr("fd00:ec2::254")

func (cfg TransportConfig) control(_, address string, _ syscall.RawConn) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("%w: address %s", object.ErrInvalid, address)
	}
	a := ap.Addr().Unmap().WithZone("")
	if cfg.RefuseLoopback && (a.IsLoopback() || a.IsUnspecified()) {
		return fmt.Errorf("%w: endpoint leads to the loopback address %s", object.ErrInvalid, a)
	}
	if cfg.RefuseLinkLocal && (a.IsLinkLocalUnicast() || a.IsMulticast() || a == awsMetadataV6) {
		return fmt.Errorf("%w: endpoint leads to the link-local address %s", object.ErrInvalid, a)
	}
	return nil
}

// client sends single requests of the SDK: it bounds the wait for the answer's beginning and
// for each piece of its body, not for the whole.
type client struct {
	next          http.RoundTripper
	request, idle time.Duration
	observer      source.Observer
	guard         *source.Guard
}

// timeoutError is retried by the SDK, because it has this method.
type timeoutError string

func (e timeoutError) Error() string { return string(e) }
func (e timeoutError) Timeout() bool { return true }

// Do sends one request. It does not follow redirects.
func (c *client) Do(req *http.Request) (*http.Response, error) {
	pass, err := c.guard.Enter(req.Context())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	late := time.AfterFunc(c.request, func() { cancel(timeoutError(fmt.Sprintf("no answer within %v", c.request))) })
	start, kind := time.Now(), kindOf(req)
	ctx, span := telemetry.Child(ctx, "store.request")
	span.Text("kind", string(kind))
	resp, err := c.next.RoundTrip(req.WithContext(ctx))
	late.Stop()
	if err != nil {
		err = cause(ctx, err)
		if req.Context().Err() != nil || errors.Is(err, object.ErrInvalid) {
			pass.Canceled()
		} else {
			pass.Failed(err, 0)
		}
		span.End(&err)
		cancel(err)
		c.observer.Requested(kind, time.Since(start), source.NoAnswer)
		return nil, err
	}
	if inTrouble(resp.StatusCode) {
		pass.Failed(fmt.Errorf("HTTP %s", resp.Status), retryAfterOf(resp.Header))
	} else {
		pass.OK()
	}
	c.observer.Requested(kind, time.Since(start), source.OutcomeOf(resp.StatusCode))
	span.Event("answer")
	span.Int("status", int64(resp.StatusCode))
	b := &timedBody{ReadCloser: resp.Body, ctx: ctx, cancel: cancel, idle: c.idle, span: span}
	if kind == source.Get && resp.StatusCode < 300 {
		b.observer = c.observer
	}
	resp.Body = b
	return resp, nil
}

func kindOf(req *http.Request) source.Kind {
	if req.Method == http.MethodHead {
		return source.Head
	}
	if req.URL.Query().Has("list-type") {
		return source.List
	}
	return source.Get
}

// cause is the timeout that ended ctx, or err.
func cause(ctx context.Context, err error) error {
	var t timeoutError
	if errors.As(context.Cause(ctx), &t) {
		return t
	}
	return err
}

// slowBytes have to come within the idle timeout, or a body is as good as broken off.
const slowBytes = 256 << 10

// timedBody ends with an error when its reader has waited for the idle timeout and got less than slowBytes. A
// body that nobody reads waits as long as it likes.
type timedBody struct {
	io.ReadCloser
	ctx      context.Context // of the request
	cancel   context.CancelCauseFunc
	idle     time.Duration
	timer    *time.Timer
	waited   time.Duration   // for the bytes
	got      int             // that came since
	span     telemetry.Span  // of the request, which the body's end ends
	observer source.Observer // nil for bodies that are not an object's
}

func (b *timedBody) Read(p []byte) (int, error) {
	if left := max(0, b.idle-b.waited); b.timer == nil {
		b.timer = time.AfterFunc(left, func() { b.cancel(timeoutError(fmt.Sprintf("next to nothing came for %v", b.idle))) })
	} else {
		b.timer.Reset(left)
	}
	start := time.Now()
	n, err := b.ReadCloser.Read(p)
	b.timer.Stop()
	b.waited += time.Since(start)
	if b.got += n; b.got >= slowBytes {
		b.waited, b.got = 0, 0
	}
	if b.observer != nil && n > 0 {
		b.observer.Received(n)
	}
	if err != nil && err != io.EOF {
		err = cause(b.ctx, err)
	}
	return n, err
}

func (b *timedBody) Close() error {
	if b.timer != nil {
		b.timer.Stop()
	}
	err := b.ReadCloser.Close()
	b.span.End(nil)
	b.cancel(context.Canceled)
	return err
}
