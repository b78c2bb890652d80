package sanity

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/larderfs/larder/cacheworker/domainsocket/shortcircuit"
	"github.com/larderfs/larder/sanity/leak"
	"github.com/larderfs/larder/sanity/s3test"
	"github.com/larderfs/larder/sanity/stack"
)

func tree(n int) map[string][]byte {
	objects := map[string][]byte{}
	for i := range n {
		objects[fmt.Sprintf("ds/dir%d/f%03d", i%7, i)] = pattern(10_000+i*997, uint64(i))
	}
	objects["ds/big"] = pattern(9<<20+5, 99)
	return objects
}

const readAll = "cd %s/data && find . -type f -print0 | xargs -0 cat | sha256sum"

// Twenty inline volumes with handles of their own over one source: one cache, one metadata
// cache, one set of requests.
func TestTwentyInlineVolumesMakeTheTrafficOfOne(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, tree(80))
	if err := store.Age(time.Hour); err != nil {
		t.Fatal(err)
	}
	one := countInline(t, store, 1)
	twenty := countInline(t, store, 20)
	t.Logf("one volume: %+v; twenty: %+v", one, twenty)
	for _, c := range []struct {
		kind        string
		one, twenty int64
	}{{"LIST", one.List, twenty.List}, {"HEAD", one.Head, twenty.Head}, {"GET", one.Get, twenty.Get}, {"bytes", one.GetBytes, twenty.GetBytes}} {
		if limit := c.one + max(c.one/20, 1); c.twenty > limit {
			t.Errorf("%s: %d with twenty volumes, %d with one", c.kind, c.twenty, c.one)
		}
	}
	if total := one.List + one.Head + one.Get; twenty.List+twenty.Head+twenty.Get > total+total/20 {
		t.Errorf("requests in all: %+v against %+v", twenty, one)
	}
}

func countInline(t *testing.T, store *s3test.Server, n int) s3test.Counts {
	t.Helper()
	s := up(t, "--inline-endpoint", store.Endpoint)
	store.ResetCounts()
	var targets []string
	for i := range n {
		_, target := publish(t, s.Kubelet, inlineOf(bucket(store, fmt.Sprintf("pod%d", i), "ds")))
		targets = append(targets, target)
	}
	sums := make([]string, n)
	var wg sync.WaitGroup
	for i, target := range targets {
		wg.Go(func() {
			out, err := shell(t, fmt.Sprintf(readAll, target))
			if err != nil {
				t.Errorf("%v: %s", err, out)
			}
			sums[i] = out
		})
	}
	wg.Wait()
	for i := range sums {
		if sums[i] != sums[0] {
			t.Errorf("volume %d reads otherwise than volume 0", i)
		}
	}
	return store.Counts()
}

// Cached bytes are served under a grant of the reader's own principal only, and one that has
// its grants asks nothing per object.
func TestAnotherCredentialGetsEACCESOnCachedBytes(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, tree(20))
	if err := store.Age(time.Hour); err != nil {
		t.Fatal(err)
	}
	for user, rights := range map[string]s3test.Rights{
		"lister": {List: true}, "reader": {List: true, Read: true}, "nobody": {},
	} {
		if err := store.AddUser(t.Context(), user, user+"-secret-key", rights); err != nil {
			t.Fatal(err)
		}
	}
	s := up(t)
	_, target := publish(t, s.Kubelet, bucket(store, "owner", "ds"))
	want := mustShell(t, fmt.Sprintf(readAll, target))

	store.ResetCounts()
	_, again := publish(t, s.Kubelet, bucket(store, "again", "ds"))
	if got := mustShell(t, fmt.Sprintf(readAll, again)); got != want {
		t.Errorf("the owner's second volume reads otherwise")
	}
	if c := store.Counts(); c.Head+c.Get > 0 {
		t.Errorf("a warm job of the principal that filled the cache made %+v", c)
	}

	as := func(user string) string {
		in := bucket(store, user, "ds")
		in.Secrets = secret(user, user+"-secret-key")
		_, target := publish(t, s.Kubelet, in)
		return target
	}
	if got := mustShell(t, fmt.Sprintf(readAll, as("reader"))); got != want {
		t.Errorf("a reader with rights of its own reads otherwise")
	}
	lister := as("lister")
	out, err := shell(t, "cat "+lister+"/data/big | wc -c; ls "+lister+"/data")
	if !strings.Contains(out, "Permission denied") || !strings.HasPrefix(strings.TrimSpace(out[strings.Index(out, "\n")+1:]), "0") {
		t.Errorf("a lister read cached bytes: %v %s", err, out)
	}
	if path, err := shortcircuit.Find(filepath.Join(lister, "domain")); err != nil {
		t.Error(err)
	} else if c, err := shortcircuit.Dial(t.Context(), path); err != nil {
		t.Error(err)
	} else {
		defer c.Close()
		if _, err := c.Open(t.Context(), "big"); err == nil {
			t.Error("a lister opened cached bytes over the domain socket")
		}
	}
	in := bucket(store, "nobody", "ds")
	in.Secrets = secret("nobody", "nobody-secret-key")
	if _, err := s.Publish(t.Context(), in); err == nil || !strings.Contains(err.Error(), store.Bucket) {
		t.Errorf("publish with a credential that may do nothing: %v; want an error that names the bucket", err)
	}
}

// Each whole read of an object that is replaced all the time is one of its versions.
func TestReplacedObjectIsNeverTorn(t *testing.T) {
	store := s3test.Start(t)
	const size, period, length = 8 << 20, 200 * time.Millisecond, time.Minute
	var mu sync.Mutex
	versions := map[string]int{}
	write := func(n int) {
		b := pattern(size, uint64(n))
		mu.Lock()
		versions[sum(b)] = 0
		mu.Unlock()
		if _, err := store.Put("ds/f", b); err != nil {
			t.Error(err)
		}
	}
	write(0)
	s := up(t)
	_, target := publish(t, s.Kubelet, bucket(store, "v", "ds", "freshness", "0s"))

	var stop atomic.Bool
	var whole, stale atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for !stop.Load() {
				out, err := shell(t, "sha256sum < "+target+"/data/f")
				if err != nil {
					if !strings.Contains(out, "Stale file handle") {
						t.Errorf("read: %v %s", err, out)
					}
					stale.Add(1)
					continue
				}
				whole.Add(1)
				h, _, _ := strings.Cut(out, " ")
				mu.Lock()
				if _, known := versions[h]; !known {
					t.Errorf("a read of %s is no version", h)
				}
				versions[h]++
				mu.Unlock()
			}
		})
	}
	tick := time.NewTicker(period)
	defer tick.Stop()
	n := 1
	for end := time.Now().Add(length); time.Now().Before(end); n++ {
		<-tick.C
		write(n)
	}
	stop.Store(true)
	wg.Wait()
	unseen := 0
	for _, reads := range versions {
		if reads == 0 {
			unseen++
		}
	}
	t.Logf("%d versions, %d whole reads, %d ended in ESTALE, %d versions never read whole", len(versions), whole.Load(), stale.Load(), unseen)
	if whole.Load() < 100 {
		t.Errorf("%d whole reads; want at least 100", whole.Load())
	}
}

// connect() succeeds while there is no worker, and the next one answers.
func TestConnectWhileTheWorkerRestarts(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"ds/f": pattern(2<<20, 7)})
	a := startApart(t, store.Endpoint)
	_, target := publish(t, a.Kubelet, bucket(store, "v", "ds"))
	path, err := shortcircuit.Find(filepath.Join(target, "domain"))
	if err != nil {
		t.Fatal(err)
	}
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		a.end("worker", sig)
		connected := make(chan error, 1)
		answered := make(chan error, 1)
		go func() {
			conn, err := dialRaw(path)
			connected <- err
			if err != nil {
				return
			}
			conn.Close()
			c, err := shortcircuit.Dial(t.Context(), path) // says hello: the next worker answers
			if err == nil {
				_, err = c.Stat(t.Context(), "f")
				c.Close()
			}
			answered <- err
		}()
		if err := <-connected; err != nil {
			t.Fatalf("connect without a worker: %v", err)
		}
		select {
		case err := <-answered:
			t.Fatalf("answered without a worker: %v", err)
		default:
		}
		a.start("worker")
		if err := <-answered; err != nil {
			t.Errorf("after %v: %v", sig, err)
		}
	}
}

// SIGKILL of all of Larder at random moments while it loads: what is served afterwards is
// right, and what status had reported is not fetched again.
func TestKilledWhileLoading(t *testing.T) {
	const rounds = 20
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	store := s3test.Start(t)
	objects := map[string][]byte{}
	for i := range 60 {
		objects[fmt.Sprintf("ds/f%02d", i)] = pattern(4<<20+i*1000, uint64(i))
	}
	put(t, store, objects)
	if err := store.Age(time.Hour); err != nil {
		t.Fatal(err)
	}
	var total int64
	want := map[string]string{}
	for key, b := range objects {
		total += int64(len(b))
		want["./"+strings.TrimPrefix(key, "ds/")] = sum(b)
	}
	for round := range rounds {
		s, err := stack.Start(t.Context(), stack.Config{Binary: larderBinary})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		_, target := publish(t, s.Kubelet, bucket(store, "v", "ds"))
		load := s.Command(t.Context(), "sh", "-c", "cat "+target+"/data/* > /dev/null")
		if err := load.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rng.Int64N(int64(600 * time.Millisecond)))) // the random moment
		before, err := s.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second) // "reported a second before the kill"
		if err := s.Kill(); err != nil {
			t.Fatal(err)
		}
		load.Wait()
		if err := s.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		store.ResetCounts()
		_, target = publish(t, s.Kubelet, bucket(store, "w", "ds"))
		for _, line := range strings.Split(strings.TrimSpace(mustShell(t, "cd "+target+"/data && find . -type f | xargs sha256sum")), "\n") {
			h, name, _ := strings.Cut(line, "  ")
			if want[name] != h {
				t.Errorf("round %d: %s is wrong", round, name)
			}
		}
		fetched := store.Counts().GetBytes
		if allowed := total - before.CachedBytes*95/100; fetched > allowed {
			t.Errorf("round %d: %d of %d bytes were cached; %d were fetched again, %d allowed", round, before.CachedBytes, total, fetched, allowed)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Nothing that was given as a Secret is in a log, in etcd, or anywhere below the directory.
func TestSecretsStayInMemory(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"ds/f": pattern(100_000, 7)})
	const canary = "CANARY7f3a9secret"
	if err := store.AddUser(t.Context(), "canaryuser", canary, s3test.Rights{List: true, Read: true}); err != nil {
		t.Fatal(err)
	}
	s := up(t, "--log-level", "debug", "--inline-endpoint", store.Endpoint)
	for i, in := range []bool{false, true} {
		v := bucket(store, fmt.Sprintf("v%d", i), "ds")
		v.Secrets = secret("canaryuser", canary)
		v.Secrets["AWS_SESSION_TOKEN"] = "" // known, and empty
		v.Inline = in
		_, target := publish(t, s.Kubelet, v)
		mustShell(t, "cat "+target+"/data/f > /dev/null")
	}
	wrong := bucket(store, "wrong", "ds")
	wrong.Secrets = secret("canaryuser", canary+"-but-wrong")
	if _, err := s.Publish(t.Context(), wrong); err == nil || strings.Contains(err.Error(), canary) {
		t.Errorf("publish with a wrong secret: %v", err)
	}
	if err := s.Stop(); err != nil {
		t.Error(err)
	}
	out, err := exec.Command("grep", "-rlaF", canary, filepath.Dir(s.Dir())).CombinedOutput()
	if len(out) > 0 {
		t.Errorf("the secret is in (%v):\n%s", err, out)
	}
	if _, err := os.Stat(filepath.Join(s.Dir(), "master")); err != nil {
		t.Errorf("etcd's data are not where this test looks: %v", err)
	}
	if m := leak.Mounts(filepath.Dir(s.Dir())); len(m) > 0 {
		t.Errorf("left mounted: %v", m)
	}
}
