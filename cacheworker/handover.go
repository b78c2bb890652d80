package cacheworker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/workerpb"
)

const (
	askTimeout = 10 * time.Second // for the elder to free the directory
	giveWithin = 30 * time.Second // for the next worker to be ready; then this one ends all the same
	goWithin   = time.Second      // for the threads of this process to leave /dev/fuse, when the next worker is ready
)

// handover is a planned upgrade (DESIGN §6): the worker that has the cache directory, the elder, gives it
// to the next one while it goes on serving, and ends when that one is ready.
type handover struct {
	over    chan error // has room for one: the process has to end now
	refused sync.Once  // to log it

	giving  sync.Mutex         // one give at a time; held across it
	given   chan struct{}      // closed when the directory is given away
	stop    context.CancelFunc // ends what must not go on then; set by beside
	besides sync.WaitGroup     // until it has ended

	mu        sync.Mutex    // guards the fields below
	elder     string        // instance that this worker got the directory from
	elderGone chan struct{} // closed when that one has ended; nil if there was none
}

func newHandover() handover {
	return handover{over: make(chan error, 1), given: make(chan struct{})}
}

// stage is what the broker is told.
func (h *handover) stage() brokerwire.Stage {
	h.mu.Lock()
	gone := h.elderGone
	h.mu.Unlock()
	select {
	case <-h.given:
		return brokerwire.Giving
	default:
	}
	if gone == nil {
		return brokerwire.Owner
	}
	select {
	case <-gone:
		return brokerwire.Owner
	default:
		return brokerwire.Taking
	}
}

// setElder notes who gave the directory; ended says that it has ended.
func (h *handover) setElder(instance string) (ended func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.elder, h.elderGone = instance, make(chan struct{})
	gone := h.elderGone
	return func() { close(gone) }
}

// end has Run return.
func (h *handover) end(err error) {
	select {
	case h.over <- err:
	default:
	}
}

// yield ends this worker because the broker says so: the next one serves in its place, or, while it
// waits for its own turn, it cannot have that.
func (w *Worker) yield(why string) {
	if w.stage() == brokerwire.Giving {
		w.log.Info("the next worker is ready: ending")
		if err := w.mounts.letGo(); err != nil {
			w.log.Warn("the next worker waits for the end of this process", "err", err)
		}
		w.end(nil)
		return
	}
	w.end(fmt.Errorf("the broker sends this worker away: %s", why))
}

// beside runs what ends when the directory is given away: the next worker needs the same address, and speaks for
// the node.
func (w *Worker) beside(ctx context.Context, g *errgroup.Group, parts ...func(context.Context) error) {
	ctx, w.stop = context.WithCancel(ctx)
	for _, part := range parts {
		w.besides.Add(1)
		g.Go(func() error { defer w.besides.Done(); return part(ctx) })
	}
}

// askElder asks the worker that has the cache directory to hand it over. One that cannot is waited
// for.
func (w *Worker) askElder(ctx context.Context) {
	err := w.takeOver(ctx)
	if err != nil {
		w.refused.Do(func() { w.log.Info("the cache is another worker's: waiting for its end", "err", err) })
		return
	}
	w.log.Info("another worker hands the cache over")
}

func (w *Worker) takeOver(ctx context.Context) error {
	conn, err := grpc.NewClient("passthrough:///elder", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return brokerwire.DialStream(ctx, w.cfg.ControlSocket)
		}))
	if err != nil {
		return err
	}
	stream, err := workerpb.NewWorkerClient(conn).HandOver(ctx, &workerpb.HandOverRequest{Instance: w.cfg.Instance})
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	defer time.AfterFunc(askTimeout, func() { conn.Close() }).Stop()
	r, err := stream.Recv()
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	ended := w.setElder(r.GetInstance())
	go func() { // ends with the elder
		defer ended()
		defer conn.Close()
		stream.Recv()
	}()
	return nil
}

// HandOver implements workerpb.WorkerServer.
func (c control) HandOver(req *workerpb.HandOverRequest, stream grpc.ServerStreamingServer[workerpb.HandOverReply]) error {
	ctx := stream.Context()
	if p, ok := peer.FromContext(ctx); !ok || !mayAsk(p.Addr) {
		return status.Error(codes.PermissionDenied, "only the worker's own user and root may")
	}
	if err := c.w.give(req.GetInstance()); err != nil {
		return status.Error(codes.FailedPrecondition, err.Error())
	}
	if err := stream.Send(&workerpb.HandOverReply{Instance: c.w.cfg.Instance}); err != nil {
		c.w.log.Warn("answer the next worker", "err", err)
	}
	deadline := time.NewTimer(giveWithin)
	defer deadline.Stop()
	err := errors.New("the next worker has died, and it had the index")
	select {
	case <-ctx.Done():
	case <-deadline.C:
		err = fmt.Errorf("the next worker was not ready within %v", giveWithin)
	}
	// Not before a broker holds the mounts too.
	if berr := c.w.mounts.awaitBroker(context.WithoutCancel(ctx)); berr != nil {
		return berr
	}
	c.w.end(err)
	return nil
}

// give gives the cache directory away. The mounts are served without it.
func (w *Worker) give(instance string) error {
	w.giving.Lock()
	defer w.giving.Unlock()
	w.mu.Lock()
	elder := w.elder
	w.mu.Unlock()
	switch {
	case w.stage() != brokerwire.Owner:
		return errors.New("this worker is handing over already, or being handed over to")
	case instance != "" && instance == elder:
		return fmt.Errorf("worker %q has handed over to this one: %w", instance, object.ErrBusy)
	case !w.mounts.isConnected():
		return errors.New("there is no broker to hand the mounts over")
	}
	w.log.Info("handing over", "to", instance)
	close(w.given)
	w.stop()
	w.besides.Wait()
	w.fills.StopCompleting()
	return w.store.HandOver()
}

// identified says of each connection whose process it comes from, in place of the address that a
// unix socket's client does not have.
type identified struct{ net.Listener }

type identifiedConn struct {
	net.Conn
	uid uidAddr
}

type uidAddr uint32

func (uidAddr) Network() string  { return "unix" }
func (u uidAddr) String() string { return fmt.Sprint("uid ", uint32(u)) }

func mayAsk(a net.Addr) bool {
	uid, ok := a.(uidAddr)
	return ok && (uid == 0 || int(uid) == os.Getuid())
}

func (l identified) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return c, nil
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	var cred *unix.Ucred
	cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(cerr, err); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return identifiedConn{c, uidAddr(cred.Uid)}, nil
}

func (c identifiedConn) RemoteAddr() net.Addr { return c.uid }
