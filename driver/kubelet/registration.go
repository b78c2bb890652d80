// Package kubelet makes the driver known to the kubelet of its node.
//
// The kubelet watches a folder for sockets that serve pluginregistration v1, asks each who it
// is, and calls the CSI endpoint that it names. As long as the socket's file is there the
// driver is registered; a kubelet that restarts finds it again by itself. So the file is there
// exactly while the CSI endpoint answers.
package kubelet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"google.golang.org/grpc"
	pluginregistration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/larderfs/larder/cacheworker/brokerwire"
)

// Config of a registration.
type Config struct {
	Dir      string       // the kubelet's plugins_registry
	Name     string       // of the driver
	Endpoint string       // path of the CSI socket, as the kubelet sees it
	Log      *slog.Logger // nil means none
}

// Registration tells the kubelet of one driver.
type Registration struct {
	pluginregistration.UnimplementedRegistrationServer
	cfg Config

	mu  sync.Mutex // guards err
	err error      // nil when the kubelet has accepted the driver
}

var errNotYet = errors.New("the kubelet has not registered the driver yet")

// NewRegistration makes one that nobody has accepted yet.
func NewRegistration(cfg Config) (*Registration, error) {
	if !filepath.IsAbs(cfg.Dir) || !filepath.IsAbs(cfg.Endpoint) || cfg.Name == "" {
		return nil, fmt.Errorf("registration: %q, %q: want absolute paths of the kubelet's folder and of the CSI socket, and a name", cfg.Dir, cfg.Endpoint)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Registration{cfg: cfg, err: errNotYet}, nil
}

// Socket is the file by which the kubelet finds the driver.
func (r *Registration) Socket() string { return filepath.Join(r.cfg.Dir, r.cfg.Name+"-reg.sock") }

// Err is nil when the kubelet has accepted the driver, else why it has not.
func (r *Registration) Err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// Run shows the socket until ctx ends. Start it when the CSI endpoint answers: the kubelet calls
// it before it accepts the driver.
func (r *Registration) Run(ctx context.Context) error {
	l, err := brokerwire.ListenStream(r.Socket(), 0o600)
	if err != nil {
		return fmt.Errorf("register with the kubelet: %w", err)
	}
	defer os.Remove(r.Socket())
	s := grpc.NewServer()
	pluginregistration.RegisterRegistrationServer(s, r)
	defer context.AfterFunc(ctx, s.Stop)()
	if err := s.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("register with the kubelet: serve %s: %w", r.Socket(), err)
	}
	return nil
}

// GetInfo implements pluginregistration v1.
func (r *Registration) GetInfo(context.Context, *pluginregistration.InfoRequest) (*pluginregistration.PluginInfo, error) {
	return &pluginregistration.PluginInfo{
		Type: pluginregistration.CSIPlugin, Name: r.cfg.Name, Endpoint: r.cfg.Endpoint,
		SupportedVersions: []string{"1.0.0"}, // of CSI, as the kubelet means it
	}, nil
}

// NotifyRegistrationStatus implements pluginregistration v1. The kubelet tries again by itself.
func (r *Registration) NotifyRegistrationStatus(_ context.Context, s *pluginregistration.RegistrationStatus) (*pluginregistration.RegistrationStatusResponse, error) {
	var err error
	if !s.GetPluginRegistered() {
		err = fmt.Errorf("the kubelet refuses the driver: %s", s.GetError())
		r.cfg.Log.Error("not registered with the kubelet", "err", s.GetError())
	} else {
		r.cfg.Log.Info("registered with the kubelet", "driver", r.cfg.Name, "endpoint", r.cfg.Endpoint)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err = err
	return &pluginregistration.RegistrationStatusResponse{}, nil
}
