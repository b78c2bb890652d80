package driver

import (
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
)

func testRules(t testing.TB) rules {
	t.Helper()
	r, err := newRules("/srv/data", []string{"https://S3.Example.com:443/", "http://127.0.0.1:9000"})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

type attrs = map[string]string

func TestParametersHaveDefaults(t *testing.T) {
	q, err := testRules(t).parse("v", attrs{"source": "s3://bucket/a/b/"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := request{Volume: brokerwire.Volume{
		ID: "v", Source: "s3://bucket/a/b", Layout: brokerwire.LayoutFull, Freshness: time.Minute,
		Complete: brokerwire.CompleteAuto, FileMode: 0o444, DirMode: 0o555,
	}, Binding: BindingShared}
	if q != want {
		t.Errorf("got  %+v\nwant %+v", q, want)
	}
}

func TestEveryParameterIsRead(t *testing.T) {
	q, err := testRules(t).parse("v", attrs{
		"source": "s3://bucket", "endpoint": "HTTPS://Store.Example.COM:443/", "region": "eu-central-1", "pathStyle": "false",
		"layout": "data", "freshness": "0", "complete": "always", "binding": "node",
		"uid": "1000", "gid": "4294967294", "fileMode": "0440", "dirMode": "550",
		"csi.storage.k8s.io/pod.name": "p", "csi.storage.k8s.io/ephemeral": "false", "storage.kubernetes.io/csiProvisionerIdentity": "x",
	}, attrs{"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_SESSION_TOKEN": "token", "OTHER": "of the same Secret"})
	if err != nil {
		t.Fatal(err)
	}
	want := request{Volume: brokerwire.Volume{
		ID: "v", Source: "s3://bucket", Endpoint: "https://store.example.com", Region: "eu-central-1",
		Layout: brokerwire.LayoutData, Complete: brokerwire.CompleteAlways,
		UID: 1000, GID: 4294967294, FileMode: 0o440, DirMode: 0o550,
		Credentials: brokerwire.Credentials{AccessKeyID: "id", SecretAccessKey: "secret", SessionToken: "token"},
	}, Binding: BindingNode}
	if q != want {
		t.Errorf("got  %+v\nwant %+v", q, want)
	}
}

func TestAnEndpointOfOnesOwnMeansPathStyle(t *testing.T) {
	q, err := testRules(t).parse("v", attrs{"source": "s3://bucket", "endpoint": "http://minio:9000"}, nil)
	if err != nil || !q.PathStyle {
		t.Errorf("pathStyle=%v err=%v; want true, nil", q.PathStyle, err)
	}
}

func TestMistakesAreNamed(t *testing.T) {
	const inline = "csi.storage.k8s.io/ephemeral"
	for _, c := range []struct {
		name    string
		attrs   attrs
		secrets attrs
		text    string // of the error
	}{
		{"no source", attrs{}, nil, "source: missing"},
		{"typo", attrs{"source": "s3://bkt", "sorce": "x"}, nil, `unknown parameter "sorce"; the nearest known one is source`},
		{"swapped letters", attrs{"source": "s3://bkt", "fiel-mode": "x"}, nil, `unknown parameter "fiel-mode"; the nearest known one is fileMode`},
		{"case", attrs{"source": "s3://bkt", "PATHSTYLE": "true"}, nil, `unknown parameter "PATHSTYLE"; the nearest known one is pathStyle`},
		{"credential as parameter", attrs{"source": "s3://bkt", "AWS_ACCESS_KEY_ID": "canary"}, nil, `unknown parameter "AWS_ACCESS_KEY_ID"`},
		{"scheme", attrs{"source": "s3a://bkt"}, nil, "source: its scheme"},
		{"no bucket", attrs{"source": "s3:///x"}, nil, "source: no bucket name"},
		{"userinfo", attrs{"source": "s3://canary:canary@bkt/x"}, nil, "source: no bucket name"},
		{"dots", attrs{"source": "s3://bkt/a/../b"}, nil, `source: prefix: a segment ".."`},
		{"dot", attrs{"source": "s3://bkt/."}, nil, `source: prefix: a segment "."`},
		{"empty segment", attrs{"source": "s3://bkt/a//b"}, nil, "source: prefix: an empty segment"},
		{"NUL", attrs{"source": "s3://bkt/a\x00b"}, nil, "source: prefix: contains NUL"},
		{"not UTF-8", attrs{"source": "s3://bkt/\xff"}, nil, "source: prefix: not UTF-8"},
		{"long segment", attrs{"source": "s3://bkt/" + strings.Repeat("a", 256)}, nil, "source: prefix: a segment longer than 255"},
		{"long source", attrs{"source": "s3://bkt/" + strings.Repeat("a/", 1025)}, nil, "source: longer than"},
		{"file outside", attrs{"source": "file:///srv/database"}, nil, "source: not below the directory given with --file-root"},
		{"file escapes", attrs{"source": "file:///srv/data/../x"}, nil, `source: a segment ".."`},
		{"file with host", attrs{"source": "file://host/srv/data"}, nil, "source: not an absolute path"},
		{"file inline", attrs{"source": "file:///srv/data", inline: "true"}, nil, "source: file:// is not for inline volumes"},
		{"file with endpoint", attrs{"source": "file:///srv/data", "endpoint": "http://h"}, nil, "endpoint: only for s3://"},
		{"endpoint without scheme", attrs{"source": "s3://bkt", "endpoint": "minio:9000"}, nil, "endpoint: not a URL"},
		{"endpoint with password", attrs{"source": "s3://bkt", "endpoint": "http://u:canary@h"}, nil, "endpoint: credentials belong in the Secret"},
		{"endpoint with path", attrs{"source": "s3://bkt", "endpoint": "http://h/x"}, nil, "endpoint: only scheme, host and port"},
		{"endpoint with query", attrs{"source": "s3://bkt", "endpoint": "http://h?canary"}, nil, "endpoint: only scheme, host and port"},
		{"endpoint's port", attrs{"source": "s3://bkt", "endpoint": "http://h:65536"}, nil, "endpoint: its port"},
		{"endpoint's host", attrs{"source": "s3://bkt", "endpoint": "http://[fe80::1%25eth0]"}, nil, "endpoint: no host"},
		{"inline endpoint", attrs{"source": "s3://bkt", "endpoint": "http://other", inline: "true"}, nil, "endpoint: not allowed for inline volumes"},
		{"inline link-local", attrs{"source": "s3://bkt", "endpoint": "http://169.254.169.254", inline: "true"}, nil, "endpoint: not allowed for inline volumes"},
		{"inline loopback", attrs{"source": "s3://bkt", "endpoint": "http://127.0.0.1:9001", inline: "true"}, nil, "endpoint: not allowed for inline volumes"},
		{"inline node", attrs{"source": "s3://bkt", "binding": "node", inline: "true"}, nil, "binding: node is for StorageClasses"},
		{"region", attrs{"source": "s3://bkt", "region": "evil.example/#"}, nil, "region: "},
		{"pathStyle", attrs{"source": "s3://bkt", "pathStyle": "yes"}, nil, `pathStyle: "yes" is neither true nor false`},
		{"layout", attrs{"source": "s3://bkt", "layout": "both"}, nil, `layout: "both" is none of [full data]`},
		{"complete", attrs{"source": "s3://bkt", "complete": "Auto"}, nil, `complete: "Auto" is none of [auto never always]`},
		{"binding", attrs{"source": "s3://bkt", "binding": "zone"}, nil, `binding: "zone" is none of [shared node]`},
		{"freshness", attrs{"source": "s3://bkt", "freshness": "60"}, nil, `freshness: "60" is not a duration`},
		{"negative freshness", attrs{"source": "s3://bkt", "freshness": "-1s"}, nil, `freshness: "-1s" is not a duration`},
		{"uid", attrs{"source": "s3://bkt", "uid": "4294967295"}, nil, `uid: "4294967295" is not a number from 0 to 4294967294`},
		{"gid", attrs{"source": "s3://bkt", "gid": "-1"}, nil, `gid: "-1" is not a number`},
		{"fileMode", attrs{"source": "s3://bkt", "fileMode": "0888"}, nil, `fileMode: "0888" is not an octal mode`},
		{"dirMode", attrs{"source": "s3://bkt", "dirMode": "4755"}, nil, `dirMode: "4755" is not an octal mode`},
		{"ephemeral", attrs{"source": "s3://bkt", inline: "1"}, nil, inline + `: "1" is neither true nor false`},
		{"id alone", attrs{"source": "s3://bkt"}, attrs{"AWS_ACCESS_KEY_ID": "canary"}, "the Secret has AWS_ACCESS_KEY_ID but no AWS_SECRET_ACCESS_KEY"},
		{"secret alone", attrs{"source": "s3://bkt"}, attrs{"AWS_SECRET_ACCESS_KEY": "canary"}, "the Secret has AWS_SECRET_ACCESS_KEY but no AWS_ACCESS_KEY_ID"},
		{"token alone", attrs{"source": "s3://bkt"}, attrs{"AWS_SESSION_TOKEN": "canary"}, "the Secret has AWS_SESSION_TOKEN but no AWS_ACCESS_KEY_ID"},
		{"line break", attrs{"source": "s3://bkt"}, attrs{"AWS_ACCESS_KEY_ID": "canary\n", "AWS_SECRET_ACCESS_KEY": "x"}, "the Secret's AWS_ACCESS_KEY_ID has a space, a line break"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := testRules(t).parse("v", c.attrs, c.secrets)
			if err == nil || !strings.Contains(err.Error(), c.text) || !errors.Is(err, object.ErrInvalid) {
				t.Fatalf("error %v; want invalid argument with %q", err, c.text)
			}
			if strings.Contains(err.Error(), "canary") {
				t.Errorf("the error tells a secret: %v", err)
			}
		})
	}
}

func TestAllMistakesAreReportedAtOnce(t *testing.T) {
	_, err := testRules(t).parse("v", attrs{"source": "http://x", "uid": "root", "fileMode": "rw", "cache": "1"}, attrs{"AWS_ACCESS_KEY_ID": "x"})
	for _, field := range []string{"source:", "uid:", "fileMode:", `"cache"`, "AWS_SECRET_ACCESS_KEY"} {
		if err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("%s is not in %v", field, err)
		}
	}
}

func TestALongListOfMistakesIsCut(t *testing.T) {
	a := attrs{"source": "s3://bkt"}
	for i := range 100000 {
		a[fmt.Sprint("key", i)] = ""
	}
	_, err := testRules(t).parse("v", a, nil)
	if err == nil || len(err.Error()) > 4096 || !strings.Contains(err.Error(), "and 99984 more") {
		t.Errorf("got %.200v", err)
	}
}

func TestInlineVolumesMayNameListedEndpointsOnly(t *testing.T) {
	for endpoint, ok := range map[string]bool{
		"https://s3.example.com": true, "https://S3.EXAMPLE.COM:443/": true, "http://127.0.0.1:9000": true,
		"http://s3.example.com": false, "https://s3.example.com:8443": false, "https://s3.example.com.": false, "http://127.0.0.1": false,
		"https://a.s3.example.com": false, "http://127.1:9000": false, "http://localhost:9000": false,
	} {
		_, err := testRules(t).parse("v", attrs{"source": "s3://bkt", "endpoint": endpoint, keyEphemeral: "true"}, nil)
		if (err == nil) != ok {
			t.Errorf("%s: %v; want allowed=%v", endpoint, err, ok)
		}
	}
}

func TestFileSourcesNeedARoot(t *testing.T) {
	r, err := newRules("", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.parse("v", attrs{"source": "file:///srv/data"}, nil); err == nil || !strings.Contains(err.Error(), "--file-root") {
		t.Errorf("without a root: %v", err)
	}
	for source, want := range map[string]string{"file:///srv/data": "file:///srv/data", "file:///srv/data/a/": "file:///srv/data/a"} {
		if q, err := testRules(t).parse("v", attrs{"source": source}, attrs{"AWS_ACCESS_KEY_ID": "i", "AWS_SECRET_ACCESS_KEY": "s"}); err != nil || q.Source != want || !q.Credentials.IsZero() {
			t.Errorf("%s: got %s, %v", source, q.Source, err)
		}
	}
	if r, err = newRules("/", nil); err != nil {
		t.Fatal(err)
	}
	if q, err := r.parse("v", attrs{"source": "file:///"}, nil); err != nil || q.Source != "file:///" {
		t.Errorf("root of everything: %s, %v", q.Source, err)
	}
}

func TestBadRulesAreReported(t *testing.T) {
	_, err := newRules("relative", []string{"ftp://x", "http://ok", "nonsense"})
	if err == nil || strings.Count(err.Error(), "inline endpoint") != 2 || !strings.Contains(err.Error(), "file root") {
		t.Errorf("got %v", err)
	}
}

func TestAGroupMayReadWhatItIsGiven(t *testing.T) {
	v, err := withGroup(brokerwire.Volume{GID: 7, FileMode: 0o400, DirMode: 0o500}, "2000")
	if err != nil || v.GID != 2000 || v.FileMode != 0o440 || v.DirMode != 0o550 {
		t.Errorf("got %+v, %v", v, err)
	}
	if _, err := withGroup(brokerwire.Volume{}, "staff"); !errors.Is(err, object.ErrInvalid) {
		t.Errorf("a name: %v", err)
	}
}

// checkParsed are the promises about whatever was parsed without an error.
func checkParsed(t *testing.T, r rules, q request) {
	t.Helper()
	again, err := r.parse(q.ID, q.context(), nil)
	if q.Inline {
		return // its context has no ephemeral, and so other rules
	}
	plain := q
	plain.Credentials, plain.ServiceAccount = brokerwire.Credentials{}, ""
	if err != nil || again != plain {
		t.Fatalf("%+v\nfrom its context: %+v, %v", q, again, err)
	}
	scheme, rest, _ := strings.Cut(q.Source, "://")
	if scheme == "file" {
		rest = strings.TrimPrefix(rest, "/")
		if !below("/"+rest, r.fileRoot) {
			t.Fatalf("source %q is not below %q", q.Source, r.fileRoot)
		}
	}
	for segment := range strings.SplitSeq(rest, "/") {
		if segment == "" || segment == "." || segment == ".." || strings.ContainsRune(segment, 0) {
			t.Fatalf("source %q", q.Source)
		}
	}
	if q.FileMode > 0o777 || q.DirMode > 0o777 || q.UID == 1<<32-1 || q.GID == 1<<32-1 || q.Freshness < 0 {
		t.Fatalf("out of range: %+v", q)
	}
}

func FuzzParameters(f *testing.F) {
	for _, key := range append([]string{keyEphemeral, "soruce"}, parameterNames...) {
		for _, value := range []string{"", "true", "node", "0s", "file:///srv/data/a", "s3://bkt/a", "http://[::1]:80", "0444", "a/../b"} {
			f.Add("s3://bkt", key, value)
		}
	}
	f.Fuzz(func(t *testing.T, source, key, value string) {
		r := testRules(t)
		q, err := r.parse("v", attrs{keySource: source, key: value}, nil)
		if err != nil {
			if !errors.Is(err, object.ErrInvalid) {
				t.Fatalf("not invalid: %v", err)
			}
			return
		}
		checkParsed(t, r, q)
	})
}

// FuzzRequest reads whole requests: lines of key=value, the Secret behind an empty line.
func FuzzRequest(f *testing.F) {
	f.Add("source=s3://bkt/a\nendpoint=https://s3.example.com\nregion=r-1\ncsi.storage.k8s.io/ephemeral=true\n\nAWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=b", "v", "1000")
	f.Add("source=file:///srv/data/x\nuid=1\ngid=2\nfileMode=0640\ndirMode=755\nlayout=data\nbinding=node\ncomplete=never\nfreshness=1h", "v", "")
	f.Add("source=s3://bkt\npathStyle=true\nx=y\n\nAWS_SESSION_TOKEN=t", "../v", "x")
	f.Fuzz(func(t *testing.T, text, id, group string) {
		a, s, _ := strings.Cut(text, "\n\n")
		params, secrets := lines(a), lines(s)
		r := testRules(t)
		if checkID(id) != nil {
			return
		}
		q, err := r.parse(id, params, secrets)
		if err != nil {
			if !errors.Is(err, object.ErrInvalid) && !errors.Is(err, object.ErrDenied) || len(err.Error()) > 16<<10 {
				t.Fatalf("bad error: %v", err)
			}
			return
		}
		checkParsed(t, r, q)
		if _, listed := r.inlineEndpoints[q.Endpoint]; q.Inline && (strings.HasPrefix(q.Source, "file:") || q.Endpoint != "" && !listed || q.Ambient()) {
			t.Fatalf("an inline volume got %+v", q)
		}
		for _, v := range secrets {
			if len(v) > 20 && strings.Contains(fmt.Sprintf("%+v %#v", q.Volume, q.Volume), v) && !strings.Contains(a, v) && !strings.Contains(id, v) {
				t.Fatal("a secret is printed")
			}
		}
		if v, err := withGroup(q.Volume, group); err == nil && group != "" && (v.FileMode&0o040 == 0 || v.DirMode&0o050 != 0o050) {
			t.Fatalf("group %s cannot read %+v", group, v)
		}
		if !maps.Equal(q.context(), request{Volume: q.Volume, Binding: q.Binding}.context()) {
			t.Fatal("context is not stable")
		}
	})
}

func lines(text string) map[string]string {
	m := map[string]string{}
	for line := range strings.Lines(text) {
		k, v, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		m[k] = v
	}
	return m
}
