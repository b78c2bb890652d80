package sanity

import (
	"bufio"
	"context"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/larderfs/larder/cacheworker/domainsocket/shortcircuit"
	"github.com/larderfs/larder/sanity/s3test"
)

// still are the metrics that are watched and do not move here, and why.
var still = map[string]string{
	"larder_cache_capacity_bytes": "is what --tier says",
	"larder_master_store_up":      "is 1: the etcd is in the master's own process",
}

// What dashboard and alerts name exists in the scrapes of the processes, and moves when what it counts happens.
func TestWhatIsWatchedExistsAndMoves(t *testing.T) {
	store := s3test.Start(t)
	const many, big = 48, 40 << 20
	objects := map[string][]byte{"ds/big": pattern(big, 1), "ds/cold": pattern(1<<20, 2), "ds/refused": pattern(1<<20, 3), "ds/shared": pattern(4<<20, 4), "ds/left": pattern(4<<20, 5),
		"ds/down": pattern(1<<20, 6), "ds/nodisk": pattern(1<<20, 7)}
	for i := range many {
		objects[fmt.Sprintf("ds/many/f%02d", i)] = pattern(2<<20, uint64(100+i))
	}
	for i := range 12 {
		objects[fmt.Sprintf("ds/tree/d%02d/x/f", i)] = []byte("x")
	}
	for i := range 4 {
		objects[fmt.Sprintf("ds/part/f%d", i)] = pattern(4<<20, uint64(200+i))
	}
	put(t, store, objects)
	if err := store.Age(time.Minute); err != nil {
		t.Fatal(err)
	}
	var more []string
	for _, process := range []string{"master", "node", "worker", "controller"} {
		more = append(more, process, "--metrics-listen=unix://{dir}/run/"+process+"-metrics.sock")
	}
	a := startApart(t, store.Endpoint, append(more, "worker", "--tier={dir}/tier:64MiB", "master", "--worker-lease=3s")...)
	w := watch(t, a)
	gate := newGate(store)

	in := bucket(store, "v", "ds")
	in.Parameters["csi.storage.k8s.io/pvc/namespace"], in.Parameters["csi.storage.k8s.io/pvc/name"] = "sales", "orders"
	v, target := publish(t, a.Kubelet, in)
	data := target + "/data"

	gate.fail(slowly)
	mustShell(t, "find "+data+"/tree")
	gate.fail(nil)
	w.until("larder_metadata_requests", "larder_metadata_ahead_requests")
	w.during(gate, s3test.Get, fmt.Sprintf("cd %s/many && for f in *; do head -c 4096 $f >/dev/null & done; wait", data), "larder_fill_in_flight_bytes", "larder_fill_waiting")
	w.during(gate, s3test.Get, fmt.Sprintf("cat %[1]s/shared >/dev/null & dd if=%[1]s/shared iflag=direct bs=1M of=/dev/null; wait", data), "larder_fill_joined_chunks_total")
	mustShell(t, fmt.Sprintf("cd %s/part && for i in 1 2; do dd if=f0 iflag=direct bs=4k count=1 of=/dev/null; done", data))
	eventually(t, "a complete file is passed through", func() bool { // it is written to the disk first
		mustShell(t, "cat "+data+"/shared >/dev/null")
		e, _ := w.series("larder_fuse_passthrough_opened_bytes_total")
		return e.max > 0
	})
	w.until("larder_fuse_opens_total", "larder_volume_passthrough_opened_bytes_total", "larder_cache_complete_objects")
	socketed(t, w, target)
	mustShell(t, fmt.Sprintf("cat %[1]s/big %[1]s/many/* >/dev/null", data))
	w.until("larder_fill_memory_bytes", "larder_cache_rejected_total", "larder_cache_evicted_bytes_total", "larder_fill_ahead_bytes_total", "larder_fill_unwritten_chunks")
	w.during(gate, s3test.Get, fmt.Sprintf("cd %s/part && for f in * *; do head -c 4096 $f >/dev/null & done; wait", data), "larder_fill_in_flight_bytes")
	mustShell(t, fmt.Sprintf("cd %s/part && for i in 1 2; do for f in *; do head -c 4096 $f >/dev/null; done; done", data))
	w.until("larder_fill_complete_queue_objects", "larder_fill_completed_objects_total")
	leaves(t, w, gate, data+"/left")

	gate.fail(s3test.Refuse(http.StatusForbidden, "AccessDenied"))
	if out, err := shell(t, "cat "+data+"/refused"); err == nil || !strings.Contains(out, "Permission denied") {
		t.Errorf("a refused read: %v, %s", err, out)
	}
	gate.fail(nil)
	w.until("larder_grants_denied_total", "larder_fuse_errors_total")
	gate.fail(s3test.Refuse(http.StatusServiceUnavailable, "SlowDown"))
	reader := background(t, "cat "+data+"/down >/dev/null")
	w.until("larder_store_breakers_open", "larder_store_breaker_trips_total", "larder_store_retries_total")
	gate.fail(nil)
	if err := <-reader; err != nil {
		t.Errorf("a read while the store was away for a moment: %v", err)
	}

	tier := filepath.Join(a.dir, "tier", "objects")
	aside := func(from, to string) {
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	aside(tier, tier+".aside")
	if err := os.WriteFile(tier, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	mustShell(t, "cat "+data+"/nodisk >/dev/null")
	if err := os.Remove(tier); err != nil {
		t.Fatal(err)
	}
	aside(tier+".aside", tier)
	w.until("larder_cache_healthy", "larder_cache_errors_total")

	mustShell(t, fmt.Sprintf("sync; ls -d %s/*/* | head -3 | xargs truncate -s 0; echo 1 > /proc/sys/vm/drop_caches", tier))
	otherBoot(t, a, "two")
	a.end("worker", syscall.SIGKILL)
	a.start("worker")
	w.until("larder_takeovers_total", "larder_broker_takeover_stall_seconds_bucket", "larder_cache_unverified_bytes", "larder_cache_bad_chunks_total")

	a.more["node"] = append(a.more["node"], "--takeover-deadline=500ms")
	a.end("node", syscall.SIGTERM)
	a.start("node")
	eventually(t, "the mount is given back", func() bool {
		now, err := scrape(w.clients["node"])
		return err == nil && now["larder_broker_served_mounts"] == 1
	})
	a.end("worker", syscall.SIGKILL)
	w.until("larder_broker_given_up_mounts_total", "larder_csi_lost_mounts_total", "larder_master_workers")
	a.start("worker")
	if err := a.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := a.Unpublish(t.Context(), v); err != nil {
		t.Error(err)
	}

	names := watched(t)
	for _, name := range names {
		s, there := w.series(name)
		switch {
		case !there:
			t.Errorf("%s is watched, and no process has it", name)
		case still[name] != "" && (s.min != s.max || s.max == 0):
			t.Errorf("%s moves, or is 0: %+v; it is said to stand still because it %s", name, s, still[name])
		case still[name] == "" && s.min == s.max:
			t.Errorf("%s stays at %v whatever happens", name, s.max)
		}
	}
	for _, from := range []string{"disk", "memory", "store"} {
		if s, _ := w.series(fmt.Sprintf(`larder_volume_read_bytes_total{claim="orders",from="%s",namespace="sales"}`, from)); s.max == 0 {
			t.Errorf("no bytes of the claim from %s", from)
		}
	}
	for _, from := range []string{"passthrough", "cached"} {
		if s, _ := w.series(fmt.Sprintf(`larder_fuse_opens_total{mode="%s"}`, from)); s.max == 0 {
			t.Errorf("no opens that are %s", from)
		}
	}
}

// leaves has a reader go away before its bytes come.
func leaves(t *testing.T, w *watcher, gate *gate, file string) {
	t.Helper()
	gate.close(s3test.Get, "ds/left")
	defer gate.open()
	cmd := exec.Command("dd", "if="+file, "iflag=direct", "bs=1M", "of=/dev/null") // the kernel tells of the end of nobody who waits for a page
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	gate.awaitOne(t)
	cmd.Process.Kill()
	cmd.Wait()
	w.until("larder_fills_canceled_total")
}

// socketed reads through the domain socket.
func socketed(t *testing.T, w *watcher, target string) {
	t.Helper()
	path, err := shortcircuit.Find(filepath.Join(target, "domain"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := shortcircuit.Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	f, err := c.Open(t.Context(), "shared")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(make([]byte, 10), 0); err != nil {
		t.Error(err)
	}
	w.until("larder_socket_clients", "larder_socket_requests_total", "larder_socket_descriptors_total")
}

// background runs a script; its end is sent.
func background(t *testing.T, script string) <-chan error {
	ended := make(chan error, 1)
	go func() {
		out, err := shell(t, script)
		if err != nil {
			err = fmt.Errorf("%s: %w\n%s", script, err, out)
		}
		ended <- err
	}()
	return ended
}

// watched are the names of metrics in dashboard and alerts.
func watched(t *testing.T) []string {
	t.Helper()
	names := map[string]bool{}
	for _, file := range []string{"alerts.yaml", "dashboard.json"} {
		b, err := os.ReadFile(filepath.Join("../deploy/monitoring", file))
		if err != nil {
			t.Fatal(err)
		}
		for _, query := range regexp.MustCompile(`\bexpr"?: .*`).FindAllString(string(b), -1) {
			for _, name := range regexp.MustCompile(`larder_[a-z_]+`).FindAllString(query, -1) {
				names[name] = true
			}
		}
	}
	if len(names) < 30 {
		t.Fatalf("only %d metrics are watched", len(names))
	}
	return slices.Sorted(maps.Keys(names))
}

// gate stands before the store: it fails requests, or keeps those of a kind.
type gate struct {
	hook   atomic.Pointer[s3test.Hook]
	mu     sync.Mutex
	kind   s3test.Kind   // that is kept
	key    string        // the beginning of what came is told for
	opened chan struct{} // closed when it is not any more; nil if none is
	came   chan struct{} // has room for one
}

func newGate(store *s3test.Server) *gate {
	g := &gate{came: make(chan struct{}, 1)}
	store.SetHook(func(w http.ResponseWriter, r *http.Request, req s3test.Request, next http.Handler) {
		g.mu.Lock()
		kind, key, opened := g.kind, g.key, g.opened
		g.mu.Unlock()
		if opened != nil && req.Kind == kind {
			if strings.HasPrefix(req.Key, key) {
				select {
				case g.came <- struct{}{}:
				default:
				}
			}
			select {
			case <-opened:
			case <-r.Context().Done():
				return
			}
		}
		if h := g.hook.Load(); h != nil {
			(*h)(w, r, req, next)
			return
		}
		next.ServeHTTP(w, r)
	})
	return g
}

func (g *gate) fail(h s3test.Hook) {
	if h == nil {
		g.hook.Store(nil)
		return
	}
	g.hook.Store(&h)
}

// slowly answers as a store does that is far away.
func slowly(w http.ResponseWriter, r *http.Request, _ s3test.Request, next http.Handler) {
	select {
	case <-time.After(100 * time.Millisecond):
		next.ServeHTTP(w, r)
	case <-r.Context().Done():
	}
}

// close keeps requests of a kind; awaitOne waits for one of a key that begins so.
func (g *gate) close(kind s3test.Kind, key string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-g.came:
	default:
	}
	g.kind, g.key, g.opened = kind, key, make(chan struct{})
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.opened)
	g.opened = nil
}

func (g *gate) awaitOne(t *testing.T) {
	t.Helper()
	select {
	case <-g.came:
	case <-time.After(20 * time.Second):
		t.Fatal("no request came")
	}
}

// watcher scrapes the processes again and again.
type watcher struct {
	t       *testing.T
	clients map[string]*http.Client // by process

	mu   sync.Mutex
	seen map[string]extent // by name, its series added up; and by series
}

type extent struct{ min, max float64 }

func watch(t *testing.T, a *apart) *watcher {
	t.Helper()
	w := &watcher{t: t, clients: map[string]*http.Client{}, seen: map[string]extent{}}
	ctx, cancel := context.WithCancel(t.Context())
	var g sync.WaitGroup
	for _, process := range []string{"master", "node", "worker", "controller"} {
		client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(a.dir, "run", process+"-metrics.sock"))
		}}}
		w.clients[process] = client
		g.Go(func() {
			defer client.CloseIdleConnections()
			for tick := time.NewTicker(10 * time.Millisecond); ctx.Err() == nil; {
				if values, err := scrape(client); err == nil { // else it is away
					w.look(values)
				}
				select {
				case <-tick.C:
				case <-ctx.Done():
				}
			}
		})
	}
	t.Cleanup(func() { cancel(); g.Wait() })
	return w
}

// scrape returns what a process says, by name, its series added up, and by series.
func scrape(client *http.Client) (map[string]float64, error) {
	r, err := client.Get("http://larder/metrics")
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	values := map[string]float64{}
	lines := bufio.NewScanner(r.Body)
	for lines.Scan() {
		series, text, ok := strings.Cut(lines.Text(), " ")
		value, err := strconv.ParseFloat(text, 64)
		if !strings.HasPrefix(series, "larder_") || !ok || err != nil {
			continue
		}
		name, _, labelled := strings.Cut(series, "{")
		if values[name] += value; labelled {
			values[series] = value
		}
	}
	return values, lines.Err()
}

func (w *watcher) look(values map[string]float64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, v := range values {
		e, ok := w.seen[name]
		if !ok {
			e = extent{v, v}
		}
		w.seen[name] = extent{min(e.min, v), max(e.max, v)}
	}
}

func (w *watcher) series(name string) (extent, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	e, ok := w.seen[name]
	return e, ok
}

// until returns when all of these have moved.
func (w *watcher) until(names ...string) {
	w.t.Helper()
	for _, name := range names {
		eventually(w.t, name+" moves", func() bool { e, _ := w.series(name); return e.min != e.max })
	}
}

// during runs a script while the store keeps requests of a kind, until all of these have moved.
func (w *watcher) during(g *gate, kind s3test.Kind, script string, names ...string) {
	w.t.Helper()
	g.close(kind, "ds/")
	ended := background(w.t, script)
	g.awaitOne(w.t)
	w.until(names...)
	g.open()
	if err := <-ended; err != nil {
		w.t.Error(err)
	}
}
