package master_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"github.com/larderfs/larder/master"
	"github.com/larderfs/larder/master/client"
)

// childDir, set in the environment, makes the test binary a master that is meant to be killed.
const (
	childDir    = "LARDER_TEST_MASTER_DIR"
	childMember = "LARDER_TEST_MASTER_MEMBER" // JSON; of several masters
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		if err := child(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func child(dir string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	var member master.Member
	if text := os.Getenv(childMember); text != "" {
		if err := json.Unmarshal([]byte(text), &member); err != nil {
			return err
		}
	}
	m, err := master.New(master.Config{Dir: filepath.Join(dir, "state"), Listen: "unix://" + filepath.Join(dir, "sock"), Member: member})
	if err != nil {
		return err
	}
	go func() {
		<-m.Ready()
		fmt.Println("ready")
	}()
	return m.Run(ctx)
}

// spawn starts a child and waits until it is ready.
func spawn(t *testing.T, dir string) *exec.Cmd {
	t.Helper()
	cmd, ready := launch(t, dir)
	ready()
	return cmd
}

// launch starts a child; ready waits until it is.
func launch(t *testing.T, dir string, env ...string) (cmd *exec.Cmd, ready func()) {
	t.Helper()
	cmd = exec.Command(os.Args[0])
	cmd.Env = append(append(os.Environ(), childDir+"="+dir), env...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd, func() {
		t.Helper()
		if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
			t.Fatalf("child: %q, %v", line, err)
		}
	}
}

// ledger is what a master acknowledged.
type ledger struct {
	mu   sync.Mutex
	have map[string]client.Volume // created and not deleted
	gone map[string]bool          // deleted
	open map[string]bool          // asked for, and not answered: either is right
}

// load creates and deletes volumes until the master is gone.
func (l *ledger) load(ctx context.Context, c *client.Client, prefix string) error {
	for n := 0; ; n++ {
		name := fmt.Sprint(prefix, n)
		v, err := c.CreateVolume(ctx, client.VolumeSpec{Name: name, Parameters: params("source", "s3://b/"+name), CapacityBytes: int64(n)})
		if err != nil {
			return l.stopped(err)
		}
		l.mu.Lock()
		l.have[v.ID] = v
		l.mu.Unlock()
		if n%3 != 0 {
			continue
		}
		l.mu.Lock()
		delete(l.have, v.ID)
		l.open[v.ID] = true
		l.mu.Unlock()
		if err := c.DeleteVolume(ctx, v.ID); err != nil {
			return l.stopped(err)
		}
		l.mu.Lock()
		delete(l.open, v.ID)
		l.gone[v.ID] = true
		l.mu.Unlock()
	}
}

func (l *ledger) stopped(err error) error {
	if errors.Is(err, client.ErrUnavailable) {
		return nil
	}
	return err
}

func (l *ledger) check(t *testing.T, c *client.Client) {
	t.Helper()
	for id, want := range l.have {
		got, err := c.Volume(t.Context(), id)
		if err != nil || got.Name != want.Name || got.CapacityBytes != want.CapacityBytes || !got.Created.Equal(want.Created) {
			t.Fatalf("acknowledged %+v; got %+v, %v", want, got, err)
		}
	}
	for id := range l.gone {
		if _, err := c.Volume(t.Context(), id); !errors.Is(err, client.ErrNotFound) {
			t.Fatalf("deleted %s; got %v", id, err)
		}
	}
}

func TestWhatWasAcknowledgedSurvivesSIGKILL(t *testing.T) {
	const rounds = 15
	dir := t.TempDir()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	l := &ledger{have: map[string]client.Volume{}, gone: map[string]bool{}, open: map[string]bool{}}
	c := dial(t, "unix://"+filepath.Join(dir, "sock"))
	for round := range rounds {
		cmd := spawn(t, dir)
		eventually(t, "reconnected", func() bool {
			_, err := c.Status(t.Context())
			return err == nil
		})
		l.check(t, c)
		var wg sync.WaitGroup
		for w := range 4 {
			wg.Go(func() {
				if err := l.load(t.Context(), c, fmt.Sprint(round, "-", w, "-")); err != nil {
					t.Errorf("load: %v", err)
				}
			})
		}
		kill := time.AfterFunc(time.Duration(random.IntN(100))*time.Millisecond, func() { cmd.Process.Signal(syscall.SIGKILL) })
		cmd.Wait()
		kill.Stop()
		wg.Wait()
	}
	cmd := spawn(t, dir)
	eventually(t, "reconnected", func() bool {
		_, err := c.Status(t.Context())
		return err == nil
	})
	l.check(t, c)
	t.Logf("%d volumes kept, %d deleted, %d open", len(l.have), len(l.gone), len(l.open))
	if len(l.have) < rounds || len(l.gone) < rounds/3 {
		t.Errorf("%d kept and %d deleted in %d rounds: nothing was tried", len(l.have), len(l.gone), rounds)
	}
	cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Errorf("SIGTERM: %v", err)
	}
}

func TestAMasterWithAnExternalEtcdWaitsForItAndSharesIt(t *testing.T) {
	cfg, endpoint := externalEtcd(t)
	a := start(t, master.Config{EtcdEndpoints: []string{endpoint}, EtcdPrefix: "team/larder/"})
	short, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if _, err := a.Client.Status(short); !errors.Is(err, client.ErrUnavailable) {
		t.Errorf("without etcd: %v", err)
	}
	etcd, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(etcd.Close)
	eventually(t, "etcd reached", func() bool {
		_, err := a.Client.Status(t.Context())
		return err == nil
	})
	b := start(t, master.Config{EtcdEndpoints: []string{endpoint}, EtcdPrefix: "team/larder/"})
	register(t, a.Client, worker("n1", 100))

	var wg sync.WaitGroup
	for i := range 40 {
		c := []*client.Client{a.Client, b.Client}[i%2]
		wg.Go(func() {
			_, err := c.CreateVolume(t.Context(), client.VolumeSpec{Name: fmt.Sprint(i / 2), CapacityBytes: 10, Nodes: []string{"n1"}})
			if err != nil && !errors.Is(err, client.ErrExhausted) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	vs, _, err := b.Volumes(t.Context(), 0, "")
	if err != nil || len(vs) != 10 {
		t.Errorf("%d volumes, %v; want 10", len(vs), err)
	}
	if s, err := b.Client.Status(t.Context()); err != nil || s.Embedded || s.Workers != 1 || s.Volumes != 10 || s.StoreBytes == 0 {
		t.Errorf("status %+v, %v", s, err)
	}
}

// externalEtcd is one that is not started yet.
func externalEtcd(t *testing.T) (cfg *embed.Config, endpoint string) {
	t.Helper()
	cfg = embed.NewConfig()
	cfg.Dir = t.TempDir()
	cfg.Name = "external"
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.ListenPeerUrls = nil
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	cfg.TickMs, cfg.ElectionMs = 20, 100
	free := freePort(t)
	cfg.ListenClientUrls[0].Host = free
	cfg.AdvertiseClientUrls[0].Host = free
	return cfg, "http://" + free
}

func TestADamagedStoreIsAnErrorNotAnExit(t *testing.T) {
	for name, file := range map[string]string{"log": "member/wal/*.wal", "data base": "member/snap/db"} {
		t.Run(name, func(t *testing.T) {
			m := start(t, master.Config{})
			if _, err := m.CreateVolume(t.Context(), client.VolumeSpec{Name: "v"}); err != nil {
				t.Fatal(err)
			}
			m.stop(t)
			found, err := filepath.Glob(filepath.Join(m.cfg.Dir, "etcd", file))
			if err != nil || len(found) != 1 {
				t.Fatal(found, err)
			}
			damage(t, found[0])
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			again, err := master.New(m.cfg)
			if err != nil {
				t.Fatal(err)
			}
			if err := again.Run(ctx); err == nil || !strings.Contains(err.Error(), "open store: ") {
				t.Errorf("run: %v", err)
			} else {
				t.Log(err)
			}
			if _, err := os.Stat(strings.TrimPrefix(m.cfg.Listen, "unix://")); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("socket: %v", err)
			}
		})
	}
}

func damage(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for off := int64(0); off < 16<<10; off += 64 {
		if _, err := f.WriteAt([]byte("damage"), off); err != nil {
			t.Fatal(err)
		}
	}
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
