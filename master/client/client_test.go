package client_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/larderfs/larder/master/client"
	"github.com/larderfs/larder/master/masterpb"
	"github.com/larderfs/larder/master/record"
)

// fake is a master that records what workers tell it; the real one is tested in package
// master. It fails calls with err, and knows a worker only if it registered.
type fake struct {
	masterpb.UnimplementedMasterServer
	mu    sync.Mutex
	known string
	err   error
	calls chan proto.Message // every call, in order
}

func (f *fake) told(req proto.Message) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls <- req
	return f.err
}

func (f *fake) set(known string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.known, f.err = known, err
}

func (f *fake) RegisterWorker(_ context.Context, req *masterpb.RegisterWorkerRequest) (*masterpb.RegisterWorkerResponse, error) {
	if err := f.told(req); err != nil {
		return nil, masterpb.ToStatus(err)
	}
	f.set(req.GetWorker().GetUuid(), nil)
	return &masterpb.RegisterWorkerResponse{LeaseMillis: 30}, nil
}

func (f *fake) Heartbeat(_ context.Context, req *masterpb.HeartbeatRequest) (*masterpb.HeartbeatResponse, error) {
	if err := f.told(req); err != nil {
		return nil, masterpb.ToStatus(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return &masterpb.HeartbeatResponse{Unknown: f.known != req.GetUuid(), LeaseMillis: 30}, nil
}

func (f *fake) ListVolumes(_ context.Context, req *masterpb.ListVolumesRequest) (*masterpb.ListVolumesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &masterpb.ListVolumesResponse{}, masterpb.ToStatus(f.err)
}

func serve(t *testing.T, f *fake) *client.Client {
	t.Helper()
	return dial(t, client.Config{Target: listen(t, f)})
}

func dial(t *testing.T, cfg client.Config) *client.Client {
	t.Helper()
	c, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// listen serves the fake and returns its address.
func listen(t *testing.T, f *fake) (target string) {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	masterpb.RegisterMasterServer(s, f)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "unix://" + sock
}

func TestRunReportsSoonWhenItIsToldOfAChange(t *testing.T) {
	f := &fake{calls: make(chan proto.Message)}
	changed := make(chan struct{}, 1)
	c := dial(t, client.Config{Target: listen(t, f), Changed: changed})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	reg := client.Registration{UUID: "u", Node: "n"}
	go func() {
		done <- c.Run(ctx, func() client.Report { return client.Report{Registration: reg} }, time.Hour)
	}()
	<-f.calls
	changed <- struct{}{}
	if got, ok := (<-f.calls).(*masterpb.HeartbeatRequest); !ok {
		t.Errorf("told %v", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestTheNextMasterIsAskedWhenOneIsAway(t *testing.T) {
	away := "unix://" + filepath.Join(t.TempDir(), "none")
	unwell, well := &fake{err: record.ErrUnavailable}, &fake{}
	first, last := listen(t, unwell), listen(t, well)
	for range 5 { // it begins with any of them
		c := dial(t, client.Config{Target: strings.Join([]string{away, first, last}, ",")})
		for range 3 {
			if _, _, err := c.Volumes(t.Context(), 0, ""); err != nil {
				t.Error(err)
			}
		}
	}
	well.set("", record.ErrNotFound) // an answer is an answer
	c := dial(t, client.Config{Target: last + "," + away})
	if _, _, err := c.Volumes(t.Context(), 0, ""); !errors.Is(err, client.ErrNotFound) {
		t.Errorf("%v; want not found", err)
	}
	none := dial(t, client.Config{Target: away + "," + first})
	if _, _, err := none.Volumes(t.Context(), 0, ""); !errors.Is(err, client.ErrUnavailable) {
		t.Errorf("%v; want unavailable", err)
	}
	for _, target := range []string{"", "a:1,", "a:1, b:1"} {
		if _, err := client.New(client.Config{Target: target}); !errors.Is(err, client.ErrInvalid) {
			t.Errorf("target %q: %v", target, err)
		}
	}
}

func TestAMasterThatHangsLeavesTimeForTheNext(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := dial(t, client.Config{Target: l.Addr().String() + "," + listen(t, &fake{}), Timeout: 2 * time.Second})
	for range 4 {
		if _, _, err := c.Volumes(t.Context(), 0, ""); err != nil {
			t.Error(err)
		}
	}
}

func TestRunRegistersOnceAndAgainWhenNeeded(t *testing.T) {
	f := &fake{calls: make(chan proto.Message)}
	c := serve(t, f)
	var report atomic.Pointer[client.Report]
	report.Store(&client.Report{Registration: client.Registration{UUID: "u", Node: "n"}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx, func() client.Report { return *report.Load() }, 0) }()

	expect := func(want proto.Message) proto.Message {
		t.Helper()
		got := <-f.calls
		if reflect.TypeOf(got) != reflect.TypeOf(want) {
			t.Fatalf("%T %v; want %T", got, got, want)
		}
		return got
	}
	registration, heartbeat := &masterpb.RegisterWorkerRequest{}, &masterpb.HeartbeatRequest{}
	expect(registration)
	expect(heartbeat)
	expect(heartbeat)

	f.set("", nil) // forgotten: a heartbeat says so, and a registration follows
	for got := proto.Message(nil); reflect.TypeOf(got) != reflect.TypeOf(registration); {
		got = <-f.calls
	}
	expect(heartbeat)

	r := *report.Load()
	r.Stats.ReadRequests = 9 // a beat is no reason to register
	report.Store(&r)
	for got := expect(heartbeat); got.(*masterpb.HeartbeatRequest).GetStats().GetReadRequests() != 9; {
		got = expect(heartbeat)
	}
	r.Volumes = []client.Published{{Volume: client.Volume{ID: "v"}}}
	report.Store(&r)
	for {
		if got, ok := (<-f.calls).(*masterpb.RegisterWorkerRequest); ok {
			if len(got.GetWorker().GetVolumes()) != 1 {
				t.Errorf("registered %v", got)
			}
			break
		}
	}
	expect(heartbeat)

	f.set("", record.ErrUnavailable) // away for two calls, and empty afterwards
	<-f.calls
	<-f.calls
	f.set("", nil)
	for got := proto.Message(nil); reflect.TypeOf(got) != reflect.TypeOf(registration); {
		got = <-f.calls
	}
	cancel()
	for {
		select {
		case <-f.calls: // one may be in flight
		case err := <-done:
			if err != nil {
				t.Errorf("run: %v", err)
			}
			return
		}
	}
}

func TestRunIsNoErrorWithoutAMaster(t *testing.T) {
	c, err := client.New(client.Config{Target: "unix://" + filepath.Join(t.TempDir(), "none")})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithCancel(t.Context())
	asked := 0
	err = c.Run(ctx, func() client.Report {
		if asked++; asked == 3 {
			cancel()
		}
		return client.Report{}
	}, time.Millisecond)
	if err != nil || asked != 3 {
		t.Errorf("asked %d times, %v", asked, err)
	}
}

func TestEveryErrorComesBackAsItself(t *testing.T) {
	f := &fake{calls: make(chan proto.Message, 100)}
	c := serve(t, f)
	all := []error{client.ErrInvalid, client.ErrNotFound, client.ErrExists, client.ErrExhausted, client.ErrBadToken, client.ErrUnavailable}
	for _, want := range all {
		f.set("", errors.Join(errors.New("list: volume 5"), want))
		_, _, err := c.Volumes(t.Context(), 1, "")
		for _, other := range all {
			if errors.Is(err, other) != (other == want) {
				t.Errorf("%v for %v", err, want)
			}
		}
		if text := f.err.Error(); err == nil || err.Error() != text {
			t.Errorf("text %q; want %q", err, text)
		}
	}
	f.set("", errors.New("a bug"))
	if _, _, err := c.Volumes(t.Context(), 1, ""); err == nil || err.Error() != "a bug" {
		t.Errorf("internal: %v", err)
	}
	f.set("", nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := c.Volumes(ctx, 1, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	ctx, cancel = context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	if _, _, err := c.Volumes(ctx, 1, ""); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, client.ErrUnavailable) {
		t.Errorf("too late: %v", err)
	}
	if _, err := client.New(client.Config{}); !errors.Is(err, client.ErrInvalid) {
		t.Errorf("no target: %v", err)
	}
}
