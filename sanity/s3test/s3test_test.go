package s3test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go"

	"github.com/larderfs/larder/sanity/leak"
)

func TestMain(m *testing.M) {
	if isChild() {
		os.Exit(m.Run()) // of a test that looks after it
	}
	os.Exit(leak.Run(m))
}

// isChild tells the process that TestGatewayDiesWithTheProcess starts.
func isChild() bool { return os.Args[len(os.Args)-1] == "child" }

func get(t *testing.T, s *Server, access, secret, key string) ([]byte, error) {
	t.Helper()
	out, err := s.client(s.Endpoint, access, secret).GetObject(t.Context(), &s3.GetObjectInput{Bucket: &s.Bucket, Key: &key})
	if err != nil {
		return nil, err
	}
	defer out.Body.Close()
	return io.ReadAll(out.Body)
}

func code(err error) string {
	var api smithy.APIError
	if errors.As(err, &api) {
		return api.ErrorCode()
	}
	return fmt.Sprint(err)
}

func TestRequestsAreCountedAndSigned(t *testing.T) {
	s := Start(t)
	data := bytes.Repeat([]byte("x"), 100_000)
	if _, err := s.Put("a/b c+d", data); err != nil {
		t.Fatal(err)
	}
	got, err := get(t, s, s.AccessKey, s.SecretKey, "a/b c+d")
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("get: %d bytes, %v", len(got), err)
	}
	prefix := "a/"
	if _, err := s.Client().ListObjectsV2(t.Context(), &s3.ListObjectsV2Input{Bucket: &s.Bucket, Prefix: &prefix}); err != nil {
		t.Fatal(err)
	}
	want := Counts{List: 1, Get: 1, GetBytes: int64(len(data))}
	if c := s.Counts(); c != want {
		t.Errorf("counts: %+v, want %+v", c, want)
	}
	reqs := s.Requests()
	if len(reqs) != 2 || reqs[0].Kind != Get || reqs[0].Key != "a/b c+d" || reqs[0].AccessKey != s.AccessKey ||
		reqs[0].Status != 200 || reqs[0].Bytes != int64(len(data)) || reqs[1].Kind != List || reqs[1].Key != "a/" {
		t.Errorf("requests: %+v", reqs)
	}
	s.ResetCounts()
	if c := s.Counts(); c != (Counts{}) || len(s.Requests()) != 0 {
		t.Errorf("after a reset: %+v", c)
	}
}

func TestUserHasOnlyItsRights(t *testing.T) {
	s := Start(t)
	for _, key := range []string{"open/a", "closed/a"} {
		if _, err := s.Put(key, []byte(key)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.AddUser(t.Context(), "nobody", "nobody-secret", Rights{}); err != nil {
		t.Fatal(err)
	}
	if err := s.AddUser(t.Context(), "reader", "reader-secret", Rights{List: true, Read: true, Under: "open/"}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ user, key, want string }{
		{"nobody", "open/a", "AccessDenied"},
		{"reader", "closed/a", "AccessDenied"},
		{"reader", "open/a", "<nil>"},
	} {
		if _, err := get(t, s, c.user, c.user+"-secret", c.key); code(err) != c.want {
			t.Errorf("%s reads %s: %v; want %s", c.user, c.key, err, c.want)
		}
	}
	if _, err := get(t, s, "reader", "wrong", "open/a"); code(err) != "SignatureDoesNotMatch" {
		t.Errorf("wrong secret: %v", err)
	}
	if err := s.SetRights(t.Context(), "reader", Rights{}); err != nil {
		t.Fatal(err)
	}
	if _, err := get(t, s, "reader", "reader-secret", "open/a"); code(err) != "AccessDenied" {
		t.Errorf("after its rights were taken: %v", err)
	}
}

func TestHookHoldsARequestUntilLetGo(t *testing.T) {
	s := Start(t)
	if _, err := s.Put("a", []byte("a")); err != nil {
		t.Fatal(err)
	}
	arrived, letGo := make(chan Request), make(chan struct{})
	s.SetHook(func(w http.ResponseWriter, r *http.Request, req Request, next http.Handler) {
		arrived <- req
		<-letGo
		next.ServeHTTP(w, r)
	})
	done := make(chan error)
	go func() {
		_, err := get(t, s, s.AccessKey, s.SecretKey, "a")
		done <- err
	}()
	if req := <-arrived; req.Kind != Get || req.Key != "a" {
		t.Errorf("held %+v", req)
	}
	select {
	case err := <-done:
		t.Errorf("answered while held: %v", err)
	default:
	}
	s.SetHook(nil)
	close(letGo)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A test that is killed runs no cleanup: the gateway must go with it. The child is this test
// binary, told by its argument to start a server and print the gateway's pid.
func TestGatewayDiesWithTheProcess(t *testing.T) {
	child := exec.Command(os.Args[0], "-test.run=^TestGatewayDiesWithTheProcess$", "-test.v", "--", "child")
	if isChild() {
		s := Start(t)
		fmt.Println("pid", s.PID(), s.removals[0])
		<-make(chan struct{})
	}
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { child.Process.Kill(); child.Wait() })
	var pid int
	var dir string
	for lines := bufio.NewScanner(out); pid == 0 && lines.Scan(); {
		if strings.HasPrefix(lines.Text(), "pid ") {
			fmt.Sscanf(lines.Text(), "pid %d %s", &pid, &dir)
		}
	}
	if pid == 0 {
		t.Fatal("the child printed no pid")
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := syscall.Kill(pid, 0); err != nil {
		t.Fatalf("the gateway is not running: %v", err)
	}
	child.Process.Kill()
	deadline := time.Now().Add(30 * time.Second)
	for running(pid) {
		if time.Now().After(deadline) {
			t.Fatalf("the gateway %d outlives its parent", pid)
		}
		pause(context.Background(), 5*time.Millisecond)
	}
}

// running is false for a zombie too: whether somebody reaps orphans is not ours to test.
func running(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := bytes.Cut(stat, []byte(") "))
	return len(rest) > 0 && rest[0] != 'Z'
}

// A fault is one: a client that asks once, and waits for a second, is answered otherwise than without it.
func TestEachFaultOfAStormIsSeenByAClient(t *testing.T) {
	s := Start(t)
	data := bytes.Repeat([]byte("0123456789abcdef"), 20_000)
	for _, key := range []string{"d/a", "d/b"} {
		if _, err := s.Put(key, data); err != nil {
			t.Fatal(err)
		}
	}
	ask := func(kind Kind) string {
		ctx, stop := context.WithTimeout(t.Context(), time.Second)
		defer stop()
		once := func(o *s3.Options) { o.RetryMaxAttempts = 1 }
		key, prefix, part := "d/a", "d/", "bytes=0-200000"
		if kind == List {
			out, err := s.Client().ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: &s.Bucket, Prefix: &prefix}, once)
			if err != nil {
				return "failed"
			}
			return fmt.Sprint(len(out.Contents))
		}
		out, err := s.Client().GetObject(ctx, &s3.GetObjectInput{Bucket: &s.Bucket, Key: &key, Range: &part}, once)
		if err != nil {
			return "failed"
		}
		defer out.Body.Close()
		got, err := io.ReadAll(out.Body)
		return fmt.Sprint(aws.ToString(out.ETag), aws.ToString(out.ContentRange), len(got), err)
	}
	for _, f := range AllFaults(time.Second) {
		for _, kind := range []Kind{Get, List} {
			if f.Kinds != nil && !slices.Contains(f.Kinds, kind) {
				continue
			}
			s.SetHook(nil)
			well := ask(kind)
			storm := NewStorm(1, 1, f)
			s.SetHook(storm.Hook())
			if ill := ask(kind); ill == well {
				t.Errorf("%s of a %s: %s, as without it", f.Name, kind, ill)
			}
			if byName, n := storm.Injected(); n != 1 || byName[f.Name] != 1 {
				t.Errorf("%s of a %s: counted %v", f.Name, kind, byName)
			}
		}
	}
	storm := NewStorm(1, 0.3, Fault{Name: "500", Hook: Refuse(500, "InternalError")})
	s.SetHook(storm.Hook())
	failed := 0
	for range 200 {
		if ask(List) == "failed" {
			failed++
		}
	}
	if _, n := storm.Injected(); n != failed || n < 30 || n > 90 {
		t.Errorf("%d of 200 requests failed, %d faults; want about 60", failed, n)
	}
}
