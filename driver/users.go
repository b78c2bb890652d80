package driver

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/status"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/workerpb"
)

// users tells the worker which pods its volumes are published to; the worker tells the master.
//
// It asks the kubelet's directory, the kernel and the broker each time, so it finds after a
// restart of any process what was published before. What it remembers are names, which the
// orchestrator can be asked for.
type users struct {
	health *podHealth
	tell   func(context.Context, map[string][]Pod) error
	log    *slog.Logger
	wake   chan struct{}

	mu    sync.Mutex         // guards names; never held across a call
	names map[string]podName // by uid
}

type podName struct {
	Pod
	seen time.Time // the last time that it was published to, or had a volume
}

func newUsers(h *podHealth, tell func(context.Context, map[string][]Pod) error, log *slog.Logger) *users {
	return &users{health: h, tell: tell, log: log, wake: make(chan struct{}, 1), names: map[string]podName{}}
}

const (
	usersInterval = 2 * time.Second
	usersTimeout  = 10 * time.Second
	nameLife      = time.Minute // of a pod that has no volume
)

// changed notes that a volume was published, to the pod that the request names, or is so no more.
func (u *users) changed(attributes map[string]string) {
	if u == nil {
		return
	}
	if p, ok := podOf(attributes); ok {
		u.mu.Lock()
		u.names[p.UID] = podName{p, time.Now()}
		u.mu.Unlock()
	}
	select {
	case u.wake <- struct{}{}:
	default:
	}
}

// run tells the worker again and again, because it may be another one, until ctx ends.
func (u *users) run(ctx context.Context) error {
	if u == nil {
		return nil
	}
	tick := time.NewTicker(usersInterval)
	defer tick.Stop()
	failed := 0
	for {
		err := u.look(ctx)
		if failed++; err == nil {
			failed = 0
		}
		if failed == 2 { // broker or worker may just be starting
			u.log.Warn("tell the worker which pods use its volumes; it will be tried again", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-u.wake:
		}
	}
}

func (u *users) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, usersTimeout)
	defer cancel()
	uses, err := u.health.uses()
	if err != nil {
		return err
	}
	v, err := look(ctx, u.health.broker)
	if err != nil {
		return err
	}
	of := map[string][]Pod{} // by volume
	there := map[string]bool{}
	for _, use := range uses {
		m, held := v.volume(use.volume)
		p, mounted := v.table.At(use.target)
		if held && mounted && v.is(p, m) && uidShape.MatchString(use.pod) {
			of[use.volume] = append(of[use.volume], Pod{UID: use.pod})
			there[use.pod] = true
		}
	}
	names, err := u.named(ctx, there)
	if err != nil {
		u.log.Debug("list the pods of this node: some users of volumes have no names", "err", err)
	}
	for volume, pods := range of {
		slices.SortFunc(pods, func(a, b Pod) int { return cmp.Compare(a.UID, b.UID) })
		pods = slices.CompactFunc(pods, func(a, b Pod) bool { return a.UID == b.UID })
		for i, p := range pods {
			pods[i].Namespace, pods[i].Name = names[p.UID].Namespace, names[p.UID].Name
		}
		of[volume] = pods
	}
	return u.tell(ctx, of)
}

// named returns the names of pods by uid, as far as they are known. The orchestrator is asked if
// some are not.
func (u *users) named(ctx context.Context, there map[string]bool) (names map[string]Pod, err error) {
	names = map[string]Pod{}
	now := time.Now()
	u.mu.Lock()
	for uid, p := range u.names {
		switch {
		case there[uid]:
			names[uid], u.names[uid] = p.Pod, podName{p.Pod, now}
		case now.Sub(p.seen) > nameLife:
			delete(u.names, uid)
		}
	}
	u.mu.Unlock()
	if u.health.pods == nil || len(names) == len(there) {
		return names, nil
	}
	all, err := u.health.pods.Pods(ctx)
	u.mu.Lock()
	defer u.mu.Unlock()
	for uid := range there {
		if p, ok := all[uid]; ok {
			names[uid], u.names[uid] = p, podName{p, now}
		}
	}
	return names, err
}

// TellUsers has the worker know the pods that its volumes are published to, by volume.
func (w WorkerStats) TellUsers(ctx context.Context, of map[string][]Pod) error {
	req := &workerpb.UsersRequest{}
	for _, volume := range slices.Sorted(maps.Keys(of)) {
		v := &workerpb.VolumeUsers{VolumeId: volume}
		for _, p := range of[volume] {
			v.Pods = append(v.Pods, &workerpb.Pod{Namespace: p.Namespace, Name: p.Name, Uid: p.UID})
		}
		req.Volumes = append(req.Volumes, v)
	}
	if _, err := workerpb.NewWorkerClient(w.Conn).Users(ctx, req); err != nil {
		return fmt.Errorf("tell the worker: %s: %w", status.Convert(err).Message(), object.ErrUnavailable)
	}
	return nil
}
