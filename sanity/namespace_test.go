package sanity

import (
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/larderfs/larder/sanity/s3test"
	"github.com/larderfs/larder/sanity/stack"
)

// mountCLI runs larder mount against a stack.
func mountCLI(t *testing.T, s *stack.Stack, args ...string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), s.Binary, append(append([]string{"mount"}, args...), "--dir", s.Dir())...).CombinedOutput()
	if err != nil {
		t.Fatalf("larder mount %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// prints waits until a command prints what is wanted: nobody tells when a worker has heard of a mount.
func prints(t *testing.T, want, command string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s prints %q", command, want), func() bool {
		out, _ := shell(t, command)
		return strings.TrimSpace(out) == want
	})
}

// One volume over two buckets' prefixes with two credentials; mounts come and go under its readers, and the worker
// dies while a file of a mount that is gone is open.
func TestVolumesOfTheNamespace(t *testing.T) {
	store := s3test.Start(t)
	big := pattern(20<<20, 7)
	put(t, store, map[string][]byte{"a/2026/f": []byte("of a"), "b/g": []byte("of b"), "b/big": big, "c/h": []byte("of c"), "secret/x": []byte("x")})
	if err := store.AddUser(t.Context(), "narrow", "narrow-secret-key", s3test.Rights{List: true, Read: true, Under: "b/"}); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TESTROOT_AWS_ACCESS_KEY_ID", store.AccessKey)
	t.Setenv("TESTROOT_AWS_SECRET_ACCESS_KEY", store.SecretKey)
	t.Setenv("NARROW_AWS_ACCESS_KEY_ID", "narrow")
	t.Setenv("NARROW_AWS_SECRET_ACCESS_KEY", "narrow-secret-key")
	s := up(t)
	add := func(path, prefix, credential string, more ...string) {
		t.Helper()
		mountCLI(t, s, append([]string{"add", path, "s3://" + store.Bucket + "/" + prefix, "--option", "endpoint=" + store.Endpoint + ",region=" + store.Region,
			"--credential", "env:" + credential}, more...)...)
	}
	in := stack.PublishInput{Name: "v", Parameters: map[string]string{"path": "/sales/2026", "layout": "data", "freshness": "0s"}}
	if _, err := s.Publish(t.Context(), in); err == nil || !strings.Contains(err.Error(), "larder mount add /sales/2026") {
		t.Fatalf("nothing is mounted: %v", err)
	}
	add("/sales", "a", "TESTROOT_")
	add("/sales/2026/old", "b", "NARROW_", "--read-only")
	_, target := publishSoon(t, s, in)
	prints(t, "f\nold", "ls "+target)
	if out := mustShell(t, fmt.Sprintf("cat %s/f %s/old/g", target, target)); out != "of aof b" {
		t.Errorf("%q", out)
	}
	add("/sales/2026/old/narrow", "secret", "NARROW_") // whose credential may not read that
	prints(t, "narrow", fmt.Sprintf("cd %s/old && ls -d narrow", target))
	if out, err := shell(t, fmt.Sprintf("cat %s/old/narrow/x", target)); err == nil || !strings.Contains(out, "Permission denied") {
		t.Errorf("%q, %v", out, err)
	}
	mountCLI(t, s, "rm", "/sales/2026/old/narrow")

	reader := open(t, target+"/old/big")
	mountCLI(t, s, "mv", "/sales/2026/old", "/sales/2026/moved")
	prints(t, "f\nmoved", "ls "+target)
	if out, err := shell(t, "cat "+target+"/old/g"); err == nil || !strings.Contains(out, "No such file") {
		t.Errorf("%q, %v", out, err)
	}
	st, err := s.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	syscall.Kill(st.PID, syscall.SIGKILL)
	if got, err := reader.read(); err != nil || !strings.HasPrefix(got, sum(big)) {
		t.Errorf("a file of a mount that was moved, over the death of the worker: %q, %v", got, err)
	}
	if out := mustShell(t, fmt.Sprintf("cat %s/moved/g", target)); out != "of b" {
		t.Errorf("%q", out)
	}

	// The table outlives all processes.
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := s.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	other := stack.PublishInput{Name: "w", Parameters: map[string]string{"path": "/sales/2026/moved", "layout": "data"}}
	_, again := publishSoon(t, s, other)
	if out := mustShell(t, "cat "+again+"/g"); out != "of b" {
		t.Errorf("%q", out)
	}
}

// Bytes go when their mount's ttl has ended, whoever reads them; what is open is read to its end.
func TestAMountHasATTL(t *testing.T) {
	store := s3test.Start(t)
	big := pattern(3<<20, 7)
	put(t, store, map[string][]byte{"a/f": []byte("of a"), "a/big": big, "b/g": []byte("of b")})
	t.Setenv("TESTROOT_AWS_ACCESS_KEY_ID", store.AccessKey)
	t.Setenv("TESTROOT_AWS_SECRET_ACCESS_KEY", store.SecretKey)
	s := up(t)
	mountCLI(t, s, "add", "/a", "s3://"+store.Bucket+"/a", "--option", "endpoint="+store.Endpoint+",region="+store.Region, "--credential", "env:TESTROOT_")
	_, target := publishSoon(t, s, stack.PublishInput{Name: "v", Parameters: map[string]string{"path": "/a", "layout": "data"}})
	_, other := publish(t, s.Kubelet, bucket(store, "w", "b", "layout", "data"))
	cached := func(uri string) (n int64) {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), s.Binary, "locate", uri, "-o", "json", "--dir", s.Dir()).Output()
		var l located
		if err := errors.Join(err, json.Unmarshal(out, &l)); err != nil {
			t.Fatalf("locate: %v: %s", err, out)
		}
		return l.CachedBytes
	}
	uri := "s3://" + store.Bucket
	mustShell(t, fmt.Sprintf("cat %s/f %s/big %s/g > /dev/null", target, target, other))
	eventually(t, "all is cached", func() bool { return cached(uri) == int64(len(big)+8) })
	reader := open(t, target+"/big")
	mountCLI(t, s, "set", "/a", "--option", "ttl=1s")
	eventually(t, "what the mount leads to is freed", func() bool { return cached(uri+"/a") == 0 })
	if n := cached(uri); n != 4 {
		t.Errorf("%d bytes are left; want those of another folder", n)
	}
	if got, err := reader.read(); err != nil || !strings.HasPrefix(got, sum(big)) {
		t.Errorf("a file that was open: %q, %v", got, err)
	}
	store.ResetCounts()
	mountCLI(t, s, "set", "/a", "--option", "ttl=")                                        // taken away
	mustShell(t, fmt.Sprintf("dd if=%s/f iflag=direct bs=4096 of=/dev/null 2>&1", target)) // past the page cache
	eventually(t, "it is cached again", func() bool { return cached(uri+"/a") >= 4 })
	if store.Counts().Get == 0 {
		t.Error("what was freed was not fetched again")
	}
}

// publishSoon publishes, which may be before the worker has heard of a mount: Kubernetes tries again.
func publishSoon(t *testing.T, s *stack.Stack, in stack.PublishInput) (v *stack.Volume, target string) {
	t.Helper()
	eventually(t, in.Name+" is published", func() (ok bool) {
		var err error
		v, err = s.Publish(t.Context(), in)
		return err == nil
	})
	return v, v.Targets[0]
}

// Inline volumes are what users write: they may have nothing that no mount allows them.
func TestInlineVolumesOfTheNamespaceAreAllowedByTheMount(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"a/f": []byte("of a"), "b/g": []byte("of b")})
	t.Setenv("TESTROOT_AWS_ACCESS_KEY_ID", store.AccessKey)
	t.Setenv("TESTROOT_AWS_SECRET_ACCESS_KEY", store.SecretKey)
	s := up(t)
	for path, prefix := range map[string]string{"/sales": "a", "/sales/hr": "b"} {
		mountCLI(t, s, "add", path, "s3://"+store.Bucket+"/"+prefix, "--option", "endpoint="+store.Endpoint, "--option", "region="+store.Region, "--credential", "env:TESTROOT_")
	}
	in := stack.PublishInput{Name: "v", Inline: true, Parameters: map[string]string{"path": "/sales", "layout": "data", "freshness": "0s"}}
	refused := func(err error) bool {
		return err != nil && strings.Contains(err.Error(), "PermissionDenied") && strings.Contains(err.Error(), "mount /sales does not allow inline volumes") &&
			strings.Contains(err.Error(), `"default"`) && strings.Contains(err.Error(), "larder mount set /sales --allow-inline default")
	}
	eventually(t, "it is refused, in words that help", func() bool {
		_, err := s.Publish(t.Context(), in)
		return refused(err)
	})
	mountCLI(t, s, "set", "/sales", "--allow-inline", "default")
	_, target := publishSoon(t, s, in)
	if out := mustShell(t, "ls "+target+"; cat "+target+"/f"); out != "f\nof a" {
		t.Errorf("%q", out)
	}
	if out, err := shell(t, "cat "+target+"/hr/g"); err == nil || !strings.Contains(out, "Permission denied") {
		t.Errorf("a mount below it that does not allow it: %q, %v", out, err)
	}
	mountCLI(t, s, "set", "/sales", "--allow-inline", "others") // taken away from a volume that is in use
	eventually(t, "nothing is shown any more", func() bool {
		out, err := shell(t, "ls "+target)
		return err != nil && strings.Contains(out, "Permission denied")
	})
}
