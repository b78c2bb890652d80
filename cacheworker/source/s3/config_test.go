package s3

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
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
