package record

import (
	"encoding/json"
	"errors"
	"net/url"
	"slices"
	"strings"
	"testing"
)

func TestMountsAreNormalised(t *testing.T) {
	m, err := ParseMount(Mount{Path: "/sales/", URI: "s3://bucket/p/", Options: map[string]string{"endpoint": "HTTPS://S3.Example.COM:443/"},
		AllowInline: []string{"b", " a", "b", ""}, Credential: "secret:larder-system/keys"})
	if err != nil || m.Path != "/sales" || m.URI != "s3://bucket/p" || m.Options["endpoint"] != "https://s3.example.com" || !slices.Equal(m.AllowInline, []string{"a", "b"}) {
		t.Errorf("%+v, %v", m, err)
	}
	again, err := ParseMount(m)
	if err != nil || !again.Equal(m) {
		t.Errorf("parsed again: %+v, %v", again, err)
	}
}

func TestWhatIsWrongWithAMountIsSaid(t *testing.T) {
	good := func() Mount { return Mount{Path: "/a", URI: "s3://bucket"} }
	for _, c := range []struct {
		change func(*Mount)
		want   string
	}{
		{func(m *Mount) { m.Path = "a" }, "absolute"},
		{func(m *Mount) { m.Path = "/a/../b" }, `".."`},
		{func(m *Mount) { m.Path = "/a//b" }, "empty name"},
		{func(m *Mount) { m.Path = "/a//" }, "empty name"},
		{func(m *Mount) { m.Path = "/a\x00b" }, "control character"},
		{func(m *Mount) { m.Path = "/" + strings.Repeat("x", 256) }, "longer than 255"},
		{func(m *Mount) { m.URI = "hdfs://x/y" }, "want s3://"},
		{func(m *Mount) { m.URI = "s3://user:hunter2@bucket/x" }, "no bucket name"},
		{func(m *Mount) { m.URI = "s3://bucket/a/../b" }, `".."`},
		{func(m *Mount) { m.URI = "file://host/x" }, "three slashes"},
		{func(m *Mount) { m.URI = "s3://bucket/a/%2e%2e/b" }, `".."`},
		{func(m *Mount) { m.URI = "file:///a/%2E%2E/b" }, `".."`},
		{func(m *Mount) { m.URI = "s3://bucket/a%2fb" }, "no name has a slash"},
		{func(m *Mount) { m.URI = "s3://bucket/a?b" }, "write it as %3F"},
		{func(m *Mount) { m.URI = "s3://bucket/a%zz" }, "hexadecimal"},
		{func(m *Mount) { m.URI = "s3://bucket/a%00" }, "control character"},
		{func(m *Mount) { m.Options = map[string]string{"endpont": "x"} }, "the options are endpoint"},
		{func(m *Mount) { m.Options = map[string]string{"endpoint": "http://169.254.169.254"} }, "endpoint"},
		{func(m *Mount) { m.Options = map[string]string{"endpoint": "http://[fe80::1]"} }, "endpoint"},
		{func(m *Mount) { m.Options = map[string]string{"endpoint": "http://[fd00:ec2::254]"} }, "endpoint"},
		{func(m *Mount) { m.Options = map[string]string{"endpoint": "http://[::ffff:169.254.169.254]"} }, "endpoint"},
		{func(m *Mount) { m.Options = map[string]string{"endpoint": "http://u:p@host"} }, "endpoint"},
		{func(m *Mount) { m.Options = map[string]string{"endpoint": "http://host/%2e%2e"} }, "endpoint"},
		{func(m *Mount) { m.Options = map[string]string{"region": "evil.example/#"} }, "region"},
		{func(m *Mount) { m.Options = map[string]string{"region": "eu_west"} }, "region"},
		{func(m *Mount) { m.Options = map[string]string{"secretAccessKey": "hunter2"} }, "credential"},
		{func(m *Mount) { m.URI, m.Options = "file:///x", map[string]string{"region": "eu"} }, "only for s3"},
		{func(m *Mount) { m.Options = map[string]string{"ttl": "soon"} }, "such as 24h"},
		{func(m *Mount) { m.Options = map[string]string{"ttl": "-1h"} }, "such as 24h"},
		{func(m *Mount) { m.Options = map[string]string{"ttl": "10ms"} }, "1s at least"},
		{func(m *Mount) { m.Credential = "hunter2hunter2" }, "never the credential itself"},
		{func(m *Mount) { m.Credential = "secret:a" }, "secret:namespace/name"},
		{func(m *Mount) { m.Credential = "file:/a/../b" }, "file:/path"},
		{func(m *Mount) { m.Credential = "env:lower" }, "env:PREFIX_"},
		{func(m *Mount) { m.AllowInline = []string{"Team"} }, "allow-inline"},
		{func(m *Mount) { m.AllowClass = []string{"*", "a"} }, "stands alone"},
	} {
		m := good()
		c.change(&m)
		_, err := ParseMount(m)
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v; want %q in it", m, err, c.want)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("the error repeats a secret: %v", err)
		}
	}
	if _, err := ParseMount(Mount{Path: "x", URI: "y", Credential: "z"}); err == nil || strings.Count(err.Error(), "want") != 3 {
		t.Errorf("not all mistakes at once: %v", err)
	}
}

// A record that an older master wrote has no list of namespaces.
func TestAnOldRecordOfAMount(t *testing.T) {
	var m Mount
	if err := json.Unmarshal([]byte(`{"path":"/a","uri":"s3://bucket/p","options":{"region":"eu-west-1"}}`), &m); err != nil {
		t.Fatal(err)
	}
	if err := m.Validate(); err != nil || m.Allows(true, "x") || !m.Allows(false, "x") || !m.Allows(false, "") {
		t.Errorf("%+v, %v", m, err)
	}
}

// What is accepted is in its normal form, can be parsed again, and keeps to the rules of paths.
func FuzzParseMount(f *testing.F) {
	f.Add("/sales/", "s3://bucket/p/", "http://h:80", "eu", "true", "secret:a/b", "a,b", "*")
	f.Add("/", "file:///", "", "", "", "", "", "")
	f.Add("/a/..", "s3://b/../c", "https://[::1]:443/", "", "x", "file:/etc/x", "-", "a")
	f.Add("/ü", "s3://a..b", "http://u:p@h", "e", "false", "env:A_", "*,a", "")
	f.Fuzz(func(t *testing.T, path, uri, endpoint, region, style, credential, inline, class string) {
		m := Mount{Path: path, URI: uri, Credential: credential, AllowInline: strings.Split(inline, ","), AllowClass: strings.Split(class, ",")}
		for name, value := range map[string]string{OptionEndpoint: endpoint, OptionRegion: region, OptionPathStyle: style} {
			if value != "" {
				if m.Options == nil {
					m.Options = map[string]string{}
				}
				m.Options[name] = value
			}
		}
		got, err := ParseMount(m)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("%v is no ErrInvalid", err)
			}
			return
		}
		if again, err := ParseMount(got); err != nil || !again.Equal(got) {
			t.Errorf("%+v parsed again: %+v, %v", got, again, err)
		}
		for name := range strings.SplitSeq(strings.TrimPrefix(got.Path, "/"), "/") {
			if got.Path != "/" && (name == "" || name == "." || name == ".." || len(name) > maxSegment || strings.ContainsRune(name, 0)) {
				t.Errorf("path %q has the name %q", got.Path, name)
			}
		}
		u, err := url.Parse(got.URI)
		if err != nil || u.RawQuery != "" || u.Fragment != "" || u.User != nil || strings.Contains(u.Path+"/", "/../") || strings.Contains(u.Path, "//") || strings.Contains(u.Path, "\x00") {
			t.Errorf("uri %q leads to %+v, %v", got.URI, u, err)
		}
		c, err := ParseCredential(got.Credential)
		if err != nil || c.String() != got.Credential {
			t.Errorf("credential %q: %v, %v", got.Credential, c, err)
		}
		b, err := json.Marshal(got)
		var back Mount
		if err == nil {
			err = json.Unmarshal(b, &back)
		}
		if err != nil || !back.Equal(got) {
			t.Errorf("as JSON %s: %+v, %v", b, back, err)
		}
	})
}
