package driver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
)

// Pods is how the users of this node's pods are told what befell their volumes.
type Pods interface {
	// Pods lists the pods of this node, by uid.
	Pods(ctx context.Context) (map[string]Pod, error)
	// Warn puts a reason and a message where the users of a pod look for them. about tells apart
	// what has the same reason. The same again changes nothing.
	Warn(ctx context.Context, p Pod, about, reason, message string) error
}

// Pod is what the orchestrator says of one.
type Pod struct {
	UID, Namespace, Name string
	Ending               bool        // it is being deleted, or has done its work
	Started              []time.Time // of containers that run; fractions of a second may be missing
}

func (p Pod) String() string {
	if p.Name == "" {
		return "pod " + p.UID
	}
	return fmt.Sprintf("pod %s/%s", p.Namespace, p.Name)
}

// podHealth finds pods whose volumes have died under them: a container keeps the mounts that it
// was started with, so such a pod must be started again.
//
// It asks the kernel, the broker and the kubelet's directory each time, so that it finds after
// a restart of this process what happened before. What it remembers only saves questions.
type podHealth struct {
	broker  Broker
	stats   Stats
	pods    Pods // nil outside of a cluster: pods have no names then, and nobody is told
	kubelet string
	log     *slog.Logger
	wake    chan struct{}

	mu       sync.Mutex           // guards the fields below; never held across a call
	losses   map[string]loss      // by target: what the broker said, or was seen
	verified map[use]time.Time    // the mount of that time was there before the pod's containers
	away     map[string]time.Time // volumes without a worker, by id, since they were seen so
	troubles map[string]string    // of volumes whose source fails, by id: the words in which it was told first
}

type loss struct {
	when time.Time
	why  string
	sure bool // else it must be seen once more
}

// use is a pod's use of a volume, as the kubelet's directory has it.
type use struct {
	pod    string // uid
	name   string // of the PersistentVolume, or of the inline volume in the pod
	volume string // id
	target string // where the kubelet has it mounted
}

func newPodHealth(broker Broker, stats Stats, pods Pods, kubelet string, log *slog.Logger) *podHealth {
	return &podHealth{broker: broker, stats: stats, pods: pods, kubelet: kubelet, log: log, wake: make(chan struct{}, 1),
		losses: map[string]loss{}, verified: map[use]time.Time{}, away: map[string]time.Time{}, troubles: map[string]string{}}
}

const (
	healthInterval = 5 * time.Second
	awayAfter      = 30 * time.Second // a worker that is upgraded is away for less
	settled        = 5 * time.Second  // what the kubelet is about to mount, or has unmounted, does not look like that for longer
)

func (h *podHealth) lost(paths []string, why string) {
	if h == nil {
		return
	}
	h.mu.Lock()
	for _, p := range paths {
		h.losses[p] = loss{time.Now(), why, true}
	}
	h.mu.Unlock()
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

// run looks again and again, until ctx ends.
func (h *podHealth) run(ctx context.Context) error {
	if h == nil {
		return nil
	}
	tick := time.NewTicker(healthInterval)
	defer tick.Stop()
	for told := ""; ; {
		err := h.look(ctx)
		if err == nil {
			told = ""
		} else if ctx.Err() == nil && err.Error() != told {
			told = err.Error()
			h.log.Warn("look after the health of volumes; it will be tried again", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-h.wake:
		}
	}
}

// look tells every pod what it should know now.
func (h *podHealth) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	uses, err := h.uses()
	if err != nil {
		return err
	}
	h.forget(uses)
	broken, err := h.broken(ctx, uses)
	if err != nil {
		return err
	}
	var errs []error
	for _, b := range broken {
		h.log.Warn("a pod's volume was lost; the pod must be started again", "pod", b.pod.String(), "volume", b.use.volume, "why", b.why)
		errs = append(errs, h.warn(ctx, b.pod, b.use, "MountLost", b.message()))
	}
	return errors.Join(append(errs, h.lookForTroubles(ctx, uses))...)
}

func (h *podHealth) warn(ctx context.Context, p Pod, u use, reason, message string) error {
	if h.pods == nil || p.Name == "" {
		return nil
	}
	return h.pods.Warn(ctx, p, u.volume, reason, message)
}

// breakage is a volume that has died under a pod.
type breakage struct {
	use use
	pod Pod
	why string
}

func (b breakage) message() string {
	return fmt.Sprintf("Volume %q was lost on this node: %s. What reads it in this pod fails, and a running container cannot get the new mount. "+
		"Restart the pod: kubectl delete pod -n %s %s", b.use.name, b.why, b.pod.Namespace, b.pod.Name)
}

// mustRestart are the pods that must be started again for a volume.
func (h *podHealth) mustRestart(ctx context.Context, volumeID string) ([]Pod, error) {
	if h == nil {
		return nil, nil
	}
	uses, err := h.uses()
	if err != nil {
		return nil, err
	}
	uses = slices.DeleteFunc(uses, func(u use) bool { return u.volume != volumeID })
	broken, err := h.broken(ctx, uses)
	var pods []Pod
	for _, b := range broken {
		pods = append(pods, b.pod)
	}
	return pods, err
}

const bothDied = "its cache worker and the node plugin had both died"

// broken are those of uses that died under a container that still runs.
func (h *podHealth) broken(ctx context.Context, uses []use) ([]breakage, error) {
	if len(uses) == 0 {
		return nil, nil
	}
	v, err := look(ctx, h.broker)
	if err != nil {
		return nil, err
	}
	suspects := map[use]loss{}
	for _, u := range uses {
		if l, ok := h.suspect(ctx, v, u); ok {
			suspects[u] = l
		}
	}
	if len(suspects) == 0 {
		return nil, nil
	}
	pods := map[string]Pod{}
	if h.pods != nil {
		if pods, err = h.pods.Pods(ctx); err != nil {
			return nil, fmt.Errorf("list the pods of this node: %w", err)
		}
	}
	var out []breakage
	for u, l := range suspects {
		if p, ok := h.convict(u, l, pods); ok {
			out = append(out, breakage{u, p, l.why})
		}
	}
	slices.SortFunc(out, func(a, b breakage) int { return strings.Compare(a.use.target, b.use.target) })
	return out, nil
}

// suspect says when and why what containers have mounted of a use may have died. One that started later is fine.
func (h *podHealth) suspect(ctx context.Context, v view, u use) (loss, bool) {
	l, said := h.loss(u.target)
	m, held := v.volume(u.volume)
	p, mounted := v.table.At(u.target)
	switch {
	case said && l.sure:
		return l, true
	case !mounted: // on its way to be, or away, or dead and removed
		return h.seen(u.target)
	case held && v.is(p, m):
		h.acquit(u.target)
		if h.pods == nil || h.isVerified(u, m.Since) {
			return loss{}, false
		}
		return loss{m.Since, bothDied, false}, true
	case p.FUSE(): // nobody's, unless the worker has yet to give it back to the broker
		if _, err := h.stats.VolumeStats(ctx, u.volume); errors.Is(err, object.ErrNotFound) {
			return h.seen(u.target)
		}
	}
	return loss{}, false
}

// convict holds a suspicion against the pod's containers. Outside of a cluster only what is
// sure counts.
func (h *podHealth) convict(u use, l loss, pods map[string]Pod) (Pod, bool) {
	p, ok := pods[u.pod]
	if h.pods == nil {
		return Pod{UID: u.pod}, true
	}
	if !ok || p.Ending || len(p.Started) == 0 {
		return p, false
	}
	grain := time.Second // of the orchestrator's times: who may be well is taken to be well, unless there was a loss
	if l.sure {
		grain = 0
	}
	for _, start := range p.Started {
		if start.Add(grain).Before(l.when) {
			return p, true
		}
	}
	h.verify(u, l.when)
	return p, false
}

func (h *podHealth) loss(target string) (loss, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	l, ok := h.losses[target]
	return l, ok
}

// seen notes what looks like a loss, and reports it when it has looked so for a while.
func (h *podHealth) seen(target string) (loss, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	l, ok := h.losses[target]
	if !ok {
		l = loss{time.Now(), bothDied, false}
		h.losses[target] = l
	}
	return l, time.Since(l.when) >= settled
}

// acquit drops what was only suspected.
func (h *podHealth) acquit(target string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.losses[target].sure {
		delete(h.losses, target)
	}
}

// verify notes that all containers of a use started after t: what is told of before is over.
func (h *podHealth) verify(u use, t time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.verified[u] = t
	delete(h.losses, u.target)
}

func (h *podHealth) isVerified(u use, since time.Time) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.verified[u].Equal(since)
}

// forget drops what is remembered of volumes that are used no more.
func (h *podHealth) forget(uses []use) {
	there := map[string]bool{}
	for _, u := range uses {
		there[u.target] = true
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	maps.DeleteFunc(h.verified, func(u use, _ time.Time) bool { return !there[u.target] })
	maps.DeleteFunc(h.losses, func(target string, _ loss) bool { return !there[target] })
}

// lookForTroubles tells pods of what is not lost: that a volume waits for a worker, or that its source fails.
func (h *podHealth) lookForTroubles(ctx context.Context, uses []use) error {
	if h.pods == nil || len(uses) == 0 {
		return nil
	}
	v, err := look(ctx, h.broker)
	if err != nil {
		return err
	}
	troubles, err := h.stats.Troubles(ctx)
	if err != nil && !errors.Is(err, object.ErrUnavailable) { // no worker: told below
		return err
	}
	troubles = h.firstWords(troubles)
	found := map[use][2]string{} // reason and message
	for _, u := range uses {
		m, ok := v.volume(u.volume)
		switch {
		case ok && h.isAway(m.VolumeID, !m.Served):
			found[u] = [2]string{"WorkerAway", fmt.Sprintf("No cache worker serves volume %q now: reads of what is not cached in memory wait, and go on when one is back. "+
				"Nothing needs to be restarted. See why the larder-worker pod of this node does not run", u.name)}
		case ok && troubles[u.volume] != "":
			found[u] = [2]string{"SourceFailing", fmt.Sprintf("A read of volume %q failed: %s. What is cached can be read all the same; the rest can as soon as the source answers", u.name, troubles[u.volume])}
		}
	}
	if len(found) == 0 {
		return nil
	}
	pods, err := h.pods.Pods(ctx)
	if err != nil {
		return fmt.Errorf("list the pods of this node: %w", err)
	}
	var errs []error
	for u, f := range found {
		if p, ok := pods[u.pod]; ok && !p.Ending {
			errs = append(errs, h.warn(ctx, p, u, f[0], f[1]))
		}
	}
	return errors.Join(errs...)
}

// firstWords are the troubles in the words of when they began: an Event that changed with every
// file that cannot be read would be written all the time.
func (h *podHealth) firstWords(now map[string]string) map[string]string {
	h.mu.Lock()
	defer h.mu.Unlock()
	for id := range now {
		if first, ok := h.troubles[id]; ok {
			now[id] = first
		}
	}
	h.troubles = now
	return now
}

// isAway reports whether a volume has been without a worker for a while.
func (h *podHealth) isAway(id string, now bool) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !now {
		delete(h.away, id)
		return false
	}
	if _, ok := h.away[id]; !ok {
		h.away[id] = time.Now()
	}
	return time.Since(h.away[id]) >= awayAfter
}

// uses reads what the kubelet keeps of the volumes of its pods. It never looks below a
// directory where a volume may be mounted.
func (h *podHealth) uses() ([]use, error) {
	pods, err := names(filepath.Join(h.kubelet, "pods"))
	if err != nil {
		return nil, fmt.Errorf("pods of the kubelet: %w", err)
	}
	var out []use
	for _, uid := range pods {
		volumes := filepath.Join(h.kubelet, "pods", uid, "volumes")
		for kind, find := range map[string]func(dir, name string) (use, bool){"kubernetes.io~csi": csiUse, "kubernetes.io~local-volume": localUse} {
			dir := filepath.Join(volumes, kind)
			found, err := names(dir)
			if err != nil {
				return nil, fmt.Errorf("volumes of pod %s: %w", uid, err)
			}
			for _, name := range found {
				if u, ok := find(dir, name); ok {
					u.pod = uid
					out = append(out, u)
				}
			}
		}
	}
	return out, nil
}

// names lists a directory; one that does not exist is empty.
func names(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	out, err := f.Readdirnames(-1) // no stat: some are mount points
	slices.Sort(out)
	return out, err
}

func csiUse(dir, name string) (use, bool) {
	b, err := os.ReadFile(filepath.Join(dir, name, "vol_data.json"))
	if err != nil { // just being made, or removed
		return use{}, false
	}
	var data struct {
		Driver string `json:"driverName"`
		Volume string `json:"volumeHandle"`
	}
	if json.Unmarshal(b, &data) != nil || data.Driver != Name {
		return use{}, false
	}
	return use{name: name, volume: data.Volume, target: filepath.Join(dir, name, "mount")}, true
}

// LocalPrefix begins the names of local PersistentVolumes, which are the ids of their volumes too.
const LocalPrefix = "larder-local-"

func localUse(dir, name string) (use, bool) {
	return use{name: name, volume: name, target: filepath.Join(dir, name)}, strings.HasPrefix(name, LocalPrefix)
}
