// Package master is the cluster's memory: volumes, workers and mounts, kept in etcd.
//
// What it acknowledged survives its SIGKILL. It is never on the path of a read, and it can
// be lost: a master started empty gets workers and published volumes back from the workers'
// next heartbeats. Nothing in its store, its log or its messages is a user's secret.
package master

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/larderfs/larder/cacheworker/telemetry"
	"github.com/larderfs/larder/master/inventory"
	"github.com/larderfs/larder/master/masterpb"
	"github.com/larderfs/larder/master/record"
	"github.com/larderfs/larder/master/registry"
)

const (
	callTimeout = 8 * time.Second // of a call, at the server; below the clients' own
	stopTimeout = 3 * time.Second // for calls in flight when the master stops
)

// Master is made by [New] and run once.
type Master struct {
	cfg     Config
	started time.Time
	ready   chan struct{}
	addr    string                            // set before ready is closed
	webAddr string                            // set before ready is closed
	serving atomic.Pointer[registry.Registry] // nil until the store is open
}

// New validates the configuration and does no I/O.
func New(cfg Config) (*Master, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return &Master{cfg: cfg.withDefaults(), started: time.Now(), ready: make(chan struct{})}, nil
}

// Ready is closed when calls are answered.
func (m *Master) Ready() <-chan struct{} { return m.ready }

// Addr is the target for clients, with the port that was bound. Call it after Ready.
func (m *Master) Addr() string { return m.addr }

// MetricsAddr is the bound form of Config.MetricsListen. Call it after Ready.
func (m *Master) MetricsAddr() string { return m.webAddr }

// errNotServing is told before the store is open, and after.
var errNotServing = fmt.Errorf("the master is starting or stopping: %w", record.ErrUnavailable)

// ApplyMounts has the mounts that are made from Kubernetes objects be these, each with its Object.
func (m *Master) ApplyMounts(ctx context.Context, ms []record.Mount) error {
	reg := m.serving.Load()
	if reg == nil {
		return errNotServing
	}
	return reg.ApplyMounts(ctx, ms)
}

// CreateJob makes a job, of a Kubernetes object's uid one. What it names is below under-store URIs or paths of the namespace.
func (m *Master) CreateJob(ctx context.Context, spec record.JobSpec) (record.Job, error) {
	reg := m.serving.Load()
	if reg == nil {
		return record.Job{}, errNotServing
	}
	if spec.Object != "" { // what it named may have gone since
		if j, err := reg.Job(ctx, record.JobOf(spec.Kind, spec.Object)); !errors.Is(err, record.ErrNotFound) {
			return j, err
		}
	}
	var err error
	if spec.URIs, err = inStores(ctx, reg, spec.URIs); err != nil {
		return record.Job{}, err
	}
	return reg.CreateJob(ctx, spec)
}

// Job returns one, ErrNotFound if there is none.
func (m *Master) Job(ctx context.Context, id string) (record.Job, error) {
	reg := m.serving.Load()
	if reg == nil {
		return record.Job{}, errNotServing
	}
	return reg.Job(ctx, id)
}

// ObjectJobs are those of Kubernetes objects, without their nodes.
func (m *Master) ObjectJobs(ctx context.Context) ([]record.Job, error) {
	reg := m.serving.Load()
	if reg == nil {
		return nil, errNotServing
	}
	return reg.ObjectJobs(ctx)
}

// CancelJob has the workers stop. It is idempotent.
func (m *Master) CancelJob(ctx context.Context, id string) error {
	reg := m.serving.Load()
	if reg == nil {
		return errNotServing
	}
	return reg.CancelJob(ctx, id)
}

// Run serves until ctx ends, and returns nil then; or until the store fails.
func (m *Master) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	stopped := make(chan struct{})
	if m.cfg.MetricsListen != "" { // first up, last down
		l, addr, err := listen(m.cfg.MetricsListen, m.cfg.ListenMode)
		if err != nil {
			return err
		}
		m.webAddr = addr
		g.Go(func() error { return m.serveHTTP(l, stopped) })
	}
	g.Go(func() error {
		defer close(stopped)
		return m.run(ctx)
	})
	return g.Wait()
}

func (m *Master) run(ctx context.Context) (err error) {
	opened := time.Now()
	st, err := openStore(ctx, m.cfg)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("open store: %w", err)
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	reg := registry.New(registry.Config{Etcd: st.client, Prefix: m.cfg.EtcdPrefix, Lease: m.cfg.WorkerLease, Forget: m.cfg.WorkerForget, Log: m.cfg.Log})

	calls := &calls{}
	for _, c := range []prometheus.Collector{collector(reg, calls), telemetry.Info("master", m.cfg.Version)} {
		if err := m.cfg.Metrics.Register(c); err != nil {
			return fmt.Errorf("metrics: %w", err)
		}
		defer m.cfg.Metrics.Unregister(c)
	}

	l, addr, err := listen(m.cfg.Listen, m.cfg.ListenMode)
	if err != nil {
		return err
	}
	m.addr = addr
	m.serving.Store(reg)
	defer m.serving.Store(nil)

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return m.serveGRPC(ctx, l, reg, calls) })
	g.Go(func() error { return reg.Run(ctx) })
	g.Go(func() error { return st.wait(ctx) })
	close(m.ready)
	m.cfg.Log.Info("master ready", "listen", addr, "embedded", st.embedded(), "openedIn", time.Since(opened).Round(time.Millisecond))
	return g.Wait()
}

func (m *Master) serveGRPC(ctx context.Context, l net.Listener, reg *registry.Registry, calls *calls) error {
	s := grpc.NewServer(append(m.cfg.Tracer.ServerOptions(),
		grpc.ChainUnaryInterceptor(calls.intercept, m.intercept),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.WaitForHandlers(true),
	)...)
	asker := inventory.NewAsker()
	defer asker.Close()
	masterpb.RegisterMasterServer(s, &server{reg: reg, asker: asker, master: m, life: ctx})
	failed := make(chan error, 1)
	go func() { failed <- s.Serve(l) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve %s: %w", m.addr, err)
	case <-ctx.Done():
	}
	hurry := time.AfterFunc(stopTimeout, s.Stop)
	defer hurry.Stop()
	s.GracefulStop()
	<-failed
	return nil
}

func (m *Master) serveHTTP(l net.Listener, stopped <-chan struct{}) error {
	s := &http.Server{Handler: telemetry.Handler(m.gatherer(), telemetry.Probes{Ready: m.answers}), ReadHeaderTimeout: 5 * time.Second}
	failed := make(chan error, 1)
	go func() { failed <- s.Serve(l) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve metrics on %s: %w", m.webAddr, err)
	case <-stopped:
	}
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil {
		s.Close()
	}
	<-failed
	return nil
}

// answers is readiness: nil while the store answers. Starting the master again would not help a store
// that does not, so liveness does not ask it.
func (m *Master) answers(ctx context.Context) error {
	reg := m.serving.Load()
	if reg == nil {
		return errors.New("starting or stopping")
	}
	_, err := reg.Status(ctx)
	return err
}
