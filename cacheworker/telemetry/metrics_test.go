package telemetry

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// serve answers on a loopback port until the test ends, and returns how to ask.
func serve(t *testing.T, h http.Handler) (get func(path string) (int, string)) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, h) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return func(path string) (int, string) {
		t.Helper()
		r, err := http.Get("http://" + l.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return r.StatusCode, string(b)
	}
}

func TestWhatATableHasIsScraped(t *testing.T) {
	table := []Metric{
		{Name: "larder_a_total", Help: "As.", Labels: []string{"x"}},
		{Name: "larder_b", Help: "Bs."},
		{Name: "larder_c_seconds", Help: "Cs.", Labels: []string{"m", "k"}, Histogram: true},
	}
	if wrong := Check(table); len(wrong) > 0 {
		t.Error(wrong)
	}
	var cs Latencies
	cs.With("one", "two").Observe(20 * time.Millisecond)
	cs.With("one", "two").Observe(40 * time.Millisecond)
	cs.With("one", "two").Observe(time.Hour)
	c := NewCollector(table, func(s Scrape) {
		s.Set("larder_a_total", 7, "y")
		s.Is("larder_b", true)
		s.Latencies("larder_c_seconds", &cs)
	})
	get := serve(t, Handler(NewRegistry(c, Info("test", "v1")), Probes{}))
	code, body := get("/metrics")
	for _, want := range []string{
		"# HELP larder_a_total As.\n# TYPE larder_a_total counter\nlarder_a_total{x=\"y\"} 7\n",
		"# TYPE larder_b gauge\nlarder_b 1\n",
		`larder_c_seconds_bucket{k="two",m="one",le="0.01"} 0`, `larder_c_seconds_bucket{k="two",m="one",le="0.03"} 1`,
		`larder_c_seconds_bucket{k="two",m="one",le="300"} 2`, `larder_c_seconds_bucket{k="two",m="one",le="+Inf"} 3`,
		`larder_c_seconds_sum{k="two",m="one"} 3600.06`, `larder_build_info{process="test",version="v1"} 1`, "go_goroutines",
	} {
		if code != http.StatusOK || !strings.Contains(body, want) {
			t.Errorf("%d, without %q:\n%s", code, want, body)
		}
	}
}

func TestWhatNoTableHasIsAMistake(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("a metric without a row in the table was set")
		}
	}()
	Scrape{c: NewCollector(nil, nil)}.Set("larder_unheard_of", 1)
}

func TestCheckFindsWhatPrometheusWouldNotLike(t *testing.T) {
	for _, m := range []Metric{
		{Name: "cache_bytes", Help: "Fine."},
		{Name: "larder_Cache", Help: "Fine."},
		{Name: "larder_bytes_read", Help: "Fine."},
		{Name: "larder_total_bytes", Help: "Fine."},
		{Name: "larder_calls", Help: "Fine.", Histogram: true},
		{Name: "larder_a", Help: "no sentence"},
	} {
		if len(Check([]Metric{m})) != 1 {
			t.Errorf("%+v: %v", m, Check([]Metric{m}))
		}
	}
	if wrong := Check([]Metric{{Name: "larder_read_bytes_total", Help: "Fine."}, {Name: "larder_read_bytes_total", Help: "Fine."}}); len(wrong) != 1 {
		t.Errorf("one name twice: %v", wrong)
	}
}

func TestProbesTellLifeFromReadiness(t *testing.T) {
	get := serve(t, Handler(NewRegistry(), Probes{Ready: func(context.Context) error { return errors.New("no broker") }}))
	if code, body := get("/healthz"); code != http.StatusOK || body != "ok\n" {
		t.Errorf("healthz: %d %s", code, body)
	}
	if code, body := get("/readyz"); code != http.StatusServiceUnavailable || body != "no broker\n" {
		t.Errorf("readyz: %d %s", code, body)
	}
	if code, _ := get("/debug/pprof/"); code != http.StatusNotFound {
		t.Errorf("profiles are served beside the metrics: %d", code)
	}
}

func TestProfilesAreLocal(t *testing.T) {
	for addr, ok := range map[string]bool{
		"127.0.0.1:6060": true, "[::1]:6060": true, "unix:///run/x.sock": true,
		":6060": false, "0.0.0.0:6060": false, "10.0.0.1:6060": false, "localhost:6060": false, "unix://x": false, "6060": false,
	} {
		if err := CheckLocal(addr); (err == nil) != ok {
			t.Errorf("%s: %v", addr, err)
		}
	}
	get := serve(t, Profiles())
	if code, body := get("/debug/pprof/goroutine?debug=1"); code != http.StatusOK || !strings.Contains(body, "goroutine profile") {
		t.Errorf("%d %s", code, body)
	}
}

func BenchmarkObserve(b *testing.B) {
	var l Latency
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			l.Observe(5 * time.Millisecond)
		}
	})
}
