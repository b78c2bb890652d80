package kubemounts

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/larderfs/larder/driver/kube"
	"github.com/larderfs/larder/master/client"
	"github.com/larderfs/larder/sanity/kubetest"
	"github.com/larderfs/larder/sanity/leak"
)

func TestMain(m *testing.M) { os.Exit(leak.Run(m)) }

// table is a mount table in memory.
type table struct {
	mu    sync.Mutex
	ms    []client.Mount
	err   error
	calls int
}

func (t *table) ApplyMounts(_ context.Context, ms []client.Mount) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.calls++
	if t.err != nil {
		return t.err
	}
	t.ms = slices.Clone(ms)
	return nil
}

func (t *table) text() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []string
	for _, m := range t.ms {
		all = append(all, fmt.Sprintf("%s=%s(%s)", m.Path, m.URI, m.Object))
	}
	return strings.Join(all, " ")
}

func start(t *testing.T, tab *table) (*kubetest.Custom, kube.MountObjects) {
	t.Helper()
	api := kubetest.StartCustom(t, "/apis/"+kube.MountsAPI+"/mounts")
	c, err := kube.Connect(api.Kubeconfig(t), "test")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- New(c.Mounts(), tab, slog.New(slog.DiscardHandler)).Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return api, c.Mounts()
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

func TestObjectsBecomeMounts(t *testing.T) {
	tab := &table{}
	api, objects := start(t, tab)
	ctx := t.Context()
	ready := func(name, want string) {
		t.Helper()
		eventually(t, name+" is "+want, func() bool { return api.Field(name, "status", "conditions", "0", "reason") == want })
	}
	make := func(name, path, uri string) {
		t.Helper()
		if err := objects.Create(ctx, name, kube.MountSpec{Path: path, URI: uri}); err != nil {
			t.Fatal(err)
		}
	}
	make("sales", "/sales/", "s3://bucket")
	ready("sales", "Mounted")
	make("bad", "/x/../y", "s3://bucket")
	make("twin", "/sales", "s3://other")
	ready("bad", "Invalid")
	ready("twin", "Conflict")
	if m := api.Field("twin", "status", "conditions", "0", "message"); !strings.Contains(m, "older Mount sales") {
		t.Error(m)
	}
	if got := tab.text(); got != "/sales=s3://bucket(sales)" {
		t.Error(got)
	}
	list, _, err := objects.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	sales := list[slices.IndexFunc(list, func(m kube.Mount) bool { return m.Name == "sales" })]
	spec := sales.Spec
	spec.Path = "/turnover"
	if err := objects.Replace(ctx, sales, spec); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the path is free for the twin", func() bool { return tab.text() == "/sales=s3://other(twin) /turnover=s3://bucket(sales)" })
	ready("twin", "Mounted")
	eventually(t, "the status is of the new spec", func() bool { return api.Field("sales", "status", "observedGeneration") == "2" })
	if err := objects.Replace(ctx, sales, spec); !apierrors.IsConflict(err) {
		t.Errorf("an object that has changed since was replaced: %v", err)
	}
	if err := objects.Delete(ctx, "twin"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a deleted object makes no mount", func() bool { return tab.text() == "/turnover=s3://bucket(sales)" })
}

// A table that cannot be changed is tried again; nothing is said of the objects meanwhile.
func TestAMasterThatIsAwayIsTriedAgain(t *testing.T) {
	tab := &table{err: errors.New("away")}
	api, objects := start(t, tab)
	if err := objects.Create(t.Context(), "sales", kube.MountSpec{Path: "/sales", URI: "s3://bucket"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it was tried", func() bool { tab.mu.Lock(); defer tab.mu.Unlock(); return tab.calls > 0 })
	if s := api.Field("sales", "status", "conditions", "0", "reason"); s != "" {
		t.Errorf("%s", s)
	}
	tab.mu.Lock()
	tab.err = nil
	tab.mu.Unlock()
	eventually(t, "it is mounted", func() bool { return api.Field("sales", "status", "conditions", "0", "status") == "True" })
}

// A round in which nothing has changed writes nothing.
func TestNothingIsWrittenTwice(t *testing.T) {
	tab := &table{}
	api, objects := start(t, tab)
	if err := objects.Create(t.Context(), "a", kube.MountSpec{Path: "/a", URI: "s3://bucket"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is mounted", func() bool {
		return tab.text() != "" && api.Field("a", "status", "conditions", "0", "status") == "True"
	})
	before := len(api.Writes())
	tab.mu.Lock()
	calls := tab.calls
	tab.mu.Unlock()
	if err := objects.Create(t.Context(), "b", kube.MountSpec{Path: "/b", URI: "s3://bucket"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "two rounds more", func() bool { tab.mu.Lock(); defer tab.mu.Unlock(); return tab.calls > calls+1 })
	if got := api.Writes()[before:]; len(got) != 2 { // the object, and its status
		t.Errorf("writes: %v", got)
	}
}
