package inventory

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/larderfs/larder/master/masterpb"
	"github.com/larderfs/larder/master/record"
)

const (
	atOnce         = 128                    // workers asked at the same time
	countersWithin = 800 * time.Millisecond // who looks each second wants the others' answers meanwhile
	heldWithin     = 4 * time.Second        // below the master's own bound of a call
)

// Asker keeps a connection to each worker that it was asked about lately. Safe for concurrent use.
type Asker struct {
	mu    sync.Mutex // guards conns; never held across a call
	conns map[string]*grpc.ClientConn
}

// NewAsker connects to nobody yet.
func NewAsker() *Asker { return &Asker{conns: map[string]*grpc.ClientConn{}} }

// Close ends what is being asked.
func (a *Asker) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var errs []error
	for addr, c := range a.conns {
		errs = append(errs, c.Close())
		delete(a.conns, addr)
	}
	return errors.Join(errs...)
}

// Counters puts each worker's counters of now in the place of its last heartbeat's, or says why
// it did not answer.
func (a *Asker) Counters(ctx context.Context, ws []record.Worker) {
	now := time.Now().UTC()
	a.forget(ws)
	a.each(ctx, ws, countersWithin, func(ctx context.Context, i int, rpc masterpb.InventoryClient) error {
		resp, err := rpc.Counters(ctx, &masterpb.CountersRequest{})
		if err == nil {
			err = same(ws[i], resp.GetUuid())
		}
		if err == nil {
			ws[i].Stats, ws[i].Seen = resp.GetStats().Record(), now
		}
		return err
	}, func(i int, why string) { ws[i].Unanswered = why })
}

// Held asks each worker what it holds.
func (a *Asker) Held(ctx context.Context, ws []record.Worker, at record.Location) []record.Located {
	found := make([]record.Located, len(ws))
	for i, w := range ws {
		found[i] = record.Located{Node: w.Node, UUID: w.UUID, Addresses: w.Addresses}
	}
	a.forget(ws)
	a.each(ctx, ws, heldWithin, func(ctx context.Context, i int, rpc masterpb.InventoryClient) error {
		resp, err := rpc.Held(ctx, &masterpb.HeldRequest{Uri: at.URI, Endpoint: at.Endpoint})
		if err == nil {
			err = same(ws[i], resp.GetUuid())
		}
		if err == nil {
			found[i].Held = resp.Record()
		}
		return err
	}, func(i int, why string) { found[i].Unanswered = why })
	return found
}

// Volume asks those of all workers about a volume that have it.
func (a *Asker) Volume(ctx context.Context, all []record.Worker, id string) (found []record.VolumeOnNode) {
	var ws []record.Worker
	for _, w := range all {
		if i := slices.IndexFunc(w.Volumes, func(p record.Published) bool { return p.Volume.ID == id }); i >= 0 {
			ws, found = append(ws, w), append(found, record.VolumeOnNode{Node: w.Node, UUID: w.UUID, Pods: w.Volumes[i].Pods})
		}
	}
	a.forget(all)
	a.each(ctx, ws, heldWithin, func(ctx context.Context, i int, rpc masterpb.InventoryClient) error {
		resp, err := rpc.Volume(ctx, &masterpb.MountedVolumeRequest{Id: id})
		if err == nil {
			err = same(ws[i], resp.GetUuid())
		}
		if err == nil {
			found[i].Volume = resp.Record()
		}
		return err
	}, func(i int, why string) { found[i].Unanswered = why })
	return found
}

// same refuses the answer of a worker that has another one's address.
func same(w record.Worker, uuid string) error {
	if uuid != w.UUID {
		return fmt.Errorf("another worker, %.40q, answers at %s", uuid, w.Addresses[0])
	}
	return nil
}

// each asks all workers, some at once; those that cannot be asked or do not answer are failed.
func (a *Asker) each(ctx context.Context, ws []record.Worker, within time.Duration,
	ask func(ctx context.Context, i int, rpc masterpb.InventoryClient) error, failed func(i int, why string)) {
	var g errgroup.Group
	g.SetLimit(atOnce)
	for i, w := range ws {
		switch {
		case w.Gone:
			failed(i, "gone since "+w.Seen.Format(time.RFC3339))
			continue
		case len(w.Addresses) == 0:
			failed(i, "it has no address: start it with --listen")
			continue
		}
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(ctx, header, scheme+w.Key), within)
			defer cancel()
			c, err := a.conn(w.Addresses[0])
			if err == nil {
				err = ask(ctx, i, masterpb.NewInventoryClient(c))
			}
			if err != nil {
				failed(i, why(w, err))
			}
			return nil // the others are asked all the same
		})
	}
	g.Wait()
}

// why tells people what to look at.
func why(w record.Worker, err error) string {
	s, ok := status.FromError(err)
	if !ok {
		return err.Error()
	}
	switch s.Code() {
	case codes.Unavailable, codes.DeadlineExceeded:
		return "no answer from " + w.Addresses[0]
	case codes.Unauthenticated:
		return "the worker at " + w.Addresses[0] + " does not take this registration's key: it has been restarted, or is another one"
	case codes.Unimplemented:
		return "it is of an older version (" + w.Version + "), which cannot say"
	}
	return s.Message()
}

func (a *Asker) conn(addr string) (*grpc.ClientConn, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.conns[addr]; c != nil {
		return c, nil
	}
	c, err := grpc.NewClient("passthrough:///"+addr,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 500 * time.Millisecond},
			MinConnectTimeout: time.Second,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxRequest)),
		grpc.WithIdleTimeout(idleTimeout),
	)
	if err == nil {
		a.conns[addr] = c
	}
	return c, err
}

// forget closes the connections to addresses that no worker has any more.
func (a *Asker) forget(ws []record.Worker) {
	used := map[string]bool{}
	for _, w := range ws {
		for _, addr := range w.Addresses {
			used[addr] = true
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for addr, c := range a.conns {
		if !used[addr] {
			c.Close() // it has nothing to say
			delete(a.conns, addr)
		}
	}
}
