// Package inventory is what a master asks workers: counters, how many bytes they hold at a
// place of an under store, and what a volume of theirs is and has read.
//
// The worker's side listens on the network, so it has no other verbs, changes nothing, and
// answers sums, of places and volumes that the asker has to name. It answers only who shows the
// key of its registration, which masters alone are told. The master's side bounds how many
// workers it asks at once and how long it waits for each; who does not answer is named.
package inventory

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"fmt"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/larderfs/larder/master/masterpb"
	"github.com/larderfs/larder/master/record"
)

// Worker answers for itself. Safe for concurrent use.
type Worker interface {
	Counters() record.Stats
	// Held sums up what is cached at the location; it may take seconds and ends with ctx.
	Held(ctx context.Context, at record.Location) (record.Held, error)
	// Volume tells of a volume that is mounted; ErrNotFound for any other.
	Volume(ctx context.Context, id string) (record.MountedVolume, error)
}

// NewKey makes a worker's key for the time that it runs.
func NewKey() string { return rand.Text() }

const (
	scheme      = "Bearer "
	header      = "authorization"
	maxRequest  = 64 << 10 // bytes
	maxAsked    = 16       // calls at once on a connection
	idleTimeout = time.Minute
)

// Serve answers masters on l, which it closes, until ctx ends.
func Serve(ctx context.Context, l net.Listener, uuid, key string, w Worker) error {
	s := grpc.NewServer(
		grpc.UnaryInterceptor(keyed(key)),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxConcurrentStreams(maxAsked),
		grpc.ConnectionTimeout(10*time.Second),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idleTimeout, Time: idleTimeout}),
		grpc.WaitForHandlers(true),
	)
	masterpb.RegisterInventoryServer(s, &server{uuid: uuid, worker: w})
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		s.Stop()
	})
	err := s.Serve(l)
	if stop() { // it was not called
		return fmt.Errorf("inventory: %w", err)
	}
	<-stopped
	return nil
}

// keyed refuses who does not show the key.
func keyed(key string) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
		for _, shown := range metadata.ValueFromIncomingContext(ctx, header) {
			if got, ok := strings.CutPrefix(shown, scheme); ok && subtle.ConstantTimeCompare([]byte(got), []byte(key)) == 1 {
				return handle(ctx, req)
			}
		}
		return nil, status.Error(codes.Unauthenticated, "this worker answers its masters only")
	}
}

type server struct {
	masterpb.UnimplementedInventoryServer
	uuid   string
	worker Worker
}

func (s *server) Counters(context.Context, *masterpb.CountersRequest) (*masterpb.WorkerCounters, error) {
	return &masterpb.WorkerCounters{Uuid: s.uuid, Stats: masterpb.FromStats(s.worker.Counters())}, nil
}

func (s *server) Held(ctx context.Context, req *masterpb.HeldRequest) (*masterpb.HeldResponse, error) {
	at, err := record.ParseLocation(req.GetUri(), req.GetEndpoint())
	if err != nil {
		return nil, masterpb.ToStatus(err)
	}
	h, err := s.worker.Held(ctx, at)
	if err != nil {
		return nil, masterpb.ToStatus(err)
	}
	return masterpb.FromHeld(s.uuid, h), nil
}

func (s *server) Volume(ctx context.Context, req *masterpb.MountedVolumeRequest) (*masterpb.MountedVolume, error) {
	v, err := s.worker.Volume(ctx, req.GetId())
	if err != nil {
		return nil, masterpb.ToStatus(err)
	}
	return masterpb.FromMountedVolume(s.uuid, v), nil
}
