package localpv

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/driver"
	"github.com/larderfs/larder/driver/mounttable"
)

// round is one look at everything, and what follows from it.
type round struct {
	*Controller
	configMap *corev1.ConfigMap // nil if there is none
	datasets  map[string]dataset
	bad       map[string]error // entries that could not be read; what they offered stays
	secrets   map[string]*corev1.Secret
	slots     map[string]slot             // that have a PersistentVolume, by name
	held      map[string]brokerwire.Mount // by volume id, which is the slot's name
	table     mounttable.Table
	node      *corev1.Node // nil until it is needed
	ended     bool
	again     bool // something is waited for
}

// retry spares a store that refuses.
type retry struct {
	since, next time.Time
	wait        time.Duration
	what        string // was tried: something else is tried at once
}

const maxRetry = 5 * time.Minute

func (c *Controller) round(ctx context.Context, w world, ended bool) (again bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	r := &round{Controller: c, ended: ended, secrets: map[string]*corev1.Secret{}, slots: map[string]slot{}, held: map[string]brokerwire.Mount{}}
	for _, m := range *w.configMaps {
		r.configMap = m
	}
	for _, s := range *w.secrets {
		r.secrets[s.Name] = s
	}
	r.datasets, r.bad = parse(r.configMap, c.parameters)
	if err := r.look(ctx); err != nil {
		return true, err
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(r.bad)) {
		errs = append(errs, r.tell(ctx, name, r.bad[name]))
	}
	for _, pv := range *w.volumes {
		s, err := slotOf(pv)
		if err != nil {
			c.sayOnce(pv.Name, err.Error())
			continue
		}
		r.slots[s.name] = s
		delete(c.made, s.name)
	}
	for _, name := range slices.Sorted(maps.Keys(r.slots)) {
		if err := r.settle(ctx, r.slots[name]); err != nil {
			errs = append(errs, fmt.Errorf("slot %s: %w", name, err))
		}
	}
	errs = append(errs, r.clearAway(ctx), r.offer(ctx))
	return r.again, errors.Join(errs...)
}

// look asks what is mounted.
func (r *round) look(ctx context.Context) (err error) {
	mounts, err := r.broker.Mounts(ctx)
	if err != nil {
		return fmt.Errorf("ask the broker for its mounts: %w", err)
	}
	for _, m := range mounts {
		if strings.HasPrefix(m.Path, r.cfg.Dir+"/") {
			r.held[m.VolumeID] = m
		}
	}
	r.table, err = mounttable.Read()
	return err
}

// settle does what the state of a PersistentVolume asks for.
func (r *round) settle(ctx context.Context, s slot) error {
	switch {
	case r.ended:
		return r.leave(ctx, s)
	case released(s.pv):
		return r.retire(ctx, s)
	case !taken(s.pv) && s.pv.DeletionTimestamp != nil: // it goes, then clearAway follows
		return nil
	case !taken(s.pv) && !r.wanted(s):
		r.cfg.Log.Info("local volume withdrawn", "volume", s.name)
		return ignoreGone(r.cluster.PersistentVolumes().Delete(ctx, s.pv))
	}
	return r.serve(ctx, s)
}

// wanted reports whether the slot is what its dataset offers today.
func (r *round) wanted(s slot) bool {
	if _, ok := r.bad[s.dataset]; ok {
		return true
	}
	d, ok := r.datasets[s.dataset]
	return ok && s.number < d.slots && s.secret == d.secret && maps.Equal(s.parameters, d.parameters)
}

// retire removes a slot that had its tenant. Its mount first: a PersistentVolume that is there
// says that it is still to be done.
func (r *round) retire(ctx context.Context, s slot) error {
	if gone, err := r.remove(ctx, s.name); err != nil || !gone {
		return err
	}
	if s.pv.DeletionTimestamp != nil {
		return nil
	}
	r.cfg.Log.Info("local volume released", "volume", s.name)
	return ignoreGone(r.cluster.PersistentVolumes().Delete(ctx, s.pv))
}

// leave takes a slot back that no pod uses, for good. Our rights may have been taken from us already.
func (r *round) leave(ctx context.Context, s slot) error {
	var err error
	if s.pv.DeletionTimestamp == nil && (released(s.pv) || !taken(s.pv)) {
		err = r.cluster.PersistentVolumes().Delete(ctx, s.pv)
	} else {
		_, err = r.cluster.PersistentVolumes().Get(ctx, s.name)
	}
	if r.refused(err) {
		err = nil
	}
	_, rerr := r.remove(ctx, s.name)
	return errors.Join(ignoreGone(err), rerr)
}

// refused reports whether our rights have been taken from us because Larder is being uninstalled.
func (r *round) refused(err error) bool {
	if !r.ended || !apierrors.IsForbidden(err) && !apierrors.IsUnauthorized(err) {
		return false
	}
	r.unwatch()
	return true
}

func ignoreGone(err error) error {
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) { // what it is now is about to be seen
		return nil
	}
	return err
}

// remove unmounts a slot and removes its directory. While a pod has it mounted it stays.
func (r *round) remove(ctx context.Context, name string) (gone bool, err error) {
	if at := r.binds(name); len(at) > 0 {
		r.sayOnce(name, "it is to go, and is still mounted at "+at[0])
		r.again = true
		return false, nil
	}
	mnt := mountPoint(r.cfg.Dir, name)
	err = r.broker.Unmount(ctx, mnt)
	if errors.Is(err, object.ErrBusy) {
		r.sayOnce(name, "it is to go, and a process still uses it")
		r.again = true
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("unmount: %w", err)
	}
	for _, path := range []string{shown(r.cfg.Dir, name), mnt, filepath.Dir(mnt)} {
		if err := unix.Unlink(path); err == unix.EISDIR || err == unix.EPERM {
			if err := unix.Rmdir(path); err != nil && err != unix.ENOENT {
				return false, fmt.Errorf("remove %s: %w", path, err)
			}
		} else if err != nil && err != unix.ENOENT {
			return false, fmt.Errorf("remove %s: %w", path, err)
		}
	}
	delete(r.made, name)
	delete(r.applied, name)
	delete(r.told, name)
	delete(r.orphans, name)
	return true, nil
}

// binds are the places, beside its own, where a slot is mounted.
func (r *round) binds(name string) (at []string) {
	mnt := mountPoint(r.cfg.Dir, name)
	own, ok := r.table.At(mnt)
	if !ok {
		return nil
	}
	for _, e := range r.table {
		if e.Dev == own.Dev && !strings.HasSuffix(e.Path, mnt) {
			at = append(at, e.Path)
		}
	}
	return at
}

// serve has a slot mounted, with the Secret's credentials of today.
func (r *round) serve(ctx context.Context, s slot) error {
	mnt := mountPoint(r.cfg.Dir, s.name)
	secret, version, serr := r.credentials(s.secret)
	m, held := r.held[s.name]
	_, mounted := r.table.At(mnt)
	if held && mounted {
		delete(r.orphans, s.name)
		if serr == nil {
			serr = r.refresh(ctx, m, s, secret, version)
		}
		return errors.Join(r.tell(ctx, s.dataset, serr), r.bindAgain(ctx, s))
	}
	if serr != nil {
		return r.tell(ctx, s.dataset, serr)
	}
	if mounted && r.awaited(s.name) { // the worker may be about to give it back to the broker
		r.again = true
		return nil
	}
	if held { // somebody else has unmounted it
		if err := r.broker.Unmount(ctx, mnt); err != nil {
			return fmt.Errorf("forget the mount: %w", err)
		}
	}
	try := s.dataset + " again" // one slot is tried for all of its dataset
	if !r.due(try, version) {
		return nil
	}
	if err := r.mount(ctx, s, secret, version); err != nil {
		return r.failed(ctx, s.dataset, try, version, err)
	}
	delete(r.retries, try)
	delete(r.orphans, s.name)
	r.cfg.Log.Warn("local volume mounted again", "volume", s.name)
	r.again = true // for bindAgain
	return nil
}

// awaited reports whether it is not long since a slot was first seen to be nobody's.
func (c *Controller) awaited(name string) bool {
	first, ok := c.orphans[name]
	if !ok {
		first = time.Now()
		c.orphans[name] = first
	}
	return time.Since(first) < giveBack
}

const giveBack = 3 * time.Second

// credentials are the Secret's, and its version. "" has none.
func (r *round) credentials(name string) (data map[string]string, version string, err error) {
	if name == "" {
		return nil, "", nil
	}
	s, ok := r.secrets[name]
	if !ok {
		return nil, "", fmt.Errorf("%s: there is no Secret %q in namespace %s; create it, with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: %w",
			keySecret, name, r.namespace, object.ErrInvalid)
	}
	data = map[string]string{}
	for k, v := range s.Data {
		data[k] = string(v)
	}
	return data, string(s.UID) + "/" + s.ResourceVersion, nil
}

// refresh hands over credentials of a Secret that has changed.
func (r *round) refresh(ctx context.Context, m brokerwire.Mount, s slot, secret map[string]string, version string) error {
	if version == r.applied[s.name] {
		return nil
	}
	v, _, err := r.parameters.LocalVolume(s.name, s.parameters, secret)
	if err != nil {
		return err
	}
	now := m.Volume
	now.Credentials = v.Credentials
	if err := r.broker.Refresh(ctx, now); err != nil {
		return fmt.Errorf("refresh the credentials of %s: %w", s.name, err)
	}
	r.applied[s.name] = version
	return nil
}

// mount mounts a slot, or leaves nothing mounted.
func (r *round) mount(ctx context.Context, s slot, secret map[string]string, version string) error {
	v, _, err := r.parameters.LocalVolume(s.name, s.parameters, secret)
	if err != nil {
		return err
	}
	mnt, path := mountPoint(r.cfg.Dir, s.name), shown(r.cfg.Dir, s.name)
	if err := os.MkdirAll(mnt, 0o750); err != nil {
		return fmt.Errorf("mount point: %w", err)
	}
	if err := os.Symlink(link, path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := r.broker.Mount(ctx, v, mnt); err != nil {
		return err
	}
	r.applied[s.name] = version
	return nil
}

// bindAgain gives a slot whose mount had died back to pods that have it: the kubelet would not,
// and a container that is started again would find an empty directory.
func (r *round) bindAgain(ctx context.Context, s slot) error {
	if !taken(s.pv) || r.pods == nil {
		return nil
	}
	targets, err := filepath.Glob(filepath.Join(r.cfg.KubeletDir, "pods/*/volumes/kubernetes.io~local-volume", s.name))
	if err != nil {
		return err
	}
	own, _ := r.table.At(mountPoint(r.cfg.Dir, s.name))
	targets = slices.DeleteFunc(targets, func(t string) bool {
		there, mounted := r.table.At(t)
		young := !mounted && !isOld(t)
		r.again = r.again || young
		return young || mounted && (there.Dev == own.Dev || !there.FUSE())
	})
	if len(targets) == 0 {
		return nil
	}
	pods, err := r.pods.Pods(ctx)
	if err != nil {
		return fmt.Errorf("list the pods of this node: %w", err)
	}
	var errs []error
	for _, t := range targets {
		uid := strings.Split(strings.TrimPrefix(t, filepath.Join(r.cfg.KubeletDir, "pods")+"/"), "/")[0]
		if p, ok := pods[uid]; !ok || p.Ending {
			continue
		}
		r.cfg.Log.Warn("local volume bound again", "volume", s.name, "target", t)
		err := r.broker.Unmount(ctx, t) // what died there
		if err == nil {
			err = r.broker.Bind(ctx, s.name, "", t, true)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// isOld reports whether a directory was not made just now by a kubelet that is about to mount there.
func isOld(path string) bool {
	var st unix.Stat_t
	return unix.Lstat(path, &st) == nil && time.Since(time.Unix(st.Ctim.Unix())) > justMade
}

const justMade = 5 * time.Second

// clearAway removes what is mounted, or was, of slots that have no PersistentVolume: nobody can
// have them.
func (r *round) clearAway(ctx context.Context) error {
	entries, err := os.ReadDir(r.cfg.Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	names := slices.AppendSeq(slices.Collect(maps.Keys(r.held)), maps.Keys(r.made))
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), driver.LocalPrefix) {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	var errs []error
	for _, name := range slices.Compact(names) {
		if _, ok := r.slots[name]; ok {
			continue
		}
		_, err := r.cluster.PersistentVolumes().Get(ctx, name)
		if err == nil { // the watch will tell
			continue
		}
		if apierrors.IsNotFound(err) || r.refused(err) {
			_, err = r.remove(ctx, name)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("clear away %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// offer makes the slots that are missing.
func (r *round) offer(ctx context.Context) error {
	if r.ended {
		return nil
	}
	taken := map[string]map[int]bool{}
	note := func(s slot) {
		if taken[s.dataset] == nil {
			taken[s.dataset] = map[int]bool{}
		}
		taken[s.dataset][s.number] = true
	}
	for _, s := range r.slots {
		note(s)
	}
	for _, s := range r.made {
		note(s)
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(r.datasets)) {
		errs = append(errs, r.offerDataset(ctx, r.datasets[name], taken[name]))
	}
	return errors.Join(errs...)
}

func (r *round) offerDataset(ctx context.Context, d dataset, taken map[int]bool) error {
	secret, version, err := r.credentials(d.secret)
	if err != nil {
		return r.tell(ctx, d.name, err)
	}
	what := fmt.Sprint(d, version)
	for number := range d.slots {
		if taken[number] {
			continue
		}
		if !r.due(d.name, what) {
			return nil
		}
		if err := r.create(ctx, newSlot(d, number, r.cfg.Node), secret, version); err != nil {
			return r.failed(ctx, d.name, d.name, what, err)
		}
		delete(r.retries, d.name)
	}
	return nil
}

// create mounts a slot and then offers it, or leaves nothing.
func (r *round) create(ctx context.Context, s slot, secret map[string]string, version string) (err error) {
	defer func() {
		if err != nil {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
			defer cancel()
			if _, rerr := r.remove(ctx, s.name); rerr != nil {
				r.cfg.Log.Error("undo a local volume", "volume", s.name, "err", rerr)
			}
		}
	}()
	if err := r.mount(ctx, s, secret, version); err != nil {
		return err
	}
	if r.node == nil {
		if r.node, err = r.cluster.Nodes().Get(ctx, r.cfg.Node); err != nil {
			return fmt.Errorf("node %s: %w", r.cfg.Node, err)
		}
	}
	pv, err := s.volume(r.cfg.Dir, r.node)
	if err != nil {
		return err
	}
	if _, err := r.cluster.PersistentVolumes().Create(ctx, pv); err != nil {
		return fmt.Errorf("create persistent volume %s: %w", s.name, err)
	}
	r.made[s.name] = s
	r.cfg.Log.Info("local volume offered", "volume", s.name, "dataset", s.dataset)
	return nil
}

const undoTimeout = 10 * time.Second

// due reports whether it is time for a try. what it is that is tried tells a repetition from
// something new.
func (r *round) due(try, what string) bool {
	t := r.retries[try]
	return t == nil || t.what != what || !time.Now().Before(t.next)
}

// failed puts off the next try, and tells users of what is not over in a moment.
func (r *round) failed(ctx context.Context, dataset, try, what string, err error) error {
	t := r.retries[try]
	if t == nil || t.what != what {
		t = &retry{what: what, since: time.Now(), wait: soon}
		r.retries[try] = t
	}
	r.again = r.again || t.wait < interval
	t.next, t.wait = time.Now().Add(t.wait), min(2*t.wait, maxRetry)
	const patience = time.Minute // with a worker or a store that is being started, and with a mount that is yet to be given back
	transient := errors.Is(err, object.ErrUnavailable) || errors.Is(err, object.ErrBusy)
	if api := apierrors.APIStatus(nil); errors.As(err, &api) || transient && time.Since(t.since) < patience {
		return err
	}
	return r.tell(ctx, dataset, fmt.Errorf("%w%s", err, remedy(err)))
}

// remedy is what an administrator can do about a source that refuses.
func remedy(err error) string {
	for _, r := range []struct {
		is   error
		text string
	}{
		{object.ErrNotFound, "; correct source and endpoint, or make what they name"},
		{object.ErrDenied, "; see that secret names the right Secret, and that its user may list and read the source"},
		{object.ErrUnavailable, "; see that endpoint is right, and that workers on this node can reach it"},
	} {
		if errors.Is(err, r.is) {
			return r.text
		}
	}
	return ""
}

// tell says on the ConfigMap what is wrong with a dataset; nil is nothing.
func (r *round) tell(ctx context.Context, dataset string, err error) error {
	if err == nil || r.configMap == nil {
		return err
	}
	text := strings.ReplaceAll(strings.ReplaceAll(err.Error(), ": "+object.ErrInvalid.Error(), ""), "\n", "; ")
	r.sayOnce(dataset, text)
	m := r.configMap
	return r.events.Warn(ctx, corev1.ObjectReference{
		APIVersion: "v1", Kind: "ConfigMap", Namespace: m.Namespace, Name: m.Name, UID: m.UID, ResourceVersion: m.ResourceVersion,
	}, dataset, "DatasetNotOffered", fmt.Sprintf("Dataset %q: %s", dataset, text))
}

// sayOnce logs what stays true for a while.
func (c *Controller) sayOnce(about, text string) {
	if c.told[about] != text {
		c.told[about] = text
		c.cfg.Log.Warn("local volumes", "about", about, "what", text)
	}
}
