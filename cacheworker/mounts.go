package cacheworker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/dataset"
	"github.com/larderfs/larder/cacheworker/domainsocket"
	"github.com/larderfs/larder/cacheworker/fusefs"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/master/client"
)

// redial is the pause between attempts to reach a broker that is away.
const redial = 50 * time.Millisecond

// mounts are those that this worker serves, and its link to the broker.
type mounts struct {
	w *Worker

	reloading sync.Mutex // one at a time, or an older dataset might come last; held across reload

	mu        sync.Mutex       // guards the fields below; never held across a call
	held      map[string]*held // served
	fed       map[string]*held // adopted, and served when the broker says so
	peer      *brokerwire.Peer // nil while there is no broker
	connected chan struct{}    // closed when there is one again; nil while there is
	takeovers uint64

	serving          sync.WaitGroup // domain sockets
	noResend, noPass sync.Once      // what is logged once
}

// held is one served mount.
type held struct {
	*fusefs.Served
	data     *dataset.Dataset // replaced, under mounts.mu, with new credentials
	meter    *meter
	volume   brokerwire.Volume
	since    time.Time
	listener *os.File // this process's own description of the domain socket's descriptor
	stop     context.CancelFunc
	fresh    bool          // no worker served it before
	adopting time.Duration // what that took
}

// Run keeps the link to the broker until ctx ends; then the mounts are let go without an
// answer to what is in flight: the next worker gets it again.
func (ms *mounts) Run(ctx context.Context) error {
	defer ms.detach()
	waiting := false
	for ctx.Err() == nil {
		connected, err := ms.connect(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if connected || !waiting {
			ms.w.log.Warn("broker is away; mounts go on without it", "err", err)
		}
		waiting = true
		select {
		case <-ctx.Done():
		case <-time.After(redial):
		}
	}
	return nil
}

// connect serves one connection to the broker, if there is one.
func (ms *mounts) connect(ctx context.Context) (connected bool, err error) {
	stage := ms.w.stage()
	if stage != brokerwire.Taking {
		ms.serveFed(ctx) // the elder has ended, and there was no broker to say so
	}
	conn, err := brokerwire.Dial(ctx, ms.w.cfg.BrokerSocket)
	if err != nil {
		return false, err
	}
	peer := brokerwire.NewPeer(conn, func(rctx context.Context, m brokerwire.Message, files []*os.File) (brokerwire.Message, []*os.File, error) {
		return brokerwire.Message{}, nil, ms.handle(ctx, rctx, m, files)
	})
	done := make(chan error, 1)
	go func() { done <- peer.Run(ctx) }()
	before := ms.all() // what this broker gives us from here on it holds
	hello := brokerwire.Message{Verb: brokerwire.Hello, Version: brokerwire.Version, Oldest: brokerwire.Oldest,
		Role: brokerwire.RoleWorker, UUID: ms.w.store.UUID().String(), Stage: stage}
	if _, _, err := peer.Call(ctx, hello); err != nil {
		peer.Close()
		<-done
		if stage == brokerwire.Giving && errors.Is(err, brokerwire.ErrExists) {
			ms.w.end(nil) // the next one serves
		}
		return false, fmt.Errorf("broker refuses this worker: %w", err)
	}
	ms.w.log.Info("connected to broker", "stage", stage)
	if stage != brokerwire.Taking {
		ms.giveBack(ctx, peer, before)
	}
	for _, h := range before {
		h.TryPassthrough()
	}
	ms.setPeer(peer)
	err = <-done
	ms.setPeer(nil)
	return true, err
}

func (ms *mounts) setPeer(p *brokerwire.Peer) {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	ms.peer = p
	switch {
	case p == nil:
		ms.connected = make(chan struct{})
	case ms.connected != nil:
		close(ms.connected)
		ms.connected = nil
	}
}

func (ms *mounts) isConnected() bool {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	return ms.peer != nil
}

// awaitBroker returns when there is a broker that holds the mounts too.
func (ms *mounts) awaitBroker(ctx context.Context) error {
	for !ms.isConnected() {
		select {
		case <-time.After(redial):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// giveBack gives a broker that was restarted what it held before.
func (ms *mounts) giveBack(ctx context.Context, peer *brokerwire.Peer, before map[string]*held) {
	for id, h := range before {
		err := give(ctx, peer, id, h)
		if err != nil && !errors.Is(err, brokerwire.ErrExists) {
			ms.w.log.Error("give mount back", "volume", id, "err", err)
		}
		if errors.Is(err, object.ErrNotFound) { // unmounted, or never finished
			ms.drop(id)
		}
	}
	if _, _, err := peer.Call(ctx, brokerwire.Message{Verb: brokerwire.Given}); err != nil {
		ms.w.log.Error("tell the broker that all is given back", "err", err)
	}
}

func give(ctx context.Context, peer *brokerwire.Peer, id string, h *held) error {
	device, memfd, ids := h.Hold()
	backings, err := brokerwire.NewBackings(ids)
	if err != nil {
		return err
	}
	defer backings.Close()
	files := []*os.File{device, memfd, backings}
	if h.listener != nil {
		files = append(files, h.listener)
	}
	_, _, err = peer.Call(ctx, brokerwire.Message{Verb: brokerwire.Give, Mount: id}, files...)
	return err
}

// ready is nil when this worker serves every mount of its broker: one that waits beside it to be
// replaced may go then.
func (ms *mounts) ready(ctx context.Context) error {
	ms.mu.Lock()
	peer := ms.peer
	ms.mu.Unlock()
	if peer == nil {
		return errors.New("no broker: the node plugin is away")
	}
	r, _, err := peer.Call(ctx, brokerwire.Message{Verb: brokerwire.Mounts})
	if err != nil {
		return fmt.Errorf("ask the broker for its mounts: %w", err)
	}
	for _, m := range r.List {
		if ms.get(m.VolumeID) == nil {
			return fmt.Errorf("volume %q is not taken over yet", m.VolumeID)
		}
	}
	return nil
}

// ofBroker is what the broker says of its mounts; nothing while it is away.
func (ms *mounts) ofBroker(ctx context.Context) []brokerwire.Mount {
	ms.mu.Lock()
	peer := ms.peer
	ms.mu.Unlock()
	if peer == nil {
		return nil
	}
	r, _, err := peer.Call(ctx, brokerwire.Message{Verb: brokerwire.Mounts})
	if err != nil { // it is away since a moment ago
		return nil
	}
	return r.List
}

func (ms *mounts) all() map[string]*held {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	out := make(map[string]*held, len(ms.held))
	for id, h := range ms.held {
		out[id] = h
	}
	return out
}

// parts are those of all volumes that are served.
func (ms *mounts) parts() (all []dataset.Part) {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	for _, h := range ms.held {
		all = append(all, h.data.Parts()...)
	}
	return all
}

// handle answers the broker. life is the worker's, rctx the request's.
func (ms *mounts) handle(life, rctx context.Context, m brokerwire.Message, files []*os.File) error {
	switch m.Verb {
	case brokerwire.Adopt:
		return ms.adopt(rctx, m, files)
	case brokerwire.Serve:
		return ms.serve(life, m.Mount)
	case brokerwire.Yield:
		ms.w.yield(m.Text)
		return nil
	case brokerwire.Listen:
		if len(files) != 1 {
			return fmt.Errorf("listen: one descriptor is needed: %w", object.ErrInvalid)
		}
		h := ms.get(m.Mount)
		if h == nil {
			return fmt.Errorf("volume %q is not served here: %w", m.Mount, object.ErrNotFound)
		}
		err := ms.listen(life, h, files[0])
		files[0] = nil
		return err
	case brokerwire.Reload:
		if err := ms.proveAgain(rctx, m.Mount); err != nil {
			return err
		}
		return ms.reload(m.Mount)
	case brokerwire.Drop:
		return ms.drop(m.Mount)
	}
	return fmt.Errorf("verb %q is not for a worker: %w", m.Verb, object.ErrInvalid)
}

func (ms *mounts) get(id string) *held {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	return ms.held[id]
}

// adopt gets ready to serve a mount. One that was never served is checked first: its source must answer.
func (ms *mounts) adopt(rctx context.Context, m brokerwire.Message, files []*os.File) error {
	began := time.Now()
	if len(files) < 3 || len(files) > 4 {
		return fmt.Errorf("adopt: three or four descriptors are needed, not %d: %w", len(files), object.ErrInvalid)
	}
	if ms.get(m.Mount) != nil {
		return fmt.Errorf("volume %q is served already: %w", m.Mount, brokerwire.ErrExists)
	}
	st, err := brokerwire.ReadState(files[1])
	if err != nil {
		return err
	}
	if m.Fresh {
		if err := ms.w.sources.prove(rctx, st.Volume); err != nil {
			return err
		}
	}
	meter := ms.w.accounts.open(claimOf(st.Volume, ms.w.users.podsOf(m.Mount)))
	adopted := false
	defer func() {
		if !adopted {
			meter.close()
		}
	}()
	data, err := ms.w.open(st.Volume, meter)
	if err == nil && m.Fresh {
		err = data.Check(rctx)
	}
	if err != nil {
		return err
	}
	f := ms.w.cfg.Features
	init := files[2]
	files[2] = nil
	served, err := fusefs.Adopt(fusefs.Config{
		Volume: st.Volume, Dataset: data, Broker: ms, Counters: &ms.w.counters, Tracer: ms.w.cfg.Tracer, Log: ms.w.log,
		Features: fusefs.Features{Passthrough: !f.NoPassthrough && ms.w.cfg.hasViews(), Resend: !f.NoResend, Splice: !f.NoSplice},
	}, files[0], files[1], init, m.Fresh, ms.w.store.UUID().String())
	if err != nil {
		return err
	}
	files[0], files[1] = nil, nil
	adopted = true
	h := &held{Served: served, data: data, meter: meter, volume: st.Volume, stop: func() {}, fresh: m.Fresh, adopting: time.Since(began)}
	if len(files) == 4 {
		h.listener, files[3] = files[3], nil
	}
	ms.mu.Lock()
	again := ms.fed[m.Mount] // from a broker that has died since
	ms.fed[m.Mount] = h
	ms.mu.Unlock()
	if again != nil {
		again.end()
	}
	return nil
}

// serve answers a mount's requests. Nobody else reads them any more.
func (ms *mounts) serve(life context.Context, id string) error {
	ms.mu.Lock()
	h := ms.fed[id]
	delete(ms.fed, id)
	ms.mu.Unlock()
	if h == nil {
		return fmt.Errorf("volume %q is not adopted here: %w", id, object.ErrNotFound)
	}
	if err := h.CatchUp(); err != nil {
		h.end()
		return err
	}
	l := h.listener
	h.listener, h.since = nil, time.Now()
	ms.mu.Lock()
	ms.held[id] = h
	if !h.fresh {
		ms.takeovers++
	}
	ms.mu.Unlock()
	go h.Serve() // ends with the mount, or with the process: a blocked read(2) cannot be called back
	if !h.fresh {
		ms.w.log.Info("mount taken over", "volume", id, "nodes", h.Nodes(), "adopting", h.adopting, "afterStart", time.Since(ms.w.started), "cpu", cpuTime())
	}
	ms.sayWeaker(h.Served)
	var err error
	if l != nil {
		err = ms.listen(life, h, l)
	}
	if !h.fresh || h.volume.Path != "" {
		err = errors.Join(err, ms.reload(id)) // it, or what is mounted, may have changed since it was adopted
	}
	return err
}

// serveFed serves what was adopted, without the broker, which would be given it back otherwise.
func (ms *mounts) serveFed(ctx context.Context) {
	ms.mu.Lock()
	ids := slices.Collect(maps.Keys(ms.fed))
	ms.mu.Unlock()
	for _, id := range ids {
		if err := ms.serve(ctx, id); err != nil {
			ms.w.log.Error("serve", "volume", id, "err", err)
		}
	}
}

// end lets go of a mount that this worker does not serve, or that is unmounted.
func (h *held) end() {
	h.stop()
	h.End()
	h.meter.close()
	if h.listener != nil {
		h.listener.Close()
	}
}

// sayWeaker logs, once, which guarantees the kernel does not allow.
func (ms *mounts) sayWeaker(s *fusefs.Served) {
	if !s.Resend() {
		ms.noResend.Do(func() {
			ms.w.log.Warn("without resend (kernel before 6.9, or a flag): a request in flight when a worker is killed hangs until the take-over deadline, when its mount is given up")
		})
	}
	if !s.Passthrough() {
		ms.noPass.Do(func() {
			ms.w.log.Warn("without passthrough (kernel before 6.9, no --view, or a flag): cached files are read through the worker, and wait while there is none")
		})
	}
}

// listen serves the volume's domain socket. l is the worker's from here on.
func (ms *mounts) listen(ctx context.Context, h *held, l *os.File) error {
	fl, err := net.FileListener(l)
	if err != nil {
		l.Close()
		return fmt.Errorf("domain socket: %w", err)
	}
	ul, ok := fl.(*net.UnixListener)
	if !ok {
		fl.Close()
		l.Close()
		return fmt.Errorf("domain socket: not a unix socket: %w", object.ErrInvalid)
	}
	ctx, stop := context.WithCancel(ctx)
	ms.mu.Lock()
	old, oldStop := h.listener, h.stop
	h.listener, h.stop = l, stop
	ms.mu.Unlock()
	if old != nil {
		oldStop()
		old.Close()
	}
	srv := domainsocket.New(domainsocket.Config{Volume: socketVolume{ms, h}, Counters: &ms.w.sockets, Log: ms.w.log})
	ms.serving.Go(func() {
		if err := srv.Serve(ctx, ul); err != nil {
			ms.w.log.Error("domain socket", "volume", h.volume.ID, "err", err)
		}
	})
	return nil
}

// reload reads a volume's new credentials from its memfd, and shows what is mounted now.
func (ms *mounts) reload(id string) error {
	ms.reloading.Lock()
	defer ms.reloading.Unlock()
	h := ms.get(id)
	if h == nil {
		return fmt.Errorf("volume %q is not served here: %w", id, object.ErrNotFound)
	}
	_, memfd, _ := h.Hold()
	st, err := brokerwire.ReadState(memfd)
	if err != nil {
		return err
	}
	data, err := ms.w.open(st.Volume, h.meter)
	if err != nil {
		return err
	}
	h.SetDataset(data)
	ms.mu.Lock()
	h.data, h.volume = data, st.Volume
	ms.mu.Unlock()
	return nil
}

// drop ends a mount that is unmounted.
func (ms *mounts) drop(id string) error {
	ms.mu.Lock()
	gone := []*held{ms.held[id], ms.fed[id]}
	delete(ms.held, id)
	delete(ms.fed, id)
	ms.mu.Unlock()
	ms.w.sources.forget(id)
	for _, h := range gone {
		if h != nil {
			h.end()
		}
	}
	return nil
}

// letGo takes all mounts from this process, for good, and says so to the broker by hanging up. An
// error leaves that to the end of the process: it may still take a request.
func (ms *mounts) letGo() error {
	ctx, cancel := context.WithTimeout(context.Background(), goWithin)
	defer cancel()
	var errs []error
	for _, h := range ms.all() {
		errs = append(errs, h.Detach())
	}
	if err := errors.Join(append(errs, fusefs.AwaitReaders(ctx))...); err != nil {
		return err
	}
	ms.mu.Lock()
	defer ms.mu.Unlock()
	if ms.peer != nil {
		ms.peer.Close()
	}
	return nil
}

// detach lets go of all mounts without answering what is in flight.
func (ms *mounts) detach() {
	for _, h := range ms.all() {
		h.stop()
		if err := h.Detach(); err != nil {
			ms.w.log.Error("let go of mount", "volume", h.volume.ID, "err", err)
		}
	}
	ms.serving.Wait()
}

// name has the volumes counted for whom they are published to.
func (ms *mounts) name() {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	for id, h := range ms.held {
		h.meter.name(claimOf(h.volume, ms.w.users.podsOf(id)))
	}
}

func (ms *mounts) evicted(id object.ID) {
	for _, h := range ms.all() {
		h.Evicted(id)
	}
}

// published are the volumes for the master's registration, without secrets.
func (ms *mounts) published() []client.Published {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	var out []client.Published
	for _, id := range slices.Sorted(maps.Keys(ms.held)) { // sorted: a registration that changes is told again
		v := ms.held[id].volume
		p := client.Published{Volume: client.Volume{ID: id}, Inline: v.Inline}
		if err := json.Unmarshal([]byte(v.Attributes), &p.Volume.Parameters); err != nil {
			ms.w.log.Error("attributes of a volume", "volume", id, "err", err)
		}
		if p.Volume.Parameters["binding"] == "node" {
			p.Volume.Node = ms.w.cfg.Node
		}
		if !client.ValidID(id) { // a handle that an administrator wrote into a static PV: the master never knew it
			continue
		}
		out = append(out, p)
	}
	return out
}

// call asks the broker, waiting for one while it is being restarted.
func (ms *mounts) call(ctx context.Context, m brokerwire.Message, files ...*os.File) (brokerwire.Message, error) {
	for {
		ms.mu.Lock()
		peer, connected := ms.peer, ms.connected
		ms.mu.Unlock()
		if peer != nil {
			r, _, err := peer.Call(ctx, m, files...)
			if !errors.Is(err, object.ErrUnavailable) {
				return r, err
			}
		}
		select {
		case <-connected: // nil, and waits for ctx, only between a broker's death and its notice
		case <-time.After(redial):
		case <-ctx.Done():
			return brokerwire.Message{}, fmt.Errorf("%s: %w", m.Verb, context.Cause(ctx))
		}
	}
}

// brokerPatience is how long an open waits for a broker that is being restarted. Without one
// the file is read through the worker.
const brokerPatience = 2 * time.Second

// Register implements fusefs.Broker.
func (ms *mounts) Register(ctx context.Context, volumeID string, node uint64, f *os.File) (int32, error) {
	ctx, cancel := context.WithTimeout(ctx, brokerPatience)
	defer cancel()
	r, err := ms.call(ctx, brokerwire.Message{Verb: brokerwire.Register, Mount: volumeID, Node: node}, f)
	return r.Backing, err
}

// Unregister implements fusefs.Broker.
func (ms *mounts) Unregister(ctx context.Context, volumeID string, backing int32) error {
	_, err := ms.call(ctx, brokerwire.Message{Verb: brokerwire.Unregister, Mount: volumeID, Backing: backing})
	return err
}

// Replace implements fusefs.Broker.
func (ms *mounts) Replace(ctx context.Context, volumeID string, memfd *os.File) error {
	_, err := ms.call(ctx, brokerwire.Message{Verb: brokerwire.Replace, Mount: volumeID}, memfd)
	return err
}
