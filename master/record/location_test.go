package record_test

import (
	"errors"
	"path"
	"strings"
	"testing"

	"github.com/larderfs/larder/master/record"
)

func TestALocationIsAnObjectOrAFolder(t *testing.T) {
	for _, c := range []struct {
		uri, endpoint string
		want          record.Location // without URI and Endpoint
		mistake       string
	}{
		{uri: "s3://b/sales/q1", want: record.Location{Scheme: "s3", Bucket: "b", Path: "sales/q1"}},
		{uri: "s3://b/sales/", want: record.Location{Scheme: "s3", Bucket: "b", Path: "sales", Below: true}},
		{uri: "s3://b", want: record.Location{Scheme: "s3", Bucket: "b"}},
		{uri: "s3://b/", want: record.Location{Scheme: "s3", Bucket: "b", Below: true}},
		{uri: "s3://b/a%20b%3Fc", endpoint: "http://minio:9000", want: record.Location{Scheme: "s3", Bucket: "b", Path: "a b?c"}},
		{uri: "file:///data/t.csv", want: record.Location{Scheme: "file", Path: "/data/t.csv"}},
		{uri: "file:///data/../etc/", want: record.Location{Scheme: "file", Path: "/etc", Below: true}},
		{uri: "s3://b/a?x", mistake: "%3F"},
		{uri: "s3://user:pw@b/a", mistake: "no user"},
		{uri: "s3:///a", mistake: "bucket is missing"},
		{uri: "file://host/a", mistake: "file:///path"},
		{uri: "file:a", mistake: "file:///path"},
		{uri: "hdfs://nn/a", mistake: "hdfs"},
		{uri: "sales/q1", mistake: "scheme"},
		{uri: "s3://b/%zz", mistake: "uri: want"},
		{uri: "file:///a", endpoint: "http://h", mistake: "for s3 only"},
		{uri: "s3://b", endpoint: "http://u:p@h", mistake: "endpoint: want"},
		{uri: "s3://b", endpoint: "minio:9000", mistake: "endpoint: want"},
		{uri: "s3://b/" + strings.Repeat("k", 5000), mistake: "uri: want"},
	} {
		got, err := record.ParseLocation(c.uri, c.endpoint)
		if c.mistake != "" {
			if !errors.Is(err, record.ErrInvalid) || !strings.Contains(err.Error(), c.mistake) || strings.Contains(err.Error(), "pw") {
				t.Errorf("%s: %v; want %q", c.uri, err, c.mistake)
			}
			continue
		}
		c.want.URI, c.want.Endpoint = c.uri, c.endpoint
		if err != nil || got != c.want {
			t.Errorf("%s: %+v, %v; want %+v", c.uri, got, err, c.want)
		}
	}
}

func FuzzALocationIsCleanOrAnError(f *testing.F) {
	f.Add("s3://b/a/b/", "https://h:1")
	f.Add("file:///a/../b", "")
	f.Fuzz(func(t *testing.T, uri, endpoint string) {
		l, err := record.ParseLocation(uri, endpoint)
		if err != nil {
			if !errors.Is(err, record.ErrInvalid) {
				t.Errorf("%q: %v", uri, err)
			}
			return
		}
		switch {
		case l.Scheme == "file" && path.Clean(l.Path) == l.Path && path.IsAbs(l.Path) && l.Bucket == "":
		case l.Scheme == "s3" && l.Bucket != "" && !strings.HasSuffix(l.Path, "/") && !strings.HasPrefix(l.Path, "/"):
		default:
			t.Errorf("%q is %+v", uri, l)
		}
	})
}
