package master_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/larderfs/larder/master"
	"github.com/larderfs/larder/master/client"
)

// trio is three masters in processes of their own.
type trio struct {
	dirs, env [3]string
	cmds      [3]*exec.Cmd
}

func startTrio(t *testing.T) *trio {
	t.Helper()
	var x trio
	var entries, listen [3]string
	for i := range 3 {
		listen[i] = freePort(t)
		entries[i] = fmt.Sprintf("m%d=http://%s", i, listen[i])
	}
	var ready [3]func()
	for i := range 3 {
		x.dirs[i] = t.TempDir()
		_, port, err := net.SplitHostPort(listen[i])
		if err != nil {
			t.Fatal(err)
		}
		text, err := json.Marshal(master.Member{Name: fmt.Sprint("m", i), Cluster: strings.Join(entries[:], ","), Listen: ":" + port})
		if err != nil {
			t.Fatal(err)
		}
		x.env[i] = childMember + "=" + string(text)
		x.cmds[i], ready[i] = launch(t, x.dirs[i], x.env[i])
	}
	for i := range 3 {
		ready[i]()
	}
	return &x
}

func (x *trio) target(i int) string { return "unix://" + filepath.Join(x.dirs[i], "sock") }

func (x *trio) targets() string {
	return strings.Join([]string{x.target(0), x.target(1), x.target(2)}, ",")
}

func (x *trio) kill(i int) {
	x.cmds[i].Process.Signal(syscall.SIGKILL)
	x.cmds[i].Wait()
}

func (x *trio) restart(t *testing.T, i int) {
	t.Helper()
	var ready func()
	x.cmds[i], ready = launch(t, x.dirs[i], x.env[i])
	ready()
}

// insist creates volumes until ctx ends, each until it is acknowledged, and says so.
func (l *ledger) insist(ctx context.Context, c *client.Client, prefix string, acknowledged *atomic.Int64) error {
	for n := 0; ctx.Err() == nil; {
		name := fmt.Sprint(prefix, n)
		v, err := c.CreateVolume(ctx, client.VolumeSpec{Name: name, Parameters: params("source", "s3://b/"+name), CapacityBytes: int64(n)})
		switch {
		case err == nil:
			l.mu.Lock()
			l.have[v.ID] = v
			l.mu.Unlock()
			acknowledged.Add(1)
			n++
		case ctx.Err() == nil && !errors.Is(err, client.ErrUnavailable):
			return err
		}
	}
	return nil
}

func TestOneOfThreeMastersMayGo(t *testing.T) {
	x := startTrio(t)
	c := dial(t, x.targets())
	l := &ledger{have: map[string]client.Volume{}, gone: map[string]bool{}, open: map[string]bool{}}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	register(t, c, worker("n1", 1000))
	var wg sync.WaitGroup
	var acknowledged atomic.Int64
	for w := range 2 {
		wg.Go(func() {
			if err := l.insist(ctx, c, fmt.Sprint("v", w, "-"), &acknowledged); err != nil {
				t.Errorf("create: %v", err)
			}
		})
	}
	killed := 3 // one of them leads
	if testing.Short() {
		killed = 1
	}
	for i := range killed {
		had := acknowledged.Load()
		eventually(t, "volumes are made", func() bool { return acknowledged.Load() > had+20 })
		x.kill(i)
		had, killed := acknowledged.Load(), time.Now()
		eventually(t, "volumes are made without it", func() bool { return acknowledged.Load() > had+20 })
		t.Logf("20 more volumes %v after the end of m%d", time.Since(killed).Round(time.Millisecond), i)
		x.restart(t, i)
	}
	stop()
	wg.Wait()
	for i := range 3 {
		alone := dial(t, x.target(i))
		l.check(t, alone)
		if ws, err := alone.Workers(t.Context()); err != nil || len(ws) != 1 {
			t.Errorf("m%d knows the workers %+v, %v", i, ws, err)
		}
		const open = 2 // made when stop came, and not acknowledged
		if s, err := alone.Status(t.Context()); err != nil || !s.Embedded || s.Volumes < int64(len(l.have)) || s.Volumes > int64(len(l.have))+open {
			t.Errorf("m%d: %+v, %v; want %d volumes", i, s, err, len(l.have))
		}
	}
}

func TestAMajorityIsNeeded(t *testing.T) {
	x := startTrio(t)
	c := dial(t, x.targets())
	x.kill(0)
	x.kill(2)
	short, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if _, err := c.CreateVolume(short, client.VolumeSpec{Name: "v"}); !errors.Is(err, client.ErrUnavailable) {
		t.Errorf("one of three: %v", err)
	}
	x.restart(t, 2)
	if _, err := c.CreateVolume(t.Context(), client.VolumeSpec{Name: "v"}); err != nil {
		t.Errorf("two of three: %v", err)
	}
	// The third comes without its disk. It must not vote: it may have forgotten what it acknowledged.
	if err := os.RemoveAll(filepath.Join(x.dirs[0], "state")); err != nil {
		t.Fatal(err)
	}
	cmd, _ := launch(t, x.dirs[0], x.env[0])
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("a member without its disk ends well")
		}
	case <-time.After(30 * time.Second):
		t.Fatal("a member without its disk goes on")
	}
	if _, err := c.CreateVolume(t.Context(), client.VolumeSpec{Name: "w"}); err != nil {
		t.Errorf("two of three, and one that may not: %v", err)
	}
}

func TestAStoreOfOneIsNoMemberOfThree(t *testing.T) {
	m := start(t, master.Config{})
	m.stop(t)
	cfg := m.cfg
	cfg.Member = master.Member{Name: "a", Cluster: "a=http://127.0.0.1:1,b=http://127.0.0.1:2,c=http://127.0.0.1:3", Listen: freePort(t)}
	again, err := master.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := again.Run(ctx); err == nil || !strings.Contains(err.Error(), "of 1 masters, the configuration of 3") {
		t.Errorf("run: %v", err)
	}
}

func TestValidateNamesTheMistakesOfAMember(t *testing.T) {
	three := "a=http://h1:1,b=http://h2:1,c=http://h3:1"
	for _, c := range []struct {
		member  master.Member
		mistake string
	}{
		{master.Member{Name: "a", Cluster: three, Listen: ":2380"}, ""},
		{master.Member{Name: "a", Cluster: strings.ReplaceAll(three, "http:", "https:"), Listen: ":2380", CAFile: "ca", CertFile: "c", KeyFile: "k"}, ""},
		{master.Member{Name: "d", Cluster: three, Listen: ":2380"}, `name "d" is not in`},
		{master.Member{Cluster: three, Listen: ":2380"}, `name "" is not in`},
		{master.Member{Name: "a", Listen: ":2380"}, "name=http://"},
		{master.Member{Name: "a", Cluster: "a=http://h1:1,b=http://h2:1", Listen: ":2380"}, "odd number"},
		{master.Member{Name: "a", Cluster: three + ",a=http://h4:1", Listen: ":2380"}, `"a" is named twice`},
		{master.Member{Name: "a", Cluster: "a=h1:1", Listen: ":2380"}, `"a=h1:1": want`},
		{master.Member{Name: "a", Cluster: three, Listen: "2380"}, `peer listen "2380"`},
		{master.Member{Name: "a", Cluster: strings.Replace(three, "http:", "https:", 1), Listen: ":2380"}, "for all"},
		{master.Member{Name: "a", Cluster: three, Listen: ":2380", CAFile: "ca", CertFile: "c", KeyFile: "k"}, "for all"},
		{master.Member{Name: "a", Cluster: three, Listen: ":2380", CertFile: "c"}, "or none"},
		{master.Member{CertFile: "c"}, "peer certificates"},
	} {
		err := master.Config{Dir: "/d", Listen: ":1", Member: c.member}.Validate()
		if (err == nil) != (c.mistake == "") || err != nil && !strings.Contains(err.Error(), c.mistake) {
			t.Errorf("%+v: %v; want %q", c.member, err, c.mistake)
		}
	}
	err := master.Config{EtcdEndpoints: []string{"https://e"}, Listen: ":1", Member: master.Member{Name: "a", Cluster: three, Listen: ":1"}}.Validate()
	if err == nil || !strings.Contains(err.Error(), "not both") {
		t.Errorf("external and embedded: %v", err)
	}
}
