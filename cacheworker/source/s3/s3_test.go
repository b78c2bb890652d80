package s3

import (
	"bytes"
	"io"
	"testing"

	"github.com/larderfs/larder/cacheworker/source"
	"github.com/larderfs/larder/sanity/s3test"
)

func open(t *testing.T, srv *s3test.Server, change func(*Config)) *Source {
	t.Helper()
	cfg := Config{
		Bucket: srv.Bucket, Endpoint: srv.Endpoint, Region: srv.Region, PathStyle: true,
		Credentials: Credentials{AccessKeyID: srv.AccessKey, SecretAccessKey: srv.SecretKey},
		NodeKey:     []byte("node"),
	}
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSmoke(t *testing.T) {
	srv := s3test.Start(t)
	s := open(t, srv, nil)
	data := bytes.Repeat([]byte("0123456789"), 300000)
	for _, k := range []string{"a/b c+d%", "a/z/q", "a/é", "b"} {
		if _, err := srv.Put(k, data); err != nil {
			t.Fatal(err)
		}
	}
	o, err := s.Head(t.Context(), "a/b c+d%")
	if err != nil {
		t.Fatal(err)
	}
	t.Log(o)
	r, err := s.Get(t.Context(), o, 7, 2_000_000)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(got, data[7:2_000_007]) {
		t.Fatal(len(got), err)
	}
	r.Close()
	p, err := s.List(t.Context(), source.ListInput{Prefix: "a/"})
	t.Log(p, err)
	p, err = s.List(t.Context(), source.ListInput{Prefix: "a/", Max: 1})
	t.Log(p, err)
	for p.Next != "" {
		p, err = s.List(t.Context(), source.ListInput{Prefix: "a/", Max: 1, After: p.Next})
		t.Log(p, err)
	}
	p, err = open(t, srv, nil).List(t.Context(), source.ListInput{Prefix: "a/", After: source.AfterName("z", true)})
	t.Log(p, err)
	p, err = open(t, srv, nil).List(t.Context(), source.ListInput{Prefix: "a/", After: "z.\U0010FFFF", Max: 1})
	t.Log(p, err)
	_, err = s.Head(t.Context(), "nope")
	t.Log(err)
	o.Version = "00"
	_, err = s.Get(t.Context(), o, 0, 1)
	t.Log(err)
	_, err = open(t, srv, func(c *Config) { c.Credentials.SecretAccessKey = "x" }).Get(t.Context(), o, 0, 1)
	t.Log(err)
	_, err = open(t, srv, func(c *Config) { c.Bucket = "nosuch" }).List(t.Context(), source.ListInput{})
	t.Log(err)
	_, err = open(t, srv, func(c *Config) { c.Endpoint = "http://127.0.0.1:1" }).List(t.Context(), source.ListInput{})
	t.Log(err)
	t.Logf("%+v", srv.Counts())
}
