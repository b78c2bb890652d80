package master_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/larderfs/larder/master"
	"github.com/larderfs/larder/master/client"
	"github.com/larderfs/larder/master/record"
)

// A drained node gets nothing new, over a restart of the master, until that is undone.
func TestADrainedNodeGetsNothingNew(t *testing.T) {
	cfg := master.Config{Dir: t.TempDir()}
	m := start(t, cfg)
	regs := []client.Registration{worker("n1", 1000), worker("n2", 1000)}
	stop := register(t, m.Client, regs...)
	ctx := t.Context()
	job := func(kind record.JobKind, nodes ...string) ([]string, error) {
		j, err := m.CreateJob(ctx, client.JobSpec{Kind: kind, URIs: []string{"s3://b"}, Nodes: nodes})
		var on []string
		for _, n := range j.Nodes {
			on = append(on, n.Node)
		}
		return on, err
	}
	drained := func() (nodes []string) {
		ws, err := m.AllWorkers(ctx, false)
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range ws {
			if !w.Drained.IsZero() {
				nodes = append(nodes, w.Node)
			}
		}
		return nodes
	}
	if err := m.DrainWorker(ctx, "n9", false); !errors.Is(err, client.ErrNotFound) || !strings.Contains(err.Error(), "larder worker ls") {
		t.Errorf("a node that nobody knows: %v", err)
	}
	if err := m.DrainWorker(ctx, "n9", true); !errors.Is(err, client.ErrNotFound) {
		t.Errorf("the same, undone: %v", err)
	}
	if got := drained(); got != nil {
		t.Errorf("%v are drained", got)
	}
	for range 2 {
		if err := m.DrainWorker(ctx, "n2", false); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 2 {
		if got := drained(); !slices.Equal(got, []string{"n2"}) {
			t.Errorf("%v are drained", got)
		}
		for _, kind := range []record.JobKind{record.Load, record.Pin} {
			if on, err := job(kind); err != nil || !slices.Equal(on, []string{"n1"}) {
				t.Errorf("%s: on %v, %v", kind, on, err)
			}
			if _, err := job(kind, "n1", "n2"); !errors.Is(err, client.ErrRefused) || !strings.Contains(err.Error(), "larder worker undrain n2") {
				t.Errorf("%s on a drained node: %v", kind, err)
			}
		}
		for _, kind := range []record.JobKind{record.Free, record.Unpin} {
			if on, err := job(kind); err != nil || !slices.Equal(on, []string{"n1", "n2"}) {
				t.Errorf("%s: on %v, %v", kind, on, err)
			}
		}
		bound := client.VolumeSpec{Name: "bound" + string(rune('a'+i)), CapacityBytes: 10, Nodes: []string{"n2", "n1"}}
		if v, err := m.CreateVolume(ctx, bound); err != nil || v.Node != "n1" {
			t.Errorf("bound to %q, %v", v.Node, err)
		}
		bound.Name, bound.Nodes = "nowhere", []string{"n2"}
		if _, err := m.CreateVolume(ctx, bound); !errors.Is(err, client.ErrExhausted) || !strings.Contains(err.Error(), "drained") {
			t.Errorf("bound to a drained node: %v", err)
		}
		if c, err := m.Capacity(ctx, "n2"); err != nil || c.AvailableBytes != 0 || c.CapacityBytes != 1000 {
			t.Errorf("%+v, %v", c, err)
		}
		if i == 0 {
			stop()
			m.stop(t)
			m = start(t, cfg)
			register(t, m.Client, regs...)
		}
	}
	if err := m.DrainWorker(ctx, "n1", false); err != nil {
		t.Fatal(err)
	}
	if _, err := job(record.Load); !errors.Is(err, client.ErrRefused) || !strings.Contains(err.Error(), "all nodes with a worker are drained") {
		t.Errorf("a load for nobody: %v", err)
	}
	for range 2 {
		if err := errors.Join(m.DrainWorker(ctx, "n1", true), m.DrainWorker(ctx, "n2", true)); err != nil {
			t.Fatal(err)
		}
	}
	if on, err := job(record.Load); err != nil || !slices.Equal(on, []string{"n1", "n2"}) || drained() != nil {
		t.Errorf("undone: on %v, %v, and %v are drained", on, err, drained())
	}
	if v, err := m.CreateVolume(ctx, client.VolumeSpec{Name: "again", CapacityBytes: 10, Nodes: []string{"n2", "n1"}}); err != nil || v.Node != "n2" {
		t.Errorf("undone: bound to %q, %v", v.Node, err)
	}
}
