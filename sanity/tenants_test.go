package sanity

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/larderfs/larder/sanity/leak"
	"github.com/larderfs/larder/sanity/s3test"
	"github.com/larderfs/larder/sanity/stack"
)

// tenants are a bucket, a token service whose roles are users of it, and a node.
type tenants struct {
	store *s3test.Server
	sts   *s3test.STS
	*stack.Stack
}

func newTenants(t *testing.T, objects map[string][]byte, more ...string) *tenants {
	t.Helper()
	n := &tenants{store: s3test.Start(t), sts: s3test.StartSTS(t)}
	put(t, n.store, objects)
	if err := n.store.Age(time.Hour); err != nil {
		t.Fatal(err)
	}
	n.Stack = up(t, append(more, "--inline-endpoint", n.store.Endpoint, "--sts-endpoint", n.sts.URL)...)
	return n
}

func roleOf(user string) string { return "arn:aws:iam::123456789012:role/" + user }

// role makes a user with its rights, and a role that pods of the namespace of that name may assume.
func (n *tenants) role(t *testing.T, user string, rights s3test.Rights, life time.Duration) {
	t.Helper()
	if err := n.store.AddUser(t.Context(), user, user+"-secret-key", rights); err != nil {
		t.Fatal(err)
	}
	n.sts.SetRole(roleOf(user), s3test.Role{AccessKey: user, SecretKey: user + "-secret-key",
		Subject: "system:serviceaccount:" + user + ":default", Life: life})
}

// pod describes a volume that is read as the pod.
func (n *tenants) pod(name, user string, expires time.Time, more ...string) stack.PublishInput {
	in := bucket(n.store, name, "ds", append(more, "credentials", "pod", "roleArn", roleOf(user), "stsEndpoint", n.sts.URL)...)
	in.Secrets, in.Namespace = nil, user
	in.Tokens = s3test.TokenAttribute(s3test.Token(user, "default", expires))
	return in
}

// sessions counts those that were given, and requests that were refused with a code.
func (n *tenants) sessions(code string) (count int) {
	for _, a := range n.sts.Asked() {
		if a.Code == code {
			count++
		}
	}
	return count
}

func later() time.Time { return time.Now().Add(time.Hour) }

// Two tenants on one node: each sees what its own credential may, and what both may is fetched once.
func TestTwoTenantsShareBytesAndNoRights(t *testing.T) {
	objects := map[string][]byte{}
	var open, all int64
	for i := range 6 {
		objects[fmt.Sprintf("ds/open/f%d", i)] = pattern(300_000+i, uint64(i))
		objects[fmt.Sprintf("ds/closed/f%d", i)] = pattern(200_000+i, uint64(10+i))
	}
	for key, data := range objects {
		all += int64(len(data))
		if strings.HasPrefix(key, "ds/open/") {
			open += int64(len(data))
		}
	}
	n := newTenants(t, objects)
	n.role(t, "alice", s3test.Rights{List: true, Read: true}, time.Hour)
	n.role(t, "bob", s3test.Rights{List: true, Read: true, Under: "ds/open/"}, time.Hour)
	n.store.ResetCounts()
	alices := n.pod("alices", "alice", later())
	alices.Inline = true
	_, alice := publish(t, n.Kubelet, alices)
	_, bob := publish(t, n.Kubelet, n.pod("bobs", "bob", later())) // a claim, staged without a token
	want := mustShell(t, fmt.Sprintf("cd %s/data && cat open/* | sha256sum", alice))
	mustShell(t, fmt.Sprintf("cd %s/data && cat closed/* > /dev/null", alice))
	if got := mustShell(t, fmt.Sprintf("cd %s/data && cat open/* | sha256sum", bob)); got != want {
		t.Error("bob reads otherwise than alice")
	}
	for i := range 6 {
		if out, err := shell(t, fmt.Sprintf("head -c 1 %s/data/closed/f%d", bob, i)); err == nil || !strings.Contains(out, "Permission denied") {
			t.Errorf("bob reads what is cached and closed to him: %v %s", err, out)
		}
	}
	bytes := map[string]int64{}
	for _, r := range n.store.Requests() {
		if r.Kind == s3test.Get && r.Status < 300 {
			bytes[r.AccessKey] += r.Bytes
		}
	}
	if bytes["alice"] != all || bytes["bob"] != 0 || len(bytes) > 2 {
		t.Errorf("bytes fetched: %v; want %d by alice and none by bob, who read %d of them", bytes, all, open)
	}

	// Another volume of the role has its grants, once it has shown its token.
	n.store.ResetCounts()
	_, again := publish(t, n.Kubelet, n.pod("again", "alice", later()))
	mustShell(t, fmt.Sprintf("cd %s/data && cat open/* closed/* > /dev/null", again))
	if c := n.store.Counts(); c.Get+c.Head > 0 {
		t.Errorf("a second volume of the role made %+v", c)
	}
	thief := n.pod("thief", "bob", later())
	thief.Parameters["roleArn"] = roleOf("alice")
	for _, thief.Inline = range []bool{true, false} {
		_, err := n.Publish(t.Context(), thief)
		if err == nil || !strings.Contains(err.Error(), "PermissionDenied") || !strings.Contains(err.Error(), "AccessDenied (HTTP 403)") {
			t.Errorf("a pod of bob's with alice's role: %v", err)
		}
	}
	// What a user writes does not win over what the kubelet says.
	forged := n.pod("forged", "bob", later())
	forged.Inline, forged.Parameters["roleArn"] = true, roleOf("alice")
	forged.Parameters["csi.storage.k8s.io/pod.namespace"] = "alice"
	forged.Parameters["csi.storage.k8s.io/serviceAccount.tokens"] = s3test.TokenAttribute(s3test.Token("alice", "default", later()))
	if _, err := n.Publish(t.Context(), forged); err == nil || !strings.Contains(err.Error(), "AccessDenied") {
		t.Errorf("forged attributes: %v", err)
	}
}

// Sessions end and tokens are replaced under a reader, and a worker dies: no error, no remount. A token that
// has expired costs what is not cached, until another one comes.
func TestSessionsEndUnderAReader(t *testing.T) {
	n := newTenants(t, map[string][]byte{"ds/a": pattern(100_000, 1), "ds/b": pattern(100_000, 2), "ds/c": pattern(100_000, 3)}, "--log-level", "debug")
	n.role(t, "alice", s3test.Rights{List: true, Read: true}, 1500*time.Millisecond)
	live := n.pod("live", "alice", later(), "freshness", "0s")
	live.Inline = true
	v, target := publish(t, n.Kubelet, live)
	mounts := leak.Mounts(n.Dir())
	until := func(what string, done func() bool) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); !done(); {
			if time.Now().After(deadline) {
				t.Fatalf("%s: not within 30s; the token service was asked %d times", what, len(n.sts.Asked()))
			}
			mustShell(t, "cat "+target+"/data/a > /dev/null")
		}
	}
	until("three sessions", func() bool { return n.sessions("") >= 3 })
	first := v.Tokens
	v.Tokens = s3test.TokenAttribute(s3test.Token("alice", "default", later().Add(time.Minute)))
	if _, err := n.PublishPod(t.Context(), v, "live"); err != nil {
		t.Fatal(err)
	}
	asked := func() string { a := n.sts.Asked(); return s3test.TokenAttribute(a[len(a)-1].Token) }
	until("a session by the new token", func() bool { return asked() == v.Tokens })
	st, err := n.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(st.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	before := n.sessions("")
	until("a session for the next worker", func() bool { return n.sessions("") > before })
	if asked() != v.Tokens || first == v.Tokens {
		t.Error("the next worker had another token")
	}

	token := s3test.Token("alice", "default", later())
	short, probe := n.pod("short", "alice", later(), "freshness", "1h"), n.pod("probe", "alice", later(), "freshness", "0s")
	short.Tokens, probe.Tokens = s3test.TokenAttribute(token), s3test.TokenAttribute(token)
	w, cached := publish(t, n.Kubelet, short)
	mustShell(t, "cat "+cached+"/data/b > /dev/null; ls "+cached+"/data")
	p, probed := publish(t, n.Kubelet, probe) // its session ends later
	n.sts.Expire(token)
	for deadline := time.Now().Add(30 * time.Second); ; {
		out, err := shell(t, "cat "+probed+"/data/b > /dev/null")
		if err != nil && strings.Contains(out, "Permission denied") {
			break
		}
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("with a token that has expired: %v %s; want EACCES", err, out)
		}
	}
	if out, err := shell(t, "cat "+cached+"/data/c > /dev/null"); err == nil || !strings.Contains(out, "Permission denied") {
		t.Errorf("uncached, with a token that has expired: %v %s", err, out)
	}
	mustShell(t, "cat "+cached+"/data/b > /dev/null")
	if n.sessions("ExpiredTokenException") == 0 {
		t.Error("no session was asked for with the token that has expired")
	}
	w.Tokens = s3test.TokenAttribute(s3test.Token("alice", "default", later()))
	if _, err := n.PublishPod(t.Context(), w, "short"); err != nil {
		t.Fatal(err)
	}
	mustShell(t, "cat "+cached+"/data/c "+target+"/data/a > /dev/null")
	for _, v := range []*stack.Volume{w, p} {
		if err := n.Unpublish(t.Context(), v); err != nil {
			t.Fatal(err)
		}
	}
	if now := leak.Mounts(n.Dir()); !reflect.DeepEqual(now, mounts) {
		t.Errorf("mounts: %v, were %v", now, mounts)
	}
	if err := n.Stop(); err != nil {
		t.Error(err)
	}
	for _, a := range n.sts.Asked()[:1] {
		for _, secret := range []string{a.Token, "alice-secret-key"} {
			if out, err := exec.Command("grep", "-rlaF", secret, filepath.Dir(n.Dir())).CombinedOutput(); len(out) > 0 {
				t.Errorf("a token or a key of its session is in (%v):\n%s", err, out)
			}
		}
	}
}

// A Secret is rotated under a reader: the old key dies, and nobody notices.
func TestASecretIsRotatedUnderAReader(t *testing.T) {
	n := newTenants(t, map[string][]byte{"ds/a": pattern(100_000, 1), "ds/b": pattern(100_000, 2)})
	for _, user := range []string{"old", "new"} {
		n.role(t, user, s3test.Rights{List: true, Read: true}, time.Hour)
	}
	in := bucket(n.store, "rotated", "ds", "freshness", "0s", "credentials", "secret")
	in.Secrets = secret("old", "old-secret-key")
	v, target := publish(t, n.Kubelet, in)
	mounts := leak.Mounts(n.Dir())
	reader := "exec 3< " + target + "/data/b; head -c 10 <&3 > /dev/null; cat " + target + "/data/a > /dev/null; cat <&3 > /dev/null"
	mustShell(t, reader)
	v.Secrets = secret("new", "new-secret-key")
	if _, err := n.PublishPod(t.Context(), v, "rotated"); err != nil {
		t.Fatal(err)
	}
	if err := n.store.SetRights(t.Context(), "old", s3test.Rights{}); err != nil {
		t.Fatal(err)
	}
	n.store.ResetCounts()
	mustShell(t, reader)
	for _, r := range n.store.Requests() {
		if r.AccessKey != "new" || r.Status >= 400 {
			t.Errorf("%s %s as %s: %d", r.Kind, r.Key, r.AccessKey, r.Status)
		}
	}
	if len(n.store.Requests()) == 0 {
		t.Error("the store was not asked")
	}
	if now := leak.Mounts(n.Dir()); !reflect.DeepEqual(now, mounts) {
		t.Errorf("mounts: %v, were %v", now, mounts)
	}
}
