// Package driver is the CSI driver: identity, controller and node service.
//
// It keeps nothing in memory between calls: what is staged and published is asked of the
// kernel and the broker each time, volumes of the master. Hence every call is idempotent, a
// call that fails leaves nothing behind, and a process killed between two calls has lost
// nothing. Every string that comes from an orchestrator is parsed in request.go, nowhere
// else. It never opens, stats or lists a path that a FUSE file system may be mounted on.
package driver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/telemetry"
)

const (
	// Name is the driver's, as in StorageClasses and CSIDriver.
	Name = "csi.larder.dev"
	// TopologyKey is the label and topology segment that names a node.
	TopologyKey = "topology.csi.larder.dev/node"
)

// Config of a server. One process may serve the controller, the node service, or both.
type Config struct {
	Endpoint   string // unix:///path; the path may be longer than sun_path
	Version    string
	Controller bool
	Node       bool

	NodeID          string   // name of this node; node service only
	RunDir          string   // where inline volumes are mounted; node service only
	FileRoot        string   // file:// sources must be below it; "" allows none
	InlineEndpoints []string // endpoints that inline volumes may name

	// Inline volumes of a Kubernetes namespace that may read with the worker's own credential:
	// NAMESPACE=s3://bucket/prefix[,endpoint=URL].
	DriverCredentials []string
	STSEndpoints      []string // token services, beside AWS's own, that inline volumes may name

	// KubeletDir is the kubelet's root directory, for the health of volumes; "" looks at no pods.
	KubeletDir string
	Pods       Pods // nil outside of a cluster

	// Secrets reads one of the cluster's, for mounts that name it: object.ErrNotFound if it is not there.
	// nil outside of a cluster.
	Secrets func(ctx context.Context, namespace, name string) (map[string]string, error)

	// Ready returns nil if a volume can be published now, else why not.
	Ready func(context.Context) error
	// CallTimeout bounds a call whose caller set no deadline; 0 means 2 minutes.
	CallTimeout time.Duration
	Tracer      *telemetry.Tracer // nil traces nothing
	Log         *slog.Logger      // nil means none
}

// Validate reports all mistakes at once.
func (c Config) Validate() error {
	var errs []error
	if _, err := c.socket(); err != nil {
		errs = append(errs, err)
	}
	if !c.Controller && !c.Node {
		errs = append(errs, errors.New("csi: neither controller nor node service is asked for"))
	}
	if c.Ready == nil {
		errs = append(errs, errors.New("csi: readiness is missing"))
	}
	if c.Node && (c.NodeID == "" || len(c.NodeID) > 192) {
		errs = append(errs, errors.New("csi node: the node's name is missing or longer than 192 bytes"))
	}
	if c.Node && !filepath.IsAbs(c.RunDir) {
		errs = append(errs, fmt.Errorf("csi node: run directory %q is not an absolute path", c.RunDir))
	}
	if c.KubeletDir != "" && !filepath.IsAbs(c.KubeletDir) {
		errs = append(errs, fmt.Errorf("csi node: the kubelet's directory %q is not an absolute path", c.KubeletDir))
	}
	if _, err := c.rules(); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (c Config) rules() (rules, error) {
	r, err := newRules(c.FileRoot, c.InlineEndpoints)
	err = errors.Join(err, r.allow(c.DriverCredentials, c.STSEndpoints))
	return r, err
}

func (c Config) socket() (string, error) {
	path, ok := strings.CutPrefix(c.Endpoint, "unix://")
	if !ok || !filepath.IsAbs(path) || strings.HasSuffix(path, "/") {
		return "", fmt.Errorf("csi endpoint %q is not unix:///path", c.Endpoint)
	}
	return path, nil
}

// Server is a CSI plugin.
type Server struct {
	cfg    Config
	socket string
	grpc   *grpc.Server
	health *podHealth // nil for a controller, and without a kubelet
	users  *users     // likewise
	node   *node      // nil for a controller

	counters counters
}

// New checks the configuration and wires the services. volumes is for the controller,
// broker and stats are for the node service; what is not asked for may be nil.
func New(cfg Config, volumes Volumes, broker Broker, stats Stats) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.CallTimeout == 0 {
		cfg.CallTimeout = 2 * time.Minute
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	rules, err := cfg.rules()
	if err != nil {
		return nil, err
	}
	socket, err := cfg.socket()
	if err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, socket: socket}
	calls := calls{log: cfg.Log, timeout: cfg.CallTimeout, counters: &s.counters}
	s.grpc = grpc.NewServer(append(cfg.Tracer.ServerOptions(),
		grpc.UnaryInterceptor(calls.serve),
		grpc.WaitForHandlers(true),
	)...)
	csi.RegisterIdentityServer(s.grpc, identity{cfg: cfg})
	if cfg.Controller {
		csi.RegisterControllerServer(s.grpc, &controller{rules: rules, volumes: volumes})
	}
	if cfg.Node {
		n, err := newNode(cfg, rules, broker, stats)
		if err != nil {
			return nil, err
		}
		s.health, s.users, s.node = n.health, n.users, n
		csi.RegisterNodeServer(s.grpc, n)
	}
	return s, nil
}

// stopTimeout is how long calls under way may take to end by themselves.
const stopTimeout = 10 * time.Second

// Run serves until ctx ends. Calls under way are let finish, for a while.
func (s *Server) Run(ctx context.Context) error {
	l, err := brokerwire.ListenStream(s.socket, 0o600)
	if err != nil {
		return fmt.Errorf("csi: %w", err)
	}
	defer os.Remove(s.socket)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.serve(ctx, l) })
	g.Go(func() error { return s.health.run(ctx) })
	g.Go(func() error { return s.users.run(ctx) })
	if s.node != nil {
		g.Go(func() error { return s.node.bringSecrets(ctx) })
	}
	return g.Wait()
}

// Lost is called by who has given up mounts, or has found them dead, with their paths.
func (s *Server) Lost(paths []string, why string) {
	s.counters.lost.Add(int64(len(paths)))
	s.health.lost(paths, why)
}

func (s *Server) serve(ctx context.Context, l net.Listener) error {
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		hurry := time.AfterFunc(stopTimeout, s.grpc.Stop)
		defer hurry.Stop()
		s.grpc.GracefulStop()
	})
	s.cfg.Log.Info("csi listening", "endpoint", s.cfg.Endpoint, "controller", s.cfg.Controller, "node", s.cfg.Node)
	err := s.grpc.Serve(l)
	if stop() { // it ended by itself
		s.grpc.Stop()
		return fmt.Errorf("csi: serve %s: %w", s.cfg.Endpoint, err)
	}
	<-stopped
	return nil
}
