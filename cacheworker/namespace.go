package cacheworker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/dataset"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/workerpb"
	"github.com/larderfs/larder/master/client"
	"github.com/larderfs/larder/master/namespace"
	"github.com/larderfs/larder/master/record"
)

// mountTable is the namespace as the master told last. It is kept beside the cache, for a worker that
// starts while there is no master.
type mountTable struct {
	file    string        // "" keeps none
	changed chan struct{} // has a place; has what was told looked at

	mu    sync.Mutex // guards the fields below; held across writes of the file
	table client.Table
	known bool // it was told, or found in the file
}

// mountsFile is in the first tier that outlives the machine.
const mountsFile = "mounts.json"

// load reads what an earlier worker was told. A file that cannot be read is no table: the master tells it again.
func (t *mountTable) load() error {
	b, err := os.ReadFile(t.file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var table client.Table
	if err == nil {
		err = json.Unmarshal(b, &table)
	}
	if err != nil {
		return fmt.Errorf("mount table %s: %w", t.file, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.table, t.known = table, true
	return nil
}

func (t *mountTable) last() (client.Table, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.table, t.known
}

// set notes what the master tells; changed says that it is something else than before.
func (t *mountTable) set(table client.Table) (changed bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.known && t.table.ID == table.ID && slices.EqualFunc(t.table.Mounts, table.Mounts, client.Mount.Equal) {
		return false, nil
	}
	t.table, t.known = table, true
	return true, t.save()
}

// save requires t.mu.
func (t *mountTable) save() error {
	if t.file == "" {
		return nil
	}
	b, err := json.MarshalIndent(t.table, "", "  ")
	if err != nil {
		return fmt.Errorf("mount table: %w", err)
	}
	next := t.file + ".next"
	if err = os.WriteFile(next, b, 0o600); err == nil {
		err = os.Rename(next, t.file)
	}
	if err != nil {
		return fmt.Errorf("mount table: %w", err)
	}
	return nil
}

// errNoTable is what there is of a path of the namespace when nobody ever told what is mounted there.
var errNoTable = fmt.Errorf("this node's worker has not been told yet what is mounted (is its --master set, and does it answer?): %w", object.ErrUnavailable)

// followMounts has all volumes show what is mounted now, until ctx ends. Credentials in files are
// looked at again now and then.
func (w *Worker) followMounts(ctx context.Context) error {
	if w.cfg.Master == "" {
		return nil
	}
	c, err := client.New(client.Config{Target: w.cfg.Master, Log: w.log})
	if err != nil {
		return err
	}
	defer c.Close()
	c.FollowMounts(ctx, func() client.Table { t, _ := w.namespace.last(); return t }, w.mounted)
	return nil
}

// mounted takes a new mount table.
func (w *Worker) mounted(t client.Table) {
	changed, err := w.namespace.set(t)
	if err != nil {
		w.log.Error("keep the mount table for the next worker", "err", err)
	}
	if !changed {
		return
	}
	w.log.Info("mount table", "mounts", len(t.Mounts))
	w.mounts.reopen()
	select {
	case w.namespace.changed <- struct{}{}:
	default:
	}
}

// credentialsEvery is how often files with credentials are looked at.
const credentialsEvery = 10 * time.Second

func (w *Worker) followCredentials(ctx context.Context) error {
	tick := time.NewTicker(credentialsEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if w.sources.rotated() {
			w.log.Info("the credential of a mount has changed")
			w.mounts.reopen()
		}
	}
}

// open is a volume's dataset: of its source, or of what is mounted at its path.
func (w *Worker) open(v brokerwire.Volume, m *meter) (*dataset.Dataset, error) {
	if v.Path == "" {
		return dataset.Open(v, w.deps(m))
	}
	t, known := w.namespace.last()
	if !known {
		return dataset.OpenUnknown(v, errNoTable, w.deps(m)), nil
	}
	return dataset.OpenPath(v, t.Mounts, w.deps(m)), nil
}

// reopen has volumes of paths show what is mounted now.
func (ms *mounts) reopen() {
	for id, h := range ms.all() {
		if h.volume.Path == "" {
			continue
		}
		if err := ms.reload(id); err != nil && !errors.Is(err, object.ErrNotFound) { // unmounted meanwhile
			ms.w.log.Error("show what is mounted now", "volume", id, "err", err)
		}
	}
}

// Mounted implements workerpb.WorkerServer.
func (c control) Mounted(_ context.Context, req *workerpb.MountedRequest) (*workerpb.MountedReply, error) {
	t, known := c.w.namespace.last()
	if !known {
		return nil, status.Error(codes.Unavailable, errNoTable.Error())
	}
	view, ok := namespace.At(t.Mounts, req.GetPath())
	if !ok {
		return nil, status.Error(codes.NotFound, namespace.Nothing(req.GetPath()))
	}
	who := namespace.Who{Inline: req.GetInline(), Namespace: req.GetNamespace()}
	if why := view.Refused(who); why != "" && !req.GetUndecided() {
		return nil, status.Error(codes.PermissionDenied, why)
	}
	reply := &workerpb.MountedReply{}
	for _, p := range view.Parts {
		at, err := record.ParseCredential(p.Mount.Credential)
		if err != nil || at.Kind != record.FromSecret || !p.Mount.Allows(who.Inline, who.Namespace) {
			continue
		}
		if p.At == "" {
			reply.OwnSecret = at.String()
		}
		if !slices.Contains(reply.Secrets, at.String()) {
			reply.Secrets = append(reply.Secrets, at.String())
		}
	}
	return reply, nil
}

// newMountTable reads what an earlier worker was told.
func (w *Worker) newMountTable() *mountTable {
	t := &mountTable{file: filepath.Join(w.store.Home(), mountsFile), changed: make(chan struct{}, 1)}
	if err := t.load(); err != nil {
		w.log.Warn("what was mounted is not known until the master tells", "err", err)
	}
	return t
}
