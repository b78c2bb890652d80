package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker"
	"github.com/larderfs/larder/cacheworker/cachestore"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/master"
)

func logger(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
}

// running runs f until the test ends or stop is called.
func running(t *testing.T, f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx); close(done) }()
	stop = func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return stop
}

func startMaster(t *testing.T) (target string) {
	m, err := master.New(master.Config{Dir: filepath.Join(t.TempDir(), "m"), Listen: "127.0.0.1:0", WorkerLease: time.Second, Log: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	running(t, m.Run)
	<-m.Ready()
	return m.Addr()
}

// cached is a tier in which those objects are complete.
func cached(t *testing.T, objects ...object.Object) (dir string) {
	dir = t.TempDir()
	s, err := cachestore.Open(cachestore.Config{Dir: dir, CapacityBytes: 1 << 30, Log: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range objects {
		f, err := s.Open(o)
		if err != nil {
			t.Fatal(err)
		}
		for i := range o.Chunks() {
			err = errors.Join(err, f.Put(i, make([]byte, o.ChunkLen(i))))
		}
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

func sale(host, key string, size int64) object.Object {
	return object.Object{Store: object.Store("s3://" + host + "/b"), Key: key, Version: "1", Size: size}
}

// startWorker runs a real worker; that it has no broker keeps it from mounts only.
func startWorker(t *testing.T, node, master, tier string) (stop func()) {
	run := t.TempDir()
	w, err := cacheworker.New(cacheworker.Config{Node: node, Tiers: []cacheworker.Tier{{Dir: tier, CapacityBytes: 1 << 30}}, Master: master, Listen: ":0",
		BrokerSocket: filepath.Join(run, "broker.sock"), ControlSocket: filepath.Join(run, "worker.sock"), Version: "test", Log: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	return running(t, w.Run)
}

// larder runs a command in this process.
func larder(ctx context.Context, out io.Writer, args ...string) error {
	cmd := root()
	cmd.SetArgs(args)
	cmd.SetOut(out)
	return cmd.ExecuteContext(ctx)
}

func asked[T any](t *testing.T, args ...string) (v T) {
	t.Helper()
	var out strings.Builder
	if err := larder(t.Context(), &out, append(args, "-o", "json")...); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(out.String()), &v); err != nil {
		t.Fatalf("%v: %s", err, &out)
	}
	return v
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestLocateAndTopAskARealMasterAndTwoRealWorkers(t *testing.T) {
	const mib = 1 << 20
	m := startMaster(t)
	tier1 := cached(t, sale("s3:1", "sales/1", 3*mib), sale("s3:1", "sales/2", 10), sale("s3:1", "other", mib))
	tier2 := cached(t, sale("s3:1", "sales/2", 10), sale("s3:2", "sales/2", 7))
	stop1 := startWorker(t, "n1", m, tier1)
	startWorker(t, "n2", m, tier2)
	locate := func(uri string, more ...string) location {
		return asked[location](t, append([]string{"locate", "--master", m, uri}, more...)...)
	}
	eventually(t, "both workers answer", func() bool {
		l := locate("s3://b")
		return len(l.Nodes) == 2 && l.Nodes[0].Unanswered+l.Nodes[1].Unanswered == ""
	})
	for _, c := range []struct {
		args []string
		want string // node bytes/objects, most first
	}{
		{[]string{"s3://b/sales"}, "n1 3145738/2 n2 17/2"},
		{[]string{"s3://b/sales/2"}, "n2 17/2 n1 10/1"},
		{[]string{"s3://b/sales/2", "--endpoint", "http://s3:1"}, "n1 10/1 n2 10/1"},
		{[]string{"s3://b/sales/2", "--endpoint", "http://S3:2"}, "n2 7/1 n1 0/0"},
		{[]string{"s3://b/"}, "n1 4194314/3 n2 17/2"},
		{[]string{"s3://b/other/"}, "n1 0/0 n2 0/0"},
		{[]string{"file:///b"}, "n1 0/0 n2 0/0"},
	} {
		var got []string
		for _, n := range locate(c.args[0], c.args[1:]...).Nodes {
			got = append(got, fmt.Sprintf("%s %d/%d", n.Node, n.CachedBytes, n.Objects))
			if n.Complete != n.Objects {
				t.Errorf("%v: %+v", c.args, n)
			}
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%v: %v; want %s", c.args, got, c.want)
		}
	}
	if err := larder(t.Context(), io.Discard, "locate", "--master", m, "b/sales"); err == nil || !strings.Contains(err.Error(), "s3, file") {
		t.Errorf("no URI: %v", err)
	}

	s := asked[workersStatus](t, "top", "--master", m, "--interval", "100ms")
	if w := s.Workers[0]; len(s.Workers) != 2 || w.Node != "n1" || w.State != stateOK || w.CachedBytes != 4*mib+10 || w.Objects != 3 ||
		w.CapacityBytes != 1<<30 || w.FetchBytesPerSec == nil || !strings.HasPrefix(w.Addresses[0], "127.0.0.1:") {
		t.Errorf("top: %+v", s)
	}

	if l := asked[[]workerEntry](t, "worker", "ls", "--master", m); len(l) != 2 || l[1].Node != "n2" || l[1].Gone || l[1].Version != "test" {
		t.Errorf("worker ls: %+v", l)
	}
	if l := asked[[]volumeEntry](t, "volume", "ls", "--master", m); len(l) != 0 {
		t.Errorf("volume ls: %+v", l)
	}

	stop1() // and started again: another port, another process, the same cache
	before := s.Workers[0]
	startWorker(t, "n1", m, tier1)
	eventually(t, "the restarted worker is followed", func() bool {
		w := asked[workersStatus](t, "top", "--master", m, "--interval", "100ms").Workers[0]
		return w.State == stateOK && w.Started.After(before.Started) && w.Worker == before.Worker && w.Addresses[0] != before.Addresses[0]
	})
	if l := locate("s3://b/sales"); l.CachedBytes != 3*mib+10+17 {
		t.Errorf("after the restart: %+v", l)
	}
}

func TestAWorkerThatIsAwayIsNamed(t *testing.T) {
	m := startMaster(t)
	stop := startWorker(t, "n1", m, cached(t))
	var out strings.Builder
	eventually(t, "it answers", func() bool {
		out.Reset()
		return larder(t.Context(), &out, "top", "--master", m, "--interval", "100ms") == nil && strings.Contains(out.String(), "127.0.0.1:")
	})
	stop()
	for _, when := range []string{"no answer from 127.0.0.1:", "gone since "} {
		eventually(t, when, func() bool {
			out.Reset()
			return larder(t.Context(), &out, "top", "--master", m, "--interval", "100ms") == nil && strings.Contains(out.String(), when)
		})
	}
}

// pseudoTerminal gives both ends of one.
func pseudoTerminal(t *testing.T) (keyboard, screen *os.File) {
	t.Helper()
	keyboard, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { keyboard.Close() })
	fd := int(keyboard.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	err = errors.Join(err, unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0), unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 10, Col: 60}))
	if err != nil {
		t.Fatal(err)
	}
	screen, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { screen.Close() })
	return keyboard, screen
}

func TestTopRefreshesATerminalUntilItIsInterrupted(t *testing.T) {
	m := startMaster(t)
	startWorker(t, "n1", m, cached(t))
	keyboard, screen := pseudoTerminal(t)
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	done := make(chan error, 1)
	go func() {
		err := larder(ctx, screen, "top", "--master", m, "--interval", "100ms")
		io.WriteString(screen, "the end")
		done <- err
	}()
	var seen strings.Builder
	buf := make([]byte, 4096)
	frames := 0
	for !strings.Contains(seen.String(), "the end") {
		n, err := keyboard.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		seen.Write(buf[:n])
		if frames = strings.Count(seen.String(), home); frames == 4 {
			interrupt()
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if s := seen.String(); !strings.HasPrefix(s, otherScreen) || !strings.HasSuffix(s, thisScreen+"the end") || !strings.Contains(s, "NODE") && !strings.Contains(s, "no worker") {
		t.Errorf("%q", s)
	}
}
