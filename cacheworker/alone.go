package cacheworker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/dataset"
	"github.com/larderfs/larder/cacheworker/domainsocket"
)

// Alone makes a worker the sidecar of one pod: it serves one volume by a domain socket, without a
// broker and without a mount.
type Alone struct {
	Volume    brokerwire.Volume // whose credential is the process's own, unless it has one
	SocketDir string            // where the socket is, named by the worker's UUID
}

func (a *Alone) validate() error {
	if !filepath.IsAbs(a.SocketDir) {
		return fmt.Errorf("socket directory: %q is not an absolute path", a.SocketDir)
	}
	return nil
}

// sidecar is what a worker that is alone knows beside the rest.
type sidecar struct {
	listening atomic.Bool // clients can connect
}

var errNotListening = errors.New("the socket is not there yet")

// serveAlone serves the volume of [Alone] until ctx ends. A source that cannot be listed is an
// error: the pod's application would only find out later.
func (w *Worker) serveAlone(ctx context.Context) error {
	a := w.cfg.Alone
	meter := w.accounts.open(claimOf(a.Volume, nil))
	defer meter.close()
	data, err := dataset.Open(a.Volume, w.deps(meter))
	if err == nil {
		err = data.Check(ctx)
	}
	if err != nil {
		return err
	}
	path := filepath.Join(a.SocketDir, w.store.UUID().String())
	l, err := brokerwire.ListenStream(path, 0o666) // who reaches it may read the volume
	if err != nil {
		return err
	}
	defer os.Remove(path)
	w.listening.Store(true)
	w.log.Info("serving a volume alone", "source", a.Volume.Source, "socket", path)
	return domainsocket.New(domainsocket.Config{
		Volume: socketVolume{w.mounts, &held{data: data, volume: a.Volume}}, Counters: &w.sockets, Log: w.log,
	}).Serve(ctx, l)
}

// readyAlone is nil when clients can connect.
func (w *Worker) readyAlone(context.Context) error {
	if !w.listening.Load() {
		return errNotListening
	}
	return nil
}
