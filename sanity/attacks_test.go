package sanity

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/larderfs/larder/sanity/stack"
)

// DESIGN §5.9 and §5.10, of the namespace: what an administrator mistypes, and what a user writes into a path.
func TestWhatIsMountedLeadsNowhereElse(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"root/in/f": "inside", "root/closed/f": "canary", "outside/f": "canary"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{"root/in/link": "../../outside", "root/in/absolute": dir + "/outside"} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	var trapped, redirected atomic.Int64
	trap := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { trapped.Add(1) }))
	defer trap.Close()
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		redirected.Add(1)
		http.Redirect(w, r, trap.URL+r.URL.Path, http.StatusTemporaryRedirect)
	}))
	defer elsewhere.Close()
	s := up(t, "--file-root", dir+"/root")

	for _, c := range []struct {
		name, text string
		args       []string
	}{
		{"dot-dot", `".."`, []string{"/x", "s3://bucket/a/../b"}},
		{"dot-dot, escaped", `".."`, []string{"/x", "s3://bucket/a/%2e%2e/b"}},
		{"dot-dot, half escaped", `".."`, []string{"/x", "file://" + dir + "/root/in/.%2E/closed"}},
		{"a slash, escaped", "no name has a slash", []string{"/x", "s3://bucket/a%2F..%2Fb"}},
		{"a NUL, escaped", "control character", []string{"/x", "s3://bucket/a%00b"}},
		{"an end of the path", "write it as %3F", []string{"/x", "s3://bucket/a?b"}},
		{"a bucket that is a path", "no bucket name", []string{"/x", "s3://../etc"}},
		{"a password", "credentials do not belong here", []string{"/x", "s3://user:canary@bucket"}},
		{"another scheme", "want s3://bucket/prefix", []string{"/x", "http://169.254.169.254/latest"}},
		{"a host", "three slashes", []string{"/x", "file://host/etc"}},
		{"a path out of itself", `".." is no name`, []string{"/x/../y", "s3://bucket"}},
		{"the metadata service", "option endpoint", []string{"/x", "s3://bucket", "--option", "endpoint=http://169.254.169.254"}},
		{"the metadata service, in IPv6", "option endpoint", []string{"/x", "s3://bucket", "--option", "endpoint=http://[::ffff:169.254.169.254]"}},
		{"the metadata service, by IPv6", "option endpoint", []string{"/x", "s3://bucket", "--option", "endpoint=http://[fd00:ec2::254]"}},
		{"a link-local address", "option endpoint", []string{"/x", "s3://bucket", "--option", "endpoint=http://[fe80::1]"}},
		{"a user in the endpoint", "option endpoint", []string{"/x", "s3://bucket", "--option", "endpoint=http://host@169.254.169.254"}},
		{"a path in the endpoint", "option endpoint", []string{"/x", "s3://bucket", "--option", "endpoint=http://host/%2e%2e"}},
		{"a host in the region", "option region", []string{"/x", "s3://bucket", "--option", "region=evil.example/#"}},
		{"a key for an option", "credential", []string{"/x", "s3://bucket", "--option", "secretAccessKey=canary"}},
		{"a key for a credential", "never the credential itself", []string{"/x", "s3://bucket", "--credential", "AKIAcanary"}},
		{"a credential out of its folder", "file:/path", []string{"/x", "s3://bucket", "--credential", "file:/keys/../etc/shadow"}},
	} {
		out, err := exec.CommandContext(t.Context(), s.Binary, append([]string{"mount", "add", "--dir", s.Dir()}, c.args...)...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), c.text) || strings.Contains(string(out), "canary") {
			t.Errorf("%s: %v: %s; want %q", c.name, err, out, c.text)
		}
	}

	mountCLI(t, s, "add", "/in", "file://"+dir+"/root/in", "--allow-inline", "default")
	mountCLI(t, s, "add", "/in/hr", "file://"+dir+"/root/closed")
	mountCLI(t, s, "add", "/team", "file://"+dir+"/root/closed", "--allow-inline", "team-a,default2")
	mountCLI(t, s, "add", "/outside", "file://"+dir+"/outside", "--allow-inline", "*")
	mountCLI(t, s, "add", "/elsewhere", "s3://bucket", "--allow-inline", "*", "--option", "endpoint="+elsewhere.URL)
	n := 0
	inline := func(path string) (string, error) {
		n++
		v, err := s.Publish(t.Context(), stack.PublishInput{Name: fmt.Sprintf("attack%d", n), Inline: true, Parameters: map[string]string{"path": path, "layout": "data", "freshness": "0s"}})
		if err != nil {
			return "", err
		}
		return v.Targets[0], nil
	}
	eventually(t, "the worker has heard of the last mount", func() bool {
		_, err := inline("/elsewhere")
		return err != nil && !strings.Contains(err.Error(), "NotFound") && !strings.Contains(err.Error(), "has not been told yet")
	})
	for _, c := range []struct{ path, text string }{
		{"/in/../closed", `".." is no name`}, {"/in/hr", "does not allow inline volumes"}, {"/in/hr/f", "does not allow inline volumes"},
		{"/team", "does not allow inline volumes"}, {"/outside", "--file-root"}, {"/elsewhere", "307"}, {"/elsewhere/a", "307"},
	} {
		if target, err := inline(c.path); err == nil || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: published at %q, %v; want %q", c.path, target, err, c.text)
		}
	}
	if redirected.Load() == 0 || trapped.Load() > 0 {
		t.Errorf("%d redirects, %d of them followed", redirected.Load(), trapped.Load())
	}
	for _, path := range []string{"/in", "/in/%2e%2e/closed", "/in/..%2Fclosed", "/in/link", "/in/absolute"} {
		target, err := inline(path)
		if err != nil {
			continue
		}
		names, read := "link absolute hr hr/f link/f absolute/f f .. ../closed/f", ""
		for name := range strings.SplitSeq(names, " ") {
			out, _ := shell(t, fmt.Sprintf("cat '%s/%s'", target, name))
			read += out
		}
		if strings.Contains(read, "canary") || path == "/in" && !strings.Contains(read, "inside") {
			t.Errorf("%s shows %q", path, read)
		}
	}
}
