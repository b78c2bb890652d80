package main

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/workerpb"
)

func TestStatusTellsWhoHoldsWhatSinceWhen(t *testing.T) {
	const uuid = "1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed"
	w := &workerpb.WorkerStatus{
		Uuid: uuid, Version: "v1.2.3", Pid: 7, Started: timestamppb.New(noon), CachedBytes: 3 << 30, CapacityBytes: 10 << 30, Objects: 9,
		CompleteObjects: 4, ReadRequests: 1000, FetchedBytes: 5 << 20, ResentRequests: 3,
		Volumes: []*workerpb.VolumeStatus{
			{VolumeId: "lv-b", OpenHandles: 2, Nodes: 40, Without: []string{"passthrough"}}, {VolumeId: "lv-c", Without: []string{"resend"}}},
		Features: []*workerpb.Feature{{Name: "passthrough", Reason: "not offered by a flag"}, {Name: "resend", Available: true}},
	}
	rebooted := &workerpb.WorkerStatus{Uuid: uuid, Version: "v1.2.3", Pid: 7, Started: timestamppb.New(noon), CachedBytes: 3 << 30, CapacityBytes: 10 << 30,
		Objects: 9, ReadingIndex: true, UnverifiedBytes: 1 << 30, BadChunks: 2, CacheErrors: 5,
		Tiers: []*workerpb.TierStatus{
			{Dir: "/dev/shm/larder", Kind: "MEM", Healthy: true, CachedBytes: 1 << 20, CapacityBytes: 1 << 30, Objects: 1, ReceivedBytes: 1 << 20},
			{Dir: "/mnt/nvme", Kind: "SSD", CachedBytes: 3 << 30, CapacityBytes: 9 << 30, Objects: 8, PinnedBytes: 2 << 30, EvictedBytes: 5},
			{Dir: "/mnt/disk", Kind: "HDD", Error: "open /mnt/disk: input/output error"}}}
	in := func(s string) brokerwire.Volume { return brokerwire.Volume{Source: "s3://bucket/" + s} }
	mounts := []brokerwire.Mount{
		{VolumeID: "lv-c", Path: "/p/c", Volume: in("c"), Since: noon.Add(-time.Hour), Takeovers: 12, LongestStall: 61250 * time.Millisecond,
			WorkerSince: noon.Add(-time.Second), Without: []string{"resend", "passthrough"}},
		{VolumeID: "lv-b", Path: "/p/b", Volume: in("b"), Since: noon.Add(-time.Hour), Served: true, Takeovers: 2, LongestStall: 123456789,
			Worker: uuid, WorkerPID: 4711, WorkerSince: noon.Add(time.Second), Without: []string{"passthrough"}},
		{VolumeID: "lv-a", Path: "/p/a", Volume: in("a"), Since: noon, Served: true, Worker: uuid, WorkerSince: noon.Add(time.Second)}, // in another PID namespace
	}
	for name, c := range map[string]struct {
		worker *workerpb.WorkerStatus
		broker int
		mounts []brokerwire.Mount
		err    string
	}{
		"status":           {w, 42, mounts, ""},
		"status-no-worker": {nil, 42, mounts[:1], "worker: connection refused"},
		"status-rebooted":  {rebooted, 42, nil, ""},
		"status-no-broker": {w, 0, nil, "broker: connection refused"},
	} {
		s := newStatus(c.worker, c.broker, c.mounts)
		if c.err != "" {
			s.Errors = append(s.Errors, c.err)
		}
		var text, js strings.Builder
		if err := s.print(&text); err != nil {
			t.Fatal(err)
		}
		if err := printJSON(&js, s); err != nil {
			t.Fatal(err)
		}
		golden(t, name+".golden", text.String())
		golden(t, name+".json", js.String())
	}
}
