package main

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestDoctorKnowsKernels(t *testing.T) {
	for release, want := range map[string]string{"5.10.0-8": bad, "6.1.0": warning, "6.9.3": warning, "6.12.1-x": ok, "7.0": ok, "odd": warning} {
		p := patient{proc: t.TempDir()}
		write(t, filepath.Join(p.proc, "sys/kernel/osrelease"), release+"\n")
		if f := p.kernel(); f.State != want || f.State == bad && f.Remedy == "" {
			t.Errorf("%s: %+v; want %s", release, f, want)
		}
	}
}

func TestDoctorReadsSysctls(t *testing.T) {
	p := patient{proc: t.TempDir()}
	if f := p.requestTimeout(); f.State != ok { // an older kernel has none
		t.Errorf("%+v", f)
	}
	write(t, filepath.Join(p.proc, "sys/fs/fuse/max_request_timeout"), "60\n")
	write(t, filepath.Join(p.proc, "sys/fs/fuse/max_pages_limit"), "32\n")
	if f := p.requestTimeout(); f.State != bad || !strings.Contains(f.Remedy, "sysctl fs.fuse.max_request_timeout=0") {
		t.Errorf("%+v", f)
	}
	if f := p.requestSize(); f.State != warning {
		t.Errorf("%+v", f)
	}
}

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestDoctorAsksStores(t *testing.T) {
	for _, c := range []struct {
		skew time.Duration
		want string
	}{{0, ok}, {time.Minute, warning}, {-time.Minute, warning}, {time.Hour, bad}, {-time.Hour, bad}} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Date", time.Now().Add(c.skew).UTC().Format(http.TimeFormat))
			w.WriteHeader(http.StatusForbidden)
		}))
		if f := store(t.Context(), s.URL); f.State != c.want {
			t.Errorf("%v: %+v; want %s", c.skew, f, c.want)
		}
		s.Close()
		if f := store(t.Context(), s.URL); f.State != bad || f.Remedy == "" {
			t.Errorf("closed: %+v", f)
		}
	}
}
