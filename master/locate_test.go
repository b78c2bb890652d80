package master_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"reflect"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/larderfs/larder/master"
	"github.com/larderfs/larder/master/client"
	"github.com/larderfs/larder/master/inventory"
	"github.com/larderfs/larder/master/masterpb"
	"github.com/larderfs/larder/master/record"
)

// shelf is a worker that holds what it says; the real one is tested in package cacheworker.
type shelf struct {
	stats record.Stats
	held  map[string]record.Held // by URI

	volumes map[string]record.MountedVolume
}

func (s shelf) Counters() record.Stats { return s.stats }

func (s shelf) Volume(_ context.Context, id string) (record.MountedVolume, error) {
	if v, ok := s.volumes[id]; ok {
		return v, nil
	}
	return record.MountedVolume{}, fmt.Errorf("volume %s is not served here: %w", id, record.ErrNotFound)
}

func (s shelf) Held(ctx context.Context, at record.Location) (record.Held, error) {
	if at.Path == "slow" {
		<-ctx.Done()
		return record.Held{}, ctx.Err()
	}
	return s.held[at.URI], nil
}

// serve runs a worker's inventory until the test ends or stop is called.
func serve(t *testing.T, reg *client.Registration, w inventory.Worker) (stop func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	reg.Addresses, reg.Key = []string{l.Addr().String()}, inventory.NewKey()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	uuid, key := reg.UUID, reg.Key
	go func() { done <- inventory.Serve(ctx, l, uuid, key, w) }()
	stop = func() {
		cancel()
		if err, ok := <-done; ok && err != nil {
			t.Errorf("serve: %v", err)
		}
		done = nil
	}
	t.Cleanup(func() {
		if done != nil {
			stop()
		}
	})
	return stop
}

// deaf accepts connections and never answers.
func deaf(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.Addr().String()
}

func TestLocateSumsUpWhoAnswersAndNamesWhoDoesNot(t *testing.T) {
	m := start(t, master.Config{})
	regs := []client.Registration{worker("n1", 1), worker("n2", 1), worker("n3", 1), worker("n4", 1), worker("n5", 1)}
	sales := record.Held{CachedBytes: 10, Objects: 2, CompleteObjects: 1, Stores: 1}
	serve(t, &regs[0], shelf{held: map[string]record.Held{"s3://b/sales": sales}})
	serve(t, &regs[1], shelf{})
	regs[2].Addresses = []string{deaf(t)}
	impostor := worker("n4", 1)
	serve(t, &impostor, shelf{})
	regs[3].Addresses, regs[3].Key = impostor.Addresses, impostor.Key
	register(t, m.Client, regs...)

	got, err := m.Locate(t.Context(), "s3://b/sales", "")
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct {
		held record.Held
		why  string
	}{
		{held: sales}, {}, {why: "no answer from " + regs[2].Addresses[0]}, {why: "another worker"}, {why: "no address"},
	} {
		l := got[i]
		if l.Node != regs[i].Node || l.UUID != regs[i].UUID || l.Held != want.held || (l.Unanswered == "") != (want.why == "") || !strings.Contains(l.Unanswered, want.why) {
			t.Errorf("%+v; want %+v", l, want)
		}
	}
	if _, err := m.Locate(t.Context(), "sales", ""); !errors.Is(err, client.ErrInvalid) {
		t.Errorf("no URI: %v", err)
	}
}

func TestAVolumeIsDescribedByTheWorkersThatHaveIt(t *testing.T) {
	m := start(t, master.Config{})
	regs := []client.Registration{worker("n1", 1), worker("n2", 1), worker("n3", 1), worker("n4", 1)}
	on := client.Published{Volume: client.Volume{ID: "csi-1"}, Inline: true, Pods: []client.Pod{{Namespace: "prod", Name: "p", UID: "u"}}}
	for _, i := range []int{0, 2, 3} {
		regs[i].Volumes = []client.Published{on}
	}
	at := time.Date(2026, 11, 23, 4, 5, 6, 0, time.UTC)
	said := record.MountedVolume{
		Parameters: map[string]string{"source": "s3://b"}, Inline: true, Namespace: "prod", Claim: "orders", Mounted: at, Takeovers: 3,
		LongestStall: 20 * time.Millisecond, Trouble: "none to speak of", Without: []string{"resend"}, OpenFiles: 4, Counted: at.Add(time.Second),
		DiskBytes: 5, MemoryBytes: 6, StoreBytes: 7, PassedBytes: 8, FetchedBytes: 9, HitChunks: 10, MissChunks: 11,
	}
	serve(t, &regs[0], shelf{volumes: map[string]record.MountedVolume{"csi-1": said}})
	serve(t, &regs[1], shelf{})
	serve(t, &regs[2], shelf{}) // it has been unmounted there meanwhile
	register(t, m.Client, regs...)
	got, err := m.DescribeVolume(t.Context(), "csi-1")
	if err != nil || len(got) != 3 {
		t.Fatalf("%+v, %v", got, err)
	}
	if want := (client.VolumeOnNode{Node: "n1", UUID: regs[0].UUID, Pods: on.Pods, Volume: said}); !reflect.DeepEqual(got[0], want) {
		t.Errorf("%+v; want %+v", got[0], want)
	}
	for i, why := range map[int]string{1: "is not served here", 2: "no address"} {
		if !strings.Contains(got[i].Unanswered, why) || got[i].Volume.Parameters != nil {
			t.Errorf("%+v; want %q", got[i], why)
		}
	}
	if got, err := m.DescribeVolume(t.Context(), "nobody's"); err != nil || len(got) != 0 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestOnlyTheMasterMayAskAWorker(t *testing.T) {
	m := start(t, master.Config{})
	reg := worker("n1", 1)
	serve(t, &reg, shelf{stats: record.Stats{CachedBytes: 5}})
	register(t, m.Client, reg)
	for _, asked := range []func() ([]client.Worker, error){
		func() ([]client.Worker, error) { return m.Workers(t.Context()) },
		func() ([]client.Worker, error) { return m.AllWorkers(t.Context(), true) },
	} {
		if ws, err := asked(); err != nil || len(ws) != 1 || ws[0].Key != "" {
			t.Errorf("the key is told: %+v, %v", ws, err)
		}
	}
	conn, err := grpc.NewClient(reg.Addresses[0], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	rpc := masterpb.NewInventoryClient(conn)
	for _, shown := range []string{"", "Bearer ", "Bearer " + inventory.NewKey(), reg.Key} {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", shown)
		_, err1 := rpc.Counters(ctx, &masterpb.CountersRequest{})
		_, err2 := rpc.Held(ctx, &masterpb.HeldRequest{Uri: "s3://b"})
		_, err3 := rpc.Volume(ctx, &masterpb.MountedVolumeRequest{Id: "v"})
		if status.Code(err1) != codes.Unauthenticated || status.Code(err2) != codes.Unauthenticated || status.Code(err3) != codes.Unauthenticated {
			t.Errorf("shown %q: %v, %v, %v", shown, err1, err2, err3)
		}
	}
	ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+reg.Key)
	if c, err := rpc.Counters(ctx, &masterpb.CountersRequest{}); err != nil || c.GetStats().GetCachedBytes() != 5 {
		t.Errorf("with the key: %v, %v", c, err)
	}
	if _, err := rpc.Held(ctx, &masterpb.HeldRequest{Uri: "../x"}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("no URI: %v", err)
	}
}

func TestLiveCountersAreAsOfNow(t *testing.T) {
	m := start(t, master.Config{})
	regs := []client.Registration{worker("n1", 1), worker("n2", 1)}
	began := time.Now().Add(-time.Hour).UTC()
	now := record.Stats{CachedBytes: 7, FetchedBytes: 8, Mounts: 2, Started: began}
	serve(t, &regs[0], shelf{stats: now})
	regs[1].Addresses = []string{deaf(t)}
	register(t, m.Client, regs...) // their heartbeats tell zeros
	ws, err := m.AllWorkers(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(ws[0].Stats, now) || ws[0].Unanswered != "" {
		t.Errorf("%+v; want %+v", ws[0], now)
	}
	if ws[1].Unanswered == "" || ws[1].Gone {
		t.Errorf("who does not answer: %+v", ws[1])
	}
}

func TestAWorkerWithANewAddressIsAskedThere(t *testing.T) {
	m := start(t, master.Config{})
	reg := worker("n1", 1)
	stopServing := serve(t, &reg, shelf{stats: record.Stats{CachedBytes: 1}})
	stopTelling := register(t, m.Client, reg)
	if ws, err := m.AllWorkers(t.Context(), true); err != nil || ws[0].Stats.CachedBytes != 1 {
		t.Fatalf("before: %+v, %v", ws, err)
	}
	stopTelling() // it dies, and is started again elsewhere: nothing waits for the lease
	stopServing()
	serve(t, &reg, shelf{stats: record.Stats{CachedBytes: 2}})
	register(t, m.Client, reg)
	eventually(t, "asked at the new address", func() bool {
		ws, err := m.AllWorkers(t.Context(), true)
		return err == nil && len(ws) == 1 && ws[0].Stats.CachedBytes == 2 && reflect.DeepEqual(ws[0].Addresses, reg.Addresses)
	})
}

func TestAWorkerThatIsGoneIsNamedAndThenForgotten(t *testing.T) {
	m := start(t, master.Config{WorkerLease: time.Second, WorkerForget: 4 * time.Second})
	pods := []client.Pod{{Namespace: "prod", Name: "reader-0", UID: "u-1"}, {UID: "u-2"}}
	gone := worker("n1", 10, client.Published{Volume: client.Volume{ID: "lv-1"}, Pods: pods})
	stop := register(t, m.Client, gone)
	register(t, m.Client, worker("n2", 10))

	ws, err := m.AllWorkers(t.Context(), false)
	if err != nil || len(ws) != 2 || ws[0].Gone || !reflect.DeepEqual(ws[0].Volumes[0].Pods, pods) {
		t.Fatalf("both alive: %+v, %v", ws, err)
	}
	before := time.Now()
	stop()
	eventually(t, "marked as gone", func() bool {
		ws, err = m.AllWorkers(t.Context(), true)
		return err == nil && len(ws) == 2 && ws[0].Gone
	})
	// Lease times are whole seconds.
	if w := ws[0]; w.Node != "n1" || w.UUID != gone.UUID || !reflect.DeepEqual(w.Volumes[0].Pods, pods) || w.Seen.Before(before.Add(-5*time.Second)) || w.Seen.After(time.Now()) {
		t.Errorf("gone: %+v", w)
	}
	if ls, err := m.Locate(t.Context(), "s3://b", ""); err != nil || len(ls) != 2 || !strings.Contains(ls[0].Unanswered, "gone since") {
		t.Errorf("locate: %+v, %v", ls, err)
	}
	if alive, err := m.Workers(t.Context()); err != nil || len(alive) != 1 || alive[0].Node != "n2" {
		t.Errorf("alive: %+v, %v", alive, err)
	}
	if c, err := m.Capacity(t.Context(), ""); err != nil || c.CapacityBytes != 10 {
		t.Errorf("capacity: %+v, %v", c, err)
	}
	eventually(t, "forgotten", func() bool {
		ws, err = m.AllWorkers(t.Context(), false)
		return err == nil && len(ws) == 1 && ws[0].Node == "n2"
	})
}

func TestRegisteringOftenMakesNoLeases(t *testing.T) {
	cfg, endpoint := externalEtcd(t)
	etcd, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(etcd.Close)
	m := start(t, master.Config{EtcdEndpoints: []string{endpoint}})
	reg := worker("n1", 10)
	for i := range int64(5) {
		reg.CapacityBytes = i
		stop := register(t, m.Client, reg)
		eventually(t, "registered anew", func() bool {
			ws, err := m.Workers(t.Context())
			return err == nil && len(ws) == 1 && ws[0].CapacityBytes == i
		})
		stop()
	}
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if ls, err := c.Leases(t.Context()); err != nil || len(ls.Leases) != 2 {
		t.Errorf("leases after 5 registrations: %v, %v; want 2", ls, err)
	}
}

// While a worker is replaced there are two processes of it for a moment.
func TestOfTwoProcessesOfAWorkerTheSurvivorIsAsked(t *testing.T) {
	m := start(t, master.Config{})
	older, younger := worker("n1", 1), worker("n1", 1)
	younger.UUID = older.UUID
	serve(t, &older, shelf{stats: record.Stats{CachedBytes: 1}})
	serve(t, &younger, shelf{stats: record.Stats{CachedBytes: 2}})
	register(t, m.Client, younger)
	stop := register(t, m.Client, older) // it tells that it has let go of its mounts, say
	stop()
	eventually(t, "the younger is asked", func() bool {
		ws, err := m.AllWorkers(t.Context(), true)
		return err == nil && len(ws) == 1 && ws[0].Stats.CachedBytes == 2
	})
}
