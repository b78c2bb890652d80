package s3

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

func TestStoreIsEndpointAndBucket(t *testing.T) {
	for _, c := range []struct{ endpoint, region, want string }{
		{"", "", "s3://s3.us-east-1.amazonaws.com/b-1"},
		{"", "eu-north-1", "s3://s3.eu-north-1.amazonaws.com/b-1"},
		{"http://Host:9000", "x", "s3://host:9000/b-1"},
		{"http://host:9000/", "y", "s3://host:9000/b-1"},
		{"https://host:443", "", "s3://host/b-1"},
		{"https://host", "", "s3://host/b-1"},
		{"http://host:80", "", "s3://host/b-1"},
		{"http://host:443", "", "s3://host:443/b-1"},
		{"http://[::1]:9000", "", "s3://[::1]:9000/b-1"},
	} {
		s, err := New(Config{Bucket: "b-1", Endpoint: c.endpoint, Region: c.region, NodeKey: []byte("n")})
		if err != nil || string(s.Store()) != c.want {
			t.Errorf("%q %q: %v, %v; want %s", c.endpoint, c.region, s, err, c.want)
		}
	}
}

func TestMistakesAreNamedAllAtOnce(t *testing.T) {
	_, err := New(Config{Bucket: "a/b", Region: "eu north", Endpoint: "ftp://user:canary@host", Credentials: Credentials{AccessKeyID: "id"}, Ambient: true})
	for _, want := range []string{"bucket", "region", "endpoint", "node key", "secret access key", "worker's own"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("nothing about %s in %v", want, err)
		}
	}
	if !errors.Is(err, object.ErrInvalid) || strings.Contains(err.Error(), "canary") {
		t.Errorf("%v", err)
	}
	for _, endpoint := range []string{"host:9000", "host", "http://", "http://h/path", "http://h?x", "http://h#x", "https://u@h", "://"} {
		if _, err := New(Config{Bucket: "bucket", Endpoint: endpoint, NodeKey: []byte("n")}); !errors.Is(err, object.ErrInvalid) {
			t.Errorf("endpoint %q: %v", endpoint, err)
		}
	}
}

func TestCredentialsDoNotPrint(t *testing.T) {
	c := Credentials{"canary", "canary", "canary"}
	for _, format := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x"} {
		if s := fmt.Sprintf(format, Config{Credentials: c}); strings.Contains(s, "canary") || strings.Contains(s, fmt.Sprintf("%x", "canary")) {
			t.Errorf("%s prints %s", format, s)
		}
	}
}

// An endpoint in the environment is for the AWS tools of whoever started us; taking it would
// read another store than the one we name.
func TestAmbientTakesOnlyTheCredential(t *testing.T) {
	t.Setenv("AWS_ACCESS_KEY_ID", "ambient-id")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "ambient-secret")
	t.Setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
	var signed string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		signed = r.Header.Get("Authorization")
		w.WriteHeader(http.StatusNotFound)
	}))
	defer srv.Close()
	s, err := New(Config{Bucket: "bucket", Endpoint: srv.URL, PathStyle: true, Ambient: true, NodeKey: []byte("n")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Head(t.Context(), "a"); !errors.Is(err, object.ErrNotFound) {
		t.Error(err)
	}
	if !strings.Contains(signed, "ambient-id") || !strings.Contains(signed, "us-east-1") {
		t.Errorf("signed by %s", signed)
	}
	if s.Principal() != source.Ambient([]byte("n")) {
		t.Error("the principal is not the ambient one")
	}
}

// Whoever gave no credential must not read with the worker's.
func TestNoCredentialIsAnonymous(t *testing.T) {
	t.Setenv("AWS_ACCESS_KEY_ID", "ambient-id")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "ambient-secret")
	signed := "not asked"
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		signed = r.Header.Get("Authorization")
		w.WriteHeader(http.StatusForbidden)
	}))
	defer srv.Close()
	s, err := New(Config{Bucket: "bucket", Endpoint: srv.URL, PathStyle: true, NodeKey: []byte("n")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Head(t.Context(), "a"); !errors.Is(err, object.ErrDenied) || signed != "" {
		t.Errorf("%v; signed %q", err, signed)
	}
	if s.Principal() == source.Ambient([]byte("n")) || s.Principal() == (object.Principal{}) {
		t.Error("the principal is the worker or nobody")
	}
}

func TestTransportRefusesLocalAddresses(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("connected") }))
	defer srv.Close()
	_, port, _ := strings.Cut(strings.TrimPrefix(srv.URL, "http://"), ":")
	refusing := NewTransport(TransportConfig{RefuseLoopback: true, RefuseLinkLocal: true})
	for _, host := range []string{"127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "169.254.169.254", "[fe80::1]", "[fd00:ec2::254]", "[::ffff:169.254.169.254]"} {
		s, err := New(Config{Bucket: "bucket", Endpoint: "http://" + host + ":" + port, PathStyle: true, NodeKey: []byte("n"), Transport: refusing})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Head(t.Context(), "a"); !errors.Is(err, object.ErrInvalid) || !strings.Contains(err.Error(), "address") {
			t.Errorf("%s: %v", host, err)
		}
	}
}

// A name may lead to another address each time it is asked for.
func TestANameThatIsBoundAnewLeadsNowhere(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) }))
	defer srv.Close()
	port := srv.URL[strings.LastIndex(srv.URL, ":"):]
	var answer atomic.Value
	tr := NewTransport(TransportConfig{RefuseLinkLocal: true, Resolver: resolver(t, &answer)})
	s, err := New(Config{Bucket: "bucket", Endpoint: "http://rebound.test" + port, PathStyle: true, NodeKey: []byte("n"), Transport: tr})
	if err != nil {
		t.Fatal(err)
	}
	answer.Store([4]byte{127, 0, 0, 1})
	if _, err := s.Head(t.Context(), "a"); !errors.Is(err, object.ErrNotFound) {
		t.Fatalf("at its first address: %v", err)
	}
	answer.Store([4]byte{169, 254, 169, 254})
	tr.CloseIdleConnections()
	if _, err := s.Head(t.Context(), "a"); !errors.Is(err, object.ErrInvalid) || !strings.Contains(err.Error(), "link-local address 169.254.169.254") {
		t.Errorf("at its second address: %v", err)
	}
}

// resolver says for each name the address that it is given.
func resolver(t *testing.T, answer *atomic.Value) *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		here, there := net.Pipe()
		go func() { // ends with the resolver's connection
			defer there.Close()
			for {
				var head [2]byte
				if _, err := io.ReadFull(there, head[:]); err != nil {
					return
				}
				q := make([]byte, binary.BigEndian.Uint16(head[:]))
				if _, err := io.ReadFull(there, q); err != nil {
					return
				}
				end := 12
				for q[end] != 0 {
					end += int(q[end]) + 1
				}
				end += 5 // the name's end, type and class
				isA := binary.BigEndian.Uint16(q[end-4:]) == 1
				a := append(append([]byte{}, q[:2]...), 0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0)
				a = append(a, q[12:end]...)
				if addr := answer.Load().([4]byte); isA {
					a[7] = 1
					a = append(append(a, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4), addr[:]...)
				}
				if _, err := there.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(a))), a...)); err != nil {
					return
				}
			}
		}()
		return here, nil
	}}
}

// Nor does a store's or token service's redirect.
func TestARedirectToALinkLocalAddressIsNotFollowed(t *testing.T) {
	var asked atomic.Int64
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		http.Redirect(w, r, "http://169.254.169.254/latest/meta-data/iam/security-credentials/", http.StatusTemporaryRedirect)
	}))
	defer srv.Close()
	var dialed atomic.Value
	tr := NewTransport(TransportConfig{})
	dial := tr.DialContext
	tr.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		dialed.Store(addr)
		return dial(ctx, network, addr)
	}
	s, err := New(Config{Bucket: "bucket", Endpoint: srv.URL, PathStyle: true, NodeKey: []byte("n"), Transport: tr})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Head(t.Context(), "a"); !errors.Is(err, object.ErrInvalid) {
		t.Errorf("head: %v", err)
	}
	session, err := NewSession(SessionConfig{RoleARN: "arn:aws:iam::1:role/r", Name: "n2", Endpoint: srv.URL, Transport: tr})
	if err != nil {
		t.Fatal(err)
	}
	session.SetToken("canary")
	if err := session.Prove(t.Context()); !errors.Is(err, object.ErrInvalid) || strings.Contains(err.Error(), "canary") {
		t.Errorf("session: %v", err)
	}
	if asked.Load() < 2 || dialed.Load() != strings.TrimPrefix(srv.URL, "http://") {
		t.Errorf("asked %d times; dialed %v last", asked.Load(), dialed.Load())
	}
}
