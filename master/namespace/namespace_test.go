package namespace

import (
	"fmt"
	"net/url"
	"strings"
	"testing"

	"github.com/larderfs/larder/master/record"
)

func mount(path, uri string) record.Mount { return record.Mount{Path: path, URI: uri} }

func (v View) text() string {
	var parts []string
	for _, p := range v.Parts {
		parts = append(parts, fmt.Sprintf("%s=%s", p.At, p.URI))
	}
	return strings.Join(parts, " ")
}

func TestTheDeepestMountCounts(t *testing.T) {
	mounts := []record.Mount{
		mount("/sales", "s3://a/x"), mount("/sales/2026/archive", "s3://b"), mount("/sales/2026/archive/old", "file:///"),
		mount("/sales-eu", "s3://c"), mount("/hr/people", "s3://d/p"),
	}
	for _, c := range []struct{ path, want string }{
		{"/sales", "=s3://a/x 2026/archive/=s3://b 2026/archive/old/=file:///"},
		{"/sales/2026", "=s3://a/x/2026 archive/=s3://b archive/old/=file:///"},
		{"/sales/2026/archive", "=s3://b old/=file:///"},
		{"/sales/2026/archive/old/y/z", "=file:///y/z"},
		{"/sales/2027", "=s3://a/x/2027"},
		{"/hr", "people/=s3://d/p"},
		{"/", "hr/people/=s3://d/p sales-eu/=s3://c sales/=s3://a/x sales/2026/archive/=s3://b sales/2026/archive/old/=file:///"},
		{"/sale", ""},
		{"/hr/peoples", ""},
	} {
		v, ok := At(mounts, c.path)
		if got := v.text(); got != c.want || ok != (c.want != "") {
			t.Errorf("%s: %q, %v; want %q", c.path, got, ok, c.want)
		}
	}
	if v, _ := At([]record.Mount{mount("/", "s3://all"), mount("/a", "s3://a")}, "/b/c"); v.text() != "=s3://all/b/c" {
		t.Error(v.text())
	}
}

func TestWhereAPathLies(t *testing.T) {
	mounts := []record.Mount{mount("/sales", "s3://a/x"), mount("/sales/2026/archive", "s3://b/"), mount("/all", "s3://c")}
	for _, c := range []struct{ path, want string }{
		{"/sales", "[s3://a/x/ s3://b/]"}, {"/sales/2026", "[s3://a/x/2026 s3://b/]"}, {"/sales/2026/", "[s3://a/x/2026/ s3://b/]"},
		{"/sales/2026/f", "[s3://a/x/2026/f]"}, {"/all/", "[s3://c/]"}, {"/", "[s3://c/ s3://a/x/ s3://b/]"}, {"/hr", "[]"}, {"/sales/../hr", "[]"},
	} {
		got, err := URIs(mounts, c.path)
		if fmt.Sprint(got) != c.want || (err == nil) != (c.want != "[]") {
			t.Errorf("%s: %v, %v; want %s", c.path, got, err, c.want)
		}
	}
}

// A path is no URI: what a user writes in it leads nowhere else.
func TestWhatPathsSayStaysInTheMount(t *testing.T) {
	mounts := []record.Mount{mount("/sales", "file:///root/sales"), mount("/s3", "s3://bucket/p%20q")}
	for _, c := range []struct{ path, want string }{
		{"/sales/%2e%2e/hr", "/root/sales/%2e%2e/hr"}, {"/sales/a?b#c", "/root/sales/a?b#c"}, {"/sales/a%2fb", "/root/sales/a%2fb"},
		{"/s3/100%", "/p q/100%"}, {"/s3/x y", "/p q/x y"},
	} {
		v, _ := At(mounts, c.path)
		u, err := url.Parse(v.Parts[0].URI)
		if err != nil || u.Path != c.want || u.RawQuery != "" || u.Fragment != "" {
			t.Errorf("%s: %s, %v; want %s", c.path, v.text(), err, c.want)
		}
	}
}

func TestWhoMayUseAMount(t *testing.T) {
	class, inline := Who{Namespace: "team-a"}, Who{Inline: true, Namespace: "team-a"}
	for _, c := range []struct {
		inline, class []string
		mayInline     bool
		mayClass      bool
	}{
		{nil, nil, false, true},
		{[]string{"*"}, []string{"-"}, true, false},
		{[]string{"team-a", "team-b"}, []string{"team-b"}, true, false},
		{[]string{"-"}, []string{"*"}, false, true},
	} {
		m := mount("/sales", "s3://a")
		m.AllowInline, m.AllowClass = c.inline, c.class
		v, _ := At([]record.Mount{m}, "/sales/x")
		if why := v.Refused(inline); (why == "") != c.mayInline {
			t.Errorf("inline %v: %s", c.inline, why)
		}
		if why := v.Refused(class); (why == "") != c.mayClass {
			t.Errorf("class %v: %s", c.class, why)
		}
		if why := v.Refused(Who{Inline: true}); (why == "") != (len(c.inline) == 1 && c.inline[0] == "*") {
			t.Errorf("inline %v, of a namespace that is not known: %s", c.inline, why)
		}
	}
}

// The refusal names the mount, the namespace and the remedy, which keeps who may already.
func TestARefusalSaysWhatToDo(t *testing.T) {
	m := mount("/sales", "s3://a")
	m.AllowInline, m.Object = []string{"team-b"}, "sales"
	got := Refusal(m, Who{Inline: true, Namespace: "team-a"})
	for _, want := range []string{"mount /sales ", `namespace "team-a"`, "inline volumes", "larder mount set /sales --allow-inline team-b,team-a", "mounts.larder.dev/sales"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in: %s", want, got)
		}
	}
	v, _ := At([]record.Mount{m, mount("/sales/open", "s3://b")}, "/")
	if why := v.Refused(Who{Namespace: "x"}); why != "" {
		t.Errorf("a folder that leads to a mount that one may use: %s", why)
	}
}
