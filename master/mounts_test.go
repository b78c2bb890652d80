package master_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/larderfs/larder/master"
	"github.com/larderfs/larder/master/client"
)

// follow has a channel of what a follower of the mount table is told.
func follow(t *testing.T, c *client.Client, restore client.Table) <-chan client.Table {
	t.Helper()
	told, done := make(chan client.Table, 1000), make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(done)
		c.FollowMounts(ctx, func() client.Table { return restore }, func(t client.Table) { told <- t })
	}()
	t.Cleanup(func() { cancel(); <-done })
	return told
}

func paths(t client.Table) string {
	var ps []string
	for _, m := range t.Mounts {
		ps = append(ps, m.Path)
	}
	return strings.Join(ps, " ")
}

// await reads until a table with these paths comes.
func await(t *testing.T, told <-chan client.Table, want string) client.Table {
	t.Helper()
	for {
		select {
		case got := <-told:
			if paths(got) == want {
				return got
			}
		case <-t.Context().Done():
			t.Fatalf("no table %q", want)
		}
	}
}

func TestFollowersAreToldOfEachChangeOfTheMountTable(t *testing.T) {
	m := start(t, master.Config{})
	ctx := t.Context()
	told := follow(t, m.Client, client.Table{})
	if empty := await(t, told, ""); empty.ID != "" {
		t.Errorf("a table without mounts ever has an id: %+v", empty)
	}
	put := func(path string) {
		t.Helper()
		if err := m.PutMount(ctx, client.Mount{Path: path, URI: "s3://bkt"}); err != nil {
			t.Fatal(err)
		}
	}
	put("/b")
	first := await(t, told, "/b")
	put("/a")
	await(t, told, "/a /b")
	for _, p := range []string{"/a", "/b"} {
		if err := m.DeleteMount(ctx, p); err != nil {
			t.Fatal(err)
		}
	}
	if last := await(t, told, ""); last.ID == "" || last.ID != first.ID {
		t.Errorf("the table was %q and became %q", first.ID, last.ID)
	}
}

// A master that lost its store is given the table by a worker; one that knows of a table is not.
func TestALostMountTableIsRestored(t *testing.T) {
	m := start(t, master.Config{})
	if err := m.PutMount(t.Context(), client.Mount{Path: "/a", URI: "s3://bkt", AllowInline: []string{"x"}, Credential: "env:A_"}); err != nil {
		t.Fatal(err)
	}
	had := await(t, follow(t, m.Client, client.Table{}), "/a")
	m.stop(t)

	empty := start(t, master.Config{})
	got := await(t, follow(t, empty.Client, had), "/a")
	if got.ID != had.ID || !got.Mounts[0].Equal(had.Mounts[0]) {
		t.Errorf("restored %+v, was %+v", got, had)
	}
	stale := client.Table{ID: "11111111-2222-3333-4444-555555555555", Mounts: []client.Mount{{Path: "/b", URI: "s3://bkt"}}}
	if got := await(t, follow(t, empty.Client, stale), "/a"); got.ID != had.ID {
		t.Errorf("a table that is there was replaced: %+v", got)
	}
}

func TestObjectsOwnTheirMounts(t *testing.T) {
	m := start(t, master.Config{})
	ctx := t.Context()
	told := follow(t, m.Client, client.Table{})
	if err := m.PutMount(ctx, client.Mount{Path: "/hand", URI: "s3://bkt"}); err != nil {
		t.Fatal(err)
	}
	var many []client.Mount // more than a transaction holds
	var want []string
	for i := range 150 {
		many = append(many, client.Mount{Path: fmt.Sprintf("/o/%03d", i), URI: "s3://bkt", Object: "many"})
		want = append(want, many[i].Path)
	}
	if err := m.master.ApplyMounts(ctx, many); err != nil {
		t.Fatal(err)
	}
	await(t, told, "/hand "+strings.Join(want, " "))
	for _, err := range []error{
		m.PutMount(ctx, client.Mount{Path: "/o/000", URI: "s3://other", Object: "many"}), // who calls cannot say that he is an object
		m.DeleteMount(ctx, "/o/000"),
	} {
		if !errors.Is(err, client.ErrRefused) || !strings.Contains(err.Error(), "mounts.larder.dev/many") {
			t.Errorf("a mount that is an object's was changed by hand: %v", err)
		}
	}
	one := client.Mount{Path: "/hand", URI: "s3://bkt", Object: "hand"}
	if err := m.master.ApplyMounts(ctx, []client.Mount{one}); err != nil {
		t.Fatal(err)
	}
	if got := await(t, told, "/hand"); got.Mounts[0].Object != "hand" {
		t.Errorf("%+v", got)
	}
}

func TestOnlyObjectsMakeMountsWhereThatIsAsked(t *testing.T) {
	m := start(t, master.Config{MountObjects: true})
	for _, err := range []error{m.PutMount(t.Context(), client.Mount{Path: "/a", URI: "s3://bkt"}), m.DeleteMount(t.Context(), "/a")} {
		if !errors.Is(err, client.ErrRefused) || !strings.Contains(err.Error(), "--kubeconfig") {
			t.Errorf("%v", err)
		}
	}
	if err := m.master.ApplyMounts(t.Context(), []client.Mount{{Path: "/a", URI: "s3://bkt", Object: "a"}}); err != nil {
		t.Error(err)
	}
}

// A master that ends does not wait for its followers.
func TestFollowersDoNotKeepAMaster(t *testing.T) {
	m := start(t, master.Config{})
	told := follow(t, m.Client, client.Table{})
	await(t, told, "")
	m.cancel()
	if err := <-m.done; err != nil {
		t.Error(err)
	}
	if strings.Contains(m.log.String(), "level=ERROR") {
		t.Errorf("%s", m.log)
	}
}
