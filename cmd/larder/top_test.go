package main

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/larderfs/larder/master/client"
	"github.com/larderfs/larder/master/record"
)

var rewrite = flag.Bool("rewrite", false, "write the golden files anew")

// golden compares got with a file of testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *rewrite {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s is now (-rewrite writes it):\n%s", path, got)
	}
}

var noon = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

// some are workers at noon and n seconds.
func some(n uint64) []client.Worker {
	at := noon.Add(time.Duration(n) * time.Second)
	pod := client.Published{Volume: client.Volume{ID: "lv-1"}, Pods: []client.Pod{{UID: "u1"}, {UID: "u2"}}}
	again := client.Published{Volume: client.Volume{ID: "lv-2"}, Pods: []client.Pod{{UID: "u1"}}}
	ws := []client.Worker{
		{Registration: client.Registration{UUID: "1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed", Node: "node-a", CapacityBytes: 100 << 30, Addresses: []string{"10.244.1.7:9814"}, Volumes: []client.Published{pod, again}}, Seen: at},
		{Registration: client.Registration{UUID: "9c858901-8a57-4791-81fe-4c455b099bc9", Node: "node-b", CapacityBytes: 10 << 30, Addresses: []string{"10.244.2.9:9814"}}, Seen: at},
		{Registration: client.Registration{UUID: "16fd2706-8baf-433b-82eb-8c7fada847da", Node: "node-c", CapacityBytes: 1 << 40, Addresses: []string{"10.244.3.2:9814"}, Volumes: []client.Published{pod}}, Gone: true, Unanswered: "gone since 2026-06-01T11:50:00Z", Seen: noon.Add(-10 * time.Minute)},
		{Registration: client.Registration{UUID: "6ecd8c99-4036-403d-bf84-cf8400f67836", Node: "node-d", CapacityBytes: 1 << 40}, Unanswered: "it has no address: start it with --listen", Seen: at},
	}
	ws[0].Stats = record.Stats{CachedBytes: 25 << 30, Objects: 9, HitChunks: 300, MissChunks: 100, FetchedBytes: 1e9 + n*125e6, ReadRequests: 50 + 7*n, Mounts: 2, Started: noon.Add(-26 * time.Hour)}
	ws[1].Stats = record.Stats{FetchedBytes: n, Started: noon.Add(-4 * time.Minute)}
	return ws
}

func table(t *testing.T, s workersStatus) string {
	t.Helper()
	var b strings.Builder
	if err := s.print(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestTopAsATable(t *testing.T) {
	first := newWorkersStatus(noon, some(0), workersStatus{})
	golden(t, "top-first.golden", table(t, first))
	second := newWorkersStatus(noon.Add(2*time.Second), some(2), first)
	golden(t, "top.golden", table(t, second))

	restarted := some(4)
	restarted[0].Stats.Started, restarted[0].Stats.FetchedBytes = noon.Add(3*time.Second), 5
	third := newWorkersStatus(noon.Add(4*time.Second), restarted, second)
	if w := third.Workers[0]; w.FetchBytesPerSec != nil {
		t.Errorf("%v bytes a second of a worker that was started again", *w.FetchBytesPerSec)
	}
	if w := third.Workers[1]; w.FetchBytesPerSec == nil || *w.FetchBytesPerSec != 1 {
		t.Errorf("the other one: %v", w.FetchBytesPerSec)
	}
	golden(t, "top-none.golden", table(t, newWorkersStatus(noon, nil, third)))
}

func TestTopAsJSON(t *testing.T) {
	first := newWorkersStatus(noon, some(0), workersStatus{})
	var b strings.Builder
	if err := printJSON(&b, newWorkersStatus(noon.Add(2*time.Second), some(2), first)); err != nil {
		t.Fatal(err)
	}
	golden(t, "top.json", b.String())
}

func TestAFrameFitsTheTerminal(t *testing.T) {
	s := newWorkersStatus(noon, some(0), workersStatus{})
	visible := func(f string) []string {
		f = strings.NewReplacer(home, "", restOfLine, "", restOfAll, "").Replace(f)
		return strings.Split(f, "\n")
	}
	for _, c := range []struct{ rows, columns, want int }{{24, 80, 7}, {5, 20, 5}, {1, 1, 1}} {
		lines := visible(cut(s, nil, c.rows, c.columns))
		if len(lines) != c.want {
			t.Errorf("%d lines on %d; want %d", len(lines), c.rows, c.want)
		}
		for _, l := range lines {
			if len(l) > c.columns {
				t.Errorf("%q on %d columns", l, c.columns)
			}
		}
	}
	lost := visible(cut(s, errors.New("gone fishing"), 24, 200))
	if !strings.Contains(lost[0], "gone fishing") || !strings.Contains(strings.Join(lost, "\n"), "node-a") {
		t.Errorf("without a master: %q; want its error and the last table", lost)
	}
}

func TestLocateAsATable(t *testing.T) {
	l := newLocation("s3://b/sales", []client.Located{
		{Node: "node-a", UUID: "1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed", Addresses: []string{"10.244.1.7:9814"}, Held: record.Held{Stores: 1}},
		{Node: "node-b", UUID: "9c858901-8a57-4791-81fe-4c455b099bc9", Addresses: []string{"10.244.2.9:9814"}, Unanswered: "no answer from 10.244.2.9:9814"},
		{Node: "node-c", UUID: "16fd2706-8baf-433b-82eb-8c7fada847da", Addresses: []string{"10.244.3.2:9814"}, Held: record.Held{CachedBytes: 3 << 30, Objects: 8, CompleteObjects: 7, Stores: 2}},
		{Node: "node-d", UUID: "6ecd8c99-4036-403d-bf84-cf8400f67836", Unanswered: "it has no address: start it with --listen"},
	})
	var b strings.Builder
	if err := l.print(&b); err != nil {
		t.Fatal(err)
	}
	golden(t, "locate.golden", b.String())
	b.Reset()
	if err := printJSON(&b, l); err != nil {
		t.Fatal(err)
	}
	golden(t, "locate.json", b.String())
	b.Reset()
	if err := newLocation("s3://b", nil).print(&b); err != nil || b.String() != "no worker is registered\n" {
		t.Errorf("%q, %v", b.String(), err)
	}
}

func TestListsAsTables(t *testing.T) {
	ws := some(0)
	ws[0].Volumes[0].Pods[0].Namespace, ws[0].Volumes[0].Pods[0].Name = "prod", "reader-0"
	ws[1].Volumes = []client.Published{{Volume: client.Volume{ID: "csi-1"}, Inline: true, Pods: []client.Pod{{Namespace: "test", Name: "once", UID: "u3"}}}, {Volume: client.Volume{ID: "lv-1"}}}
	ws[0].ReservedBytes, ws[0].Version = 5<<30, "v1.2.3"
	ws[1].Drained, ws[2].Drained = noon, noon
	var b strings.Builder
	if err := printWorkers(&b, workerEntries(ws), noon.Add(7*time.Second)); err != nil {
		t.Fatal(err)
	}
	golden(t, "worker-ls.golden", b.String())
	vs := []client.Volume{
		{ID: "lv-1", Name: "pvc-sales", Parameters: map[string]string{"source": "s3://b/sales"}},
		{ID: "lv-2", Node: "node-a", CapacityBytes: 5 << 30, Parameters: map[string]string{"source": "s3://b/logs", "binding": "node"}},
		{ID: "lv-3", Name: "pvc-idle", Parameters: map[string]string{"source": "file:///data"}},
	}
	entries := volumeEntries(vs, []client.Worker{ws[0], ws[1]})
	b.Reset()
	if err := printVolumes(&b, entries); err != nil {
		t.Fatal(err)
	}
	golden(t, "volume-ls.golden", b.String())
	b.Reset()
	if err := printJSON(&b, entries); err != nil {
		t.Fatal(err)
	}
	golden(t, "volume-ls.json", b.String())
	b.Reset()
	if err := printJSON(&b, workerEntries(ws[:1])); err != nil {
		t.Fatal(err)
	}
	golden(t, "worker-ls.json", b.String())
}

func TestAVolumeIsShownWithWhoHasIt(t *testing.T) {
	d := volumeDetail{Volume: "lv-1", Name: "pvc-sales", Bytes: 5 << 30, Node: "node-a", Created: noon.Add(-50 * time.Hour),
		Parameters: map[string]string{"source": "s3://b/sales", "layout": "full", "freshness": "1m0s", "binding": "node"}}
	said := record.MountedVolume{
		Namespace: "prod", Claim: "sales", Mounted: noon.Add(-26 * time.Hour), Takeovers: 3, LongestStall: 87654 * time.Microsecond, OpenFiles: 4,
		Counted: noon.Add(-time.Hour), DiskBytes: 3 << 30, MemoryBytes: 1 << 20, StoreBytes: 5 << 20, PassedBytes: 9 << 30, FetchedBytes: 6 << 20, HitChunks: 300, MissChunks: 6,
	}
	away := said // its broker is
	away.Mounted, away.Takeovers, away.LongestStall, away.Without, away.Trouble = time.Time{}, 0, 0, []string{"resend", "passthrough"}, "EIO: s3://b/sales/x: store unavailable"
	d.add([]client.VolumeOnNode{
		{Node: "node-a", UUID: "1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed", Pods: []client.Pod{{Namespace: "prod", Name: "reader-0", UID: "u1"}, {UID: "u2"}}, Volume: said},
		{Node: "node-b", UUID: "9c858901-8a57-4791-81fe-4c455b099bc9", Volume: away},
		{Node: "node-c", UUID: "16fd2706-8baf-433b-82eb-8c7fada847da", Unanswered: "no answer from 10.244.3.2:9814"},
	})
	var b strings.Builder
	if err := d.print(&b, noon); err != nil {
		t.Fatal(err)
	}
	golden(t, "volume-show.golden", b.String())
	b.Reset()
	if err := printJSON(&b, d); err != nil {
		t.Fatal(err)
	}
	golden(t, "volume-show.json", b.String())

	inline := volumeDetail{Volume: "csi-1", Inline: true}
	inline.add(nil)
	b.Reset()
	if err := inline.print(&b, noon); err != nil || !strings.Contains(b.String(), "(inline)") || !strings.Contains(b.String(), "mounted nowhere") {
		t.Errorf("%s, %v", &b, err)
	}
	inline.add([]client.VolumeOnNode{{Node: "node-a", Volume: record.MountedVolume{Inline: true, Namespace: "prod", Parameters: map[string]string{"path": "/sales"}}}})
	b.Reset()
	if err := inline.print(&b, noon); err != nil || !strings.Contains(b.String(), "/sales") || !strings.Contains(b.String(), "prod") {
		t.Errorf("%s, %v", &b, err)
	}
}
