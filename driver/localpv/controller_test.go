package localpv

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/driver/kube"
	"github.com/larderfs/larder/sanity/kubetest"
	"github.com/larderfs/larder/sanity/leak"
)

func TestMain(m *testing.M) { os.Exit(leak.Run(m)) }

// tmpfsBroker mounts a tmpfs with domain/ for each volume.
type tmpfsBroker struct {
	mu     sync.Mutex
	mounts map[string]brokerwire.Mount
	fail   error // of every mount
}

func (b *tmpfsBroker) Mount(_ context.Context, v brokerwire.Volume, path string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.fail != nil {
		return b.fail
	}
	if err := unix.Mount("fake", path, "tmpfs", 0, "size=64k"); err != nil {
		return err
	}
	b.mounts[v.ID] = brokerwire.Mount{VolumeID: v.ID, Path: path, Volume: v}
	return os.Mkdir(filepath.Join(path, "domain"), 0o755)
}

func (b *tmpfsBroker) Unmount(_ context.Context, path string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW); err {
	case nil, unix.EINVAL, unix.ENOENT:
	case unix.EBUSY:
		return object.ErrBusy
	default:
		return err
	}
	for id, m := range b.mounts {
		if m.Path == path {
			delete(b.mounts, id)
		}
	}
	return nil
}

func (b *tmpfsBroker) Mounts(context.Context) (ms []brokerwire.Mount, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, m := range b.mounts {
		ms = append(ms, m)
	}
	return ms, nil
}

func (b *tmpfsBroker) RefreshMounts(context.Context, brokerwire.Volume) error {
	return errors.New("a local volume has no mounts of the namespace")
}

func (b *tmpfsBroker) Refresh(context.Context, brokerwire.Volume) error { return nil }

func (b *tmpfsBroker) Bind(_ context.Context, id, _, target string, _ bool) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return unix.Mount(b.mounts[id].Path, target, "", unix.MS_BIND, "")
}

// site is a controller that runs, with one dataset of two slots.
type site struct {
	*Controller
	api    *kubetest.Server
	broker *tmpfsBroker
	dir    string
}

func run(t *testing.T) *site {
	t.Helper()
	s := &site{api: kubetest.Start(t), broker: &tmpfsBroker{mounts: map[string]brokerwire.Mount{}}, dir: t.TempDir()}
	s.api.ControlVolumes(t)
	s.api.Set(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}})
	s.api.Set(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "sets"}, Data: map[string]string{"d": "source: s3://bkt\nslots: 2"}})
	cluster, err := kube.Connect(s.api.Kubeconfig(t), "test")
	if err != nil {
		t.Fatal(err)
	}
	s.Controller, err = New(Config{Node: "n1", Datasets: "ns/sets", Dir: s.dir, KubeletDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)},
		cluster, s.broker, nil, kube.NewRecorder(cluster, "larder", "n1"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		leak.Unmount(s.dir)
	})
	return s
}

// await waits for so many volumes and mounts.
func (s *site) await(t *testing.T, volumes, mounts int) {
	t.Helper()
	s.api.Await(t, func() error {
		if v, m := len(s.api.PersistentVolumes()), len(leak.Mounts(s.dir)); v != volumes || m != mounts {
			return fmt.Errorf("%d volumes, %d mounts; want %d and %d", v, m, volumes, mounts)
		}
		return nil
	})
}

func TestWithdrawnSlotsGoUnlessTheyAreInUse(t *testing.T) {
	s := run(t)
	s.await(t, 2, 2)
	first := s.api.PersistentVolumes()[0]
	s.api.Bind(t, first.Name, "ns", "claim")
	target := t.TempDir()
	if err := unix.Mount(first.Spec.Local.Path, target, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(target, unix.MNT_DETACH)
	s.Withdraw()
	s.await(t, 1, 1)
	if err := unix.Unmount(target, 0); err != nil {
		t.Fatal(err)
	}
	s.await(t, 1, 0) // its claim has it still
}

func TestSlotsAreUnmountedWhereOurRightsHaveGoneFirst(t *testing.T) {
	s := run(t)
	s.await(t, 2, 2)
	s.api.Fault(func(verb, path string) error {
		return apierrors.NewForbidden(schema.GroupResource{Resource: "persistentvolumes"}, path, errors.New("no"))
	})
	s.Withdraw()
	s.await(t, 2, 0)
}

func TestAnOfferThatFailsLeavesNothing(t *testing.T) {
	s := run(t)
	s.await(t, 2, 2)
	s.api.Fault(func(verb, path string) error {
		if verb == "POST" && path == "persistentvolumes" {
			return errors.New("the API server says no")
		}
		return nil
	})
	tried := len(s.api.Calls())
	s.api.Set(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "sets"}, Data: map[string]string{"d": "source: s3://bkt\nslots: 3"}})
	s.api.Await(t, func() error {
		for _, c := range s.api.Calls()[tried:] {
			if c == "POST persistentvolumes" {
				return nil
			}
		}
		return errors.New("it was not tried")
	})
	s.await(t, 2, 2)
	if left, err := os.ReadDir(s.dir); err != nil || len(left) != 2 {
		t.Errorf("left: %v, %v", left, err)
	}
	s.api.Fault(nil)
	s.await(t, 3, 3)
}

func TestAVolumeThatSomebodyDeletesIsOfferedAnew(t *testing.T) {
	s := run(t)
	s.await(t, 2, 2)
	victim := s.api.PersistentVolumes()[0]
	s.api.Remove(victim)
	s.api.Await(t, func() error {
		for _, pv := range s.api.PersistentVolumes() {
			if pv.Name == victim.Name {
				return errors.New("it is there again")
			}
		}
		if _, err := os.Stat(filepath.Join(s.dir, victim.Name)); err == nil {
			return errors.New("its directory stays")
		}
		return nil
	})
	s.await(t, 2, 2)
}

func TestASlotThatSomebodyUnmountsIsMountedAgain(t *testing.T) {
	s := run(t)
	s.await(t, 2, 2)
	name := s.api.PersistentVolumes()[0].Name
	if err := unix.Unmount(mountPoint(s.dir, name), 0); err != nil {
		t.Fatal(err)
	}
	s.Wake()
	s.await(t, 2, 2)
	if s.api.PersistentVolumes()[0].Name != name {
		t.Error("another volume is offered for it")
	}
}
