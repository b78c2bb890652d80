package s3

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
	"github.com/larderfs/larder/sanity/s3test"
)

func random(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{2}).Read(b)
	return b
}

// fixture is a server with one object, old enough to be asked for once, and a source of it.
type fixture struct {
	srv  *s3test.Server
	src  *Source
	obj  object.Object
	data []byte
}

func newFixture(t *testing.T, change func(*Config)) *fixture {
	t.Helper()
	f := &fixture{srv: s3test.Start(t), data: random(1 << 20)}
	put(t, f.srv, "dir/a", f.data)
	if err := f.srv.Age(time.Hour); err != nil {
		t.Fatal(err)
	}
	f.src = open(t, f.srv, change)
	var err error
	if f.obj, err = f.src.Head(t.Context(), "dir/a"); err != nil {
		t.Fatal(err)
	}
	f.srv.ResetCounts()
	return f
}

func (f *fixture) read(ctx context.Context, off, n int64) ([]byte, error) {
	r, err := f.src.Get(ctx, f.obj, off, n)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

// all asks for the object in each of the three ways.
func (f *fixture) all(ctx context.Context) map[source.Kind]error {
	_, head := f.src.Head(ctx, "dir/a")
	page, list := f.src.List(ctx, source.ListInput{Prefix: "dir/"})
	if list == nil && len(page.Objects) != 1 {
		list = fmt.Errorf("list has %+v", page)
	}
	got, get := f.read(ctx, 0, f.obj.Size)
	if get == nil && !bytes.Equal(got, f.data) {
		get = errors.New("get has other bytes")
	}
	return map[source.Kind]error{source.Head: head, source.List: list, source.Get: get}
}

func TestPassingFaultsAreNotSeen(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.RequestTimeout = 300 * time.Millisecond })
	for name, fault := range map[string]s3test.Hook{
		"500": s3test.Refuse(500, "InternalError"), "503": s3test.Refuse(503, "SlowDown"),
		"429": s3test.Refuse(429, "TooManyRequests"), "502 of a proxy": s3test.Refuse(502, ""),
		"reset": s3test.Reset(), "slow": s3test.Stall(-1), "truncated": s3test.Truncate(100),
	} {
		for _, kind := range []s3test.Kind{s3test.Head, s3test.List, s3test.Get} {
			if name == "truncated" && kind == s3test.Head {
				continue // has no body
			}
			f.srv.SetHook(s3test.Times(2, kind, fault))
			for k, err := range f.all(t.Context()) {
				if err != nil {
					t.Errorf("%s of %s: %s: %v", name, kind, k, err)
				}
			}
		}
	}
}

func TestLastingFaultsAreUnavailableAfterAllAttempts(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.Attempts, c.RequestTimeout = 3, 100*time.Millisecond })
	for name, fault := range map[string]s3test.Hook{
		"503": s3test.Refuse(503, "SlowDown"), "reset": s3test.Reset(), "slow": s3test.Stall(-1),
	} {
		f.srv.ResetCounts()
		f.srv.SetHook(fault)
		for kind, err := range f.all(t.Context()) {
			if !errors.Is(err, object.ErrUnavailable) {
				t.Errorf("%s: %s: %v", name, kind, err)
			}
		}
		c := f.srv.Counts()
		for _, n := range []int64{c.Head, c.List, c.Get} { // net/http itself tries again where a kept connection is reset
			if n < 3 || n > 3 && name != "reset" || n > 6 {
				t.Errorf("%s: %+v; want three attempts of each", name, c)
			}
		}
	}
}

func TestBrokenBodyGoesOnWhereItBroke(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.Attempts, c.IdleTimeout = 3, 200*time.Millisecond })
	for name, fault := range map[string]s3test.Hook{
		"truncated": s3test.Truncate(100_000), // ten times, each with progress: more than Attempts
		"stalled":   s3test.Times(2, s3test.Get, s3test.Stall(100_000)),
	} {
		f.srv.ResetCounts()
		f.srv.SetHook(fault)
		got, err := f.read(t.Context(), 10, f.obj.Size-10)
		if err != nil || !bytes.Equal(got, f.data[10:]) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
		reqs := f.srv.Requests()
		want := fmt.Sprintf("bytes=%d-%d", 100_010, f.obj.Size-1)
		if len(reqs) < 3 || reqs[1].Range != want {
			t.Errorf("%s: the second of %d requests asks for %q, want %q", name, len(reqs), reqs[1].Range, want)
		}
	}
	f.srv.ResetCounts()
	f.srv.SetHook(s3test.Truncate(0))
	if got, err := f.read(t.Context(), 0, f.obj.Size); len(got) != 0 || !errors.Is(err, object.ErrUnavailable) {
		t.Errorf("no progress: %d bytes, %v", len(got), err)
	}
	if c := f.srv.Counts(); c.Get != 3 {
		t.Errorf("no progress: %d attempts", c.Get)
	}
}

func TestBrokenBodyNeverGoesOnWithAnotherVersion(t *testing.T) {
	f := newFixture(t, nil)
	f.srv.SetHook(s3test.Times(1, s3test.Get, s3test.Truncate(1000)))
	r, err := f.src.Get(t.Context(), f.obj, 0, f.obj.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	next := bytes.Clone(f.data)
	next[1<<19]++
	put(t, f.srv, "dir/a", next)
	got, err := io.ReadAll(r)
	if !errors.Is(err, object.ErrChanged) || !bytes.Equal(got, f.data[:len(got)]) || len(got) != 1000 {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if n, err := r.Read(make([]byte, 1)); n != 0 || !errors.Is(err, object.ErrChanged) {
		t.Errorf("a further read: %d, %v", n, err)
	}
}

func TestAnswerThatIsNotWhatWasAskedForIsNotUsed(t *testing.T) {
	f := newFixture(t, nil)
	for _, c := range []struct {
		name   string
		hook   s3test.Hook
		off, n int64
		want   error
	}{
		{"another etag", s3test.SetHeader("ETag", `"00"`), 0, 10, object.ErrUnavailable}, // a HEAD says that it is not changed
		{"no etag", s3test.SetHeader("ETag", ""), 0, 10, object.ErrUnavailable},
		{"another size", s3test.SetHeader("Content-Range", "bytes 0-9/10"), 0, 10, object.ErrUnavailable},
		{"another place", s3test.SetHeader("Content-Range", fmt.Sprintf("bytes 5-14/%d", f.obj.Size)), 0, 10, object.ErrUnavailable},
		{"a range of nothing", s3test.SetHeader("Content-Range", "bytes"), 0, 10, object.ErrUnavailable},
		{"the whole for its end", f.srv.IgnoreRange(), 10, 10, object.ErrUnavailable},
		{"the whole for its beginning", f.srv.IgnoreRange(), 0, 10, nil},
		{"the whole for the whole", f.srv.IgnoreRange(), 0, f.obj.Size, nil},
	} {
		f.srv.SetHook(s3test.Times(100, s3test.Get, c.hook))
		got, err := f.read(t.Context(), c.off, c.n)
		if !errors.Is(err, c.want) || c.want == nil && !bytes.Equal(got, f.data[c.off:c.off+c.n]) {
			t.Errorf("%s: %d bytes, %v; want %v", c.name, len(got), err, c.want)
		}
	}
	f.srv.SetHook(f.srv.IgnoreRange())
	f.obj.Size++
	if got, err := f.read(t.Context(), 0, f.obj.Size); !errors.Is(err, object.ErrChanged) {
		t.Errorf("the whole of another size: %d bytes, %v", len(got), err)
	}
}

func TestAnswersBecomeDecisions(t *testing.T) {
	f := newFixture(t, nil)
	f.src = open(t, f.srv, func(c *Config) { c.Attempts, c.Credentials.SessionToken = 1, "canary-token" })
	for _, c := range []struct {
		status          int
		code            string
		head, list, get error
	}{
		{404, "NoSuchKey", object.ErrNotFound, object.ErrNotFound, object.ErrNotFound},
		{404, "NoSuchBucket", object.ErrNotFound, object.ErrNotFound, object.ErrNotFound},
		{401, "", object.ErrDenied, object.ErrDenied, object.ErrDenied},
		{403, "AccessDenied", object.ErrDenied, object.ErrDenied, object.ErrDenied},
		{403, "InvalidAccessKeyId", object.ErrDenied, object.ErrDenied, object.ErrDenied},
		{400, "ExpiredToken", object.ErrDenied, object.ErrDenied, object.ErrDenied},
		{400, "AuthorizationHeaderMalformed", object.ErrDenied, object.ErrInvalid, object.ErrInvalid},
		{412, "PreconditionFailed", object.ErrChanged, object.ErrChanged, object.ErrChanged},
		{416, "InvalidRange", object.ErrChanged, object.ErrChanged, object.ErrChanged},
		{301, "PermanentRedirect", object.ErrInvalid, object.ErrInvalid, object.ErrInvalid},
		{500, "InternalError", object.ErrUnavailable, object.ErrUnavailable, object.ErrUnavailable},
		{503, "SlowDown", object.ErrUnavailable, object.ErrUnavailable, object.ErrUnavailable},
	} {
		f.srv.SetHook(s3test.Refuse(c.status, c.code))
		got := f.all(t.Context())
		for kind, want := range map[source.Kind]error{source.Head: c.head, source.List: c.list, source.Get: c.get} {
			err := got[kind]
			if !errors.Is(err, want) {
				t.Errorf("%d %s: %s: %v; want %v", c.status, c.code, kind, err, want)
				continue
			}
			parts := []string{string(kind), "dir/", f.srv.Bucket, strings.TrimPrefix(f.srv.Endpoint, "http://"), fmt.Sprint(c.status)}
			if kind != source.Head {
				parts = append(parts, c.code)
			}
			for _, part := range parts {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q does not say %q", err, part)
				}
			}
			for _, secret := range []string{f.srv.AccessKey, f.srv.SecretKey, "canary-token", "injected"} {
				if strings.Contains(err.Error(), secret) {
					t.Errorf("%q says %q", err, secret)
				}
			}
		}
	}
	f.srv.SetHook(s3test.Refuse(403, "InvalidObjectState")) // in an archive: nobody lost a right
	if _, err := f.read(t.Context(), 0, 1); err == nil || errors.Is(err, object.ErrDenied) {
		t.Errorf("archived: %v", err)
	}
}

func TestRedirectIsNotFollowedButExplained(t *testing.T) {
	f := newFixture(t, nil)
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		t.Error("a redirect was followed")
	}))
	defer elsewhere.Close()
	for _, status := range []int{301, 302, 307, 308} {
		f.srv.SetHook(func(w http.ResponseWriter, r *http.Request, req s3test.Request, next http.Handler) {
			w.Header().Set("Location", elsewhere.URL)
			w.Header().Set("X-Amz-Bucket-Region", "eu-north-1")
			s3test.Refuse(status, "PermanentRedirect")(w, r, req, next)
		})
		for kind, err := range f.all(t.Context()) {
			if !errors.Is(err, object.ErrInvalid) || !strings.Contains(err.Error(), "eu-north-1") {
				t.Errorf("%d: %s: %v", status, kind, err)
			}
		}
	}
}

func TestMissingBucketIsNamed(t *testing.T) {
	srv := s3test.Start(t)
	s := open(t, srv, func(c *Config) { c.Bucket = "nosuch" })
	_, err := s.List(t.Context(), source.ListInput{})
	if !errors.Is(err, object.ErrNotFound) || !strings.Contains(err.Error(), "bucket nosuch") {
		t.Errorf("list: %v", err)
	}
}

func TestUnreachableStoreIsUnavailable(t *testing.T) {
	closed := httptest.NewServer(nil)
	closed.Close()
	s, err := New(Config{Bucket: "bucket", Endpoint: closed.URL, PathStyle: true, NodeKey: []byte("n"), Attempts: 2, Backoff: 1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Head(t.Context(), "a"); !errors.Is(err, object.ErrUnavailable) || !strings.Contains(err.Error(), "refused") {
		t.Errorf("head: %v", err)
	}
}

// trickle yields something each interval, and nothing once its context has ended.
type trickle struct {
	ctx      context.Context
	interval time.Duration
}

func (b *trickle) Read(p []byte) (int, error) {
	select {
	case <-time.After(b.interval):
		if len(p) < slowBytes {
			p = p[:1]
		}
		return len(p), nil
	case <-b.ctx.Done():
		return 0, b.ctx.Err()
	}
}

func (b *trickle) Close() error { return nil }

func TestBodyTimesOutOnlyWhileSomebodyWaitsForIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		slow := &trickle{ctx, 3 * time.Second}
		b := &timedBody{ReadCloser: slow, ctx: ctx, cancel: cancel, idle: 10 * time.Second}
		for range 3 {
			if n, err := b.Read(make([]byte, 10)); n != 1 || err != nil {
				t.Errorf("slow, but not yet too slow: %d, %v", n, err)
			}
			time.Sleep(time.Hour) // the reader is busy with something else
		}
		start := time.Now()
		var timeout timeoutError
		if n, err := b.Read(make([]byte, 10)); n != 0 || !errors.As(err, &timeout) || time.Since(start) != time.Second {
			t.Errorf("three bytes in ten seconds: %d, %v after %v", n, err, time.Since(start))
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestBodyMayBeSlowAsLongAsItComes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		b := &timedBody{ReadCloser: &trickle{ctx, 9 * time.Second}, ctx: ctx, cancel: cancel, idle: 10 * time.Second}
		p := make([]byte, slowBytes)
		for range 20 {
			if n, err := b.Read(p); n != len(p) || err != nil {
				t.Fatalf("%d, %v", n, err)
			}
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
}

// An answer for a young object may mix versions (see young); one for an old object cannot,
// and a second request for it would double a cold read's latency.
func TestOnlyYoungObjectsAreConfirmed(t *testing.T) {
	f := newFixture(t, nil)
	if _, err := f.read(t.Context(), 0, 10); err != nil {
		t.Fatal(err)
	}
	if c := f.srv.Counts(); c.Get != 1 || c.Head != 0 {
		t.Errorf("old: %+v", c)
	}
	put(t, f.srv, "dir/a", f.data) // the same etag again
	f.srv.ResetCounts()
	if _, err := f.read(t.Context(), 0, 10); err != nil {
		t.Fatal(err)
	}
	if c := f.srv.Counts(); c.Get != 1 || c.Head != 1 {
		t.Errorf("young: %+v", c)
	}
	f.srv.SetHook(s3test.Times(1, s3test.Get, s3test.Answered(func() { put(t, f.srv, "dir/a", make([]byte, len(f.data))) })))
	if got, err := f.read(t.Context(), 0, 10); !errors.Is(err, object.ErrChanged) {
		t.Errorf("raced: %v, %v", got, err)
	}
}

func TestConnectionsAreReused(t *testing.T) {
	f := newFixture(t, nil)
	peers := make(chan string, 100)
	f.srv.SetHook(func(w http.ResponseWriter, r *http.Request, _ s3test.Request, next http.Handler) {
		peers <- r.RemoteAddr
		next.ServeHTTP(w, r)
	})
	for i := range 20 {
		if _, err := f.read(t.Context(), int64(i), 100_000); err != nil {
			t.Fatal(err)
		}
		if _, err := f.src.Head(t.Context(), "none"); !errors.Is(err, object.ErrNotFound) {
			t.Fatal(err)
		}
	}
	seen := map[string]bool{}
	for range 40 {
		seen[<-peers] = true
	}
	if len(seen) != 1 {
		t.Errorf("40 requests, one after the other, used %d connections", len(seen))
	}
}

// A passing wrong answer is no other version: the store is asked again.
func TestAWrongEtagThatPassesIsNotSeen(t *testing.T) {
	f := newFixture(t, nil)
	for name, hook := range map[string]s3test.Hook{
		"another etag":  s3test.SetHeader("ETag", `"00"`),
		"no etag":       s3test.SetHeader("ETag", ""),
		"another size":  s3test.SetHeader("Content-Range", "bytes 0-9/10"),
		"another place": s3test.SetHeader("Content-Range", fmt.Sprintf("bytes 5-14/%d", f.obj.Size)),
	} {
		f.srv.SetHook(s3test.Times(2, s3test.Get, hook))
		if got, err := f.read(t.Context(), 0, 10); err != nil || !bytes.Equal(got, f.data[:10]) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		f.srv.SetHook(s3test.Times(1, s3test.Get, s3test.Truncate(1000))) // and in the middle of a body
		r, err := f.src.Get(t.Context(), f.obj, 0, f.obj.Size)
		if err != nil {
			t.Fatal(err)
		}
		f.srv.SetHook(s3test.Times(2, s3test.Get, hook))
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, f.data) {
			t.Errorf("%s in the middle: %d bytes, %v", name, len(got), err)
		}
		r.Close()
	}
}

func TestRetryAfterIsKept(t *testing.T) {
	f := newFixture(t, nil)
	in2s := time.Now().Add(2 * time.Second).UTC().Format(http.TimeFormat)
	for _, c := range []struct {
		value   string
		kind    s3test.Kind
		atLeast time.Duration
	}{{"1", s3test.Head, time.Second}, {"1", s3test.Get, time.Second}, {in2s, s3test.List, 0}, {"soon", s3test.Get, 0}} {
		f.srv.ResetCounts()
		f.srv.SetHook(s3test.Times(1, c.kind, s3test.RefuseFor(c.value, 503, "SlowDown")))
		for k, err := range f.all(t.Context()) {
			if err != nil {
				t.Errorf("%s of %s: %s: %v", c.value, c.kind, k, err)
			}
		}
		var at []time.Time
		for _, r := range f.srv.Requests() {
			if r.Kind == c.kind {
				at = append(at, r.At)
			}
		}
		if len(at) != 2 || at[1].Sub(at[0]) < c.atLeast {
			t.Errorf("%s of %s: asked at %v", c.value, c.kind, at)
		}
	}
	for value, want := range map[string]time.Duration{"": 0, "-1": 0, "7": 7 * time.Second, "86400": maxRetryAfter, "99999999999": 0, "Thu, 01 Jan 1970 00:00:00 GMT": 0,
		"Thu, 01 Jan 2970 00:00:00 GMT": maxRetryAfter} {
		if got := retryAfterOf(http.Header{"Retry-After": {value}}); got != want {
			t.Errorf("Retry-After %q: %v; want %v", value, got, want)
		}
	}
}

// A call ends when patience does, however many attempts are left, and says what it met.
func TestPatienceEndsACall(t *testing.T) {
	for name, fault := range map[string]s3test.Hook{"503": s3test.Refuse(503, "SlowDown"), "no answer": s3test.Stall(-1)} {
		f := newFixture(t, func(c *Config) {
			c.Attempts, c.Patience, c.RequestTimeout = 1_000_000, 300*time.Millisecond, 50*time.Millisecond
		})
		f.srv.SetHook(fault)
		for kind, err := range f.all(t.Context()) {
			if !errors.Is(err, object.ErrUnavailable) || !strings.Contains(err.Error(), "within 300ms") || !strings.Contains(err.Error(), "failed") {
				t.Errorf("%s: %s: %v", name, kind, err)
			}
		}
	}
}

// unresolved is a transport for which names do not resolve at first.
func unresolved(n int64) (http.RoundTripper, *atomic.Int64) {
	var dials atomic.Int64
	tr := NewTransport(TransportConfig{})
	dial := tr.DialContext
	tr.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if i := dials.Add(1); i <= n {
			return nil, &net.OpError{Op: "dial", Net: network, Err: &net.DNSError{Err: "no such host", Name: addr, IsNotFound: i%2 == 1}}
		}
		return dial(ctx, network, addr)
	}
	return tr, &dials
}

func TestNamesThatDoNotResolveAreTriedAgain(t *testing.T) {
	tr, dials := unresolved(4)
	f := newFixture(t, func(c *Config) { c.Transport = tr }) // whose HEAD is it that meets them
	if n := dials.Load(); n != 5 {
		t.Errorf("%d dials", n)
	}
	if got, err := f.read(t.Context(), 0, 10); err != nil || !bytes.Equal(got, f.data[:10]) {
		t.Error(err)
	}
	tr, _ = unresolved(1000)
	f.src = open(t, f.srv, func(c *Config) { c.Transport, c.Attempts = tr, 3 })
	for kind, err := range f.all(t.Context()) {
		if !errors.Is(err, object.ErrUnavailable) || !strings.Contains(err.Error(), "no such host") {
			t.Errorf("%s: %v", kind, err)
		}
	}
}

// skewed is a store whose clock is ahead of ours: it wants requests that are signed by its time.
func (f *fixture) skewed(by time.Duration) s3test.Hook {
	creds := aws.Credentials{AccessKeyID: f.srv.AccessKey, SecretAccessKey: f.srv.SecretKey}
	return func(w http.ResponseWriter, r *http.Request, req s3test.Request, next http.Handler) {
		now := time.Now().UTC()
		date := now.Add(by).Format(http.TimeFormat)
		signed, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
		if err != nil || now.Add(by).Sub(signed).Abs() > 15*time.Minute {
			w.Header().Set("Date", date)
			s3test.Refuse(403, "RequestTimeTooSkewed")(w, r, req, next)
			return
		}
		r.Header.Del("Authorization")
		err = v4.NewSigner(func(o *v4.SignerOptions) { o.DisableURIPathEscaping = true }).
			SignHTTP(r.Context(), creds, r, r.Header.Get("X-Amz-Content-Sha256"), "s3", f.srv.Region, now)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		s3test.SetHeader("Date", date)(w, r, req, next)
	}
}

func TestAStoresClockMayBeWrong(t *testing.T) {
	for _, by := range []time.Duration{20 * time.Minute, -3 * time.Hour} {
		f := newFixture(t, nil)
		f.srv.SetHook(f.skewed(by))
		for range 3 {
			for kind, err := range f.all(t.Context()) {
				if err != nil {
					t.Errorf("%v ahead: %s: %v", by, kind, err)
				}
			}
		}
		if n := len(f.srv.Requests()); n > 18 {
			t.Errorf("%v ahead: %d requests for 9 calls", by, n)
		}
		f.srv.SetHook(func(w http.ResponseWriter, r *http.Request, req s3test.Request, next http.Handler) {
			w.Header().Set("Date", time.Now().UTC().Add(rand.N(1000*time.Hour)+time.Hour).Format(http.TimeFormat))
			s3test.Refuse(403, "RequestTimeTooSkewed")(w, r, req, next)
		})
		for kind, err := range f.all(t.Context()) {
			if !errors.Is(err, object.ErrUnavailable) || !strings.Contains(err.Error(), "clock") {
				t.Errorf("a clock that jumps: %s: %v; nobody lost a right", kind, err)
			}
		}
	}
}
