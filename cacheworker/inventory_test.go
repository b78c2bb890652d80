package cacheworker

import (
	"net"
	"net/netip"
	"testing"

	"github.com/larderfs/larder/master/record"
)

func TestKeysAtALocation(t *testing.T) {
	for _, c := range []struct {
		uri, host, store string
		in, out          []string // keys; no in at all: the store is not looked into
	}{
		{uri: "s3://b/t", store: "s3://h:9000/b", in: []string{"t", "t/1", "t/x/2"}, out: []string{"t1", "s/t", "T"}},
		{uri: "s3://b/t/", store: "s3://h:9000/b", in: []string{"t/1"}, out: []string{"t", "t1"}},
		{uri: "s3://b", store: "s3://h:9000/b", in: []string{"t", "t/1"}},
		{uri: "s3://b/", host: "h:9000", store: "s3://h:9000/b", in: []string{"t"}},
		{uri: "s3://b/t", host: "other", store: "s3://h:9000/b"},
		{uri: "s3://b/t", store: "s3://h:9000/bb"},
		{uri: "s3://b/t", store: "file:///b"},
		{uri: "file:///data/t", store: "file:///data", in: []string{"t", "t/1"}, out: []string{"tt"}},
		{uri: "file:///data", store: "file:///data", in: []string{"t", "t/1"}},
		{uri: "file:///", store: "file:///data", in: []string{"t"}},
		{uri: "file:///data/sales", store: "file:///data/sales/q1", in: []string{"t"}},
		{uri: "file:///data/t", store: "file:///", in: []string{"data/t", "data/t/1"}, out: []string{"t"}},
		{uri: "file:///dat", store: "file:///data"},
	} {
		at, err := record.ParseLocation(c.uri, "")
		if err != nil {
			t.Fatal(err)
		}
		has := keysAt(at, c.host, c.store)
		if (has == nil) != (c.in == nil) {
			t.Errorf("%s in %s: looked into: %v", c.uri, c.store, has != nil)
			continue
		}
		for _, key := range c.in {
			if !has([]byte(key)) {
				t.Errorf("%s has no %q of %s", c.uri, key, c.store)
			}
		}
		for _, key := range c.out {
			if has([]byte(key)) {
				t.Errorf("%s has %q of %s", c.uri, key, c.store)
			}
		}
	}
}

func TestTheAddressForMastersIsOneThatTheyReach(t *testing.T) {
	any, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer any.Close()
	port := any.Addr().(*net.TCPAddr).AddrPort().Port()
	for _, c := range []struct {
		what string
		n    network
		want string // address; "" for none
	}{
		{"no listener", network{advertise: "10.0.0.1"}, ""},
		{"told", network{l: any, advertise: "10.0.0.1"}, "10.0.0.1"},
		{"towards the master", network{l: any, masters: "127.0.0.1:9"}, "127.0.0.1"},
		{"towards the one of them that has an address", network{l: any, masters: "unix:///m,nosuchhost.invalid:1,127.0.0.1:9"}, "127.0.0.1"},
		{"not known", network{l: any, masters: "unix:///m"}, ""},
	} {
		var want []string
		if c.want != "" {
			want = []string{netip.AddrPortFrom(netip.MustParseAddr(c.want), port).String()}
		}
		if got := c.n.addresses(); len(got) != len(want) || len(got) > 0 && got[0] != want[0] {
			t.Errorf("%s: %v; want %v", c.what, got, want)
		}
	}
}
