package sanity

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/larderfs/larder/cacheworker/workerpb"
	"github.com/larderfs/larder/sanity/s3test"
)

// A worker with a tier in memory and one on the disk reads right bytes while files move, and the next one fetches nothing again,
// whether it was killed or is replaced as planned.
func TestTiersOfAWorker(t *testing.T) {
	memory, err := os.MkdirTemp("/dev/shm", "larder-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(memory) })
	store := s3test.Start(t)
	objects := map[string][]byte{}
	for i := range 24 {
		objects[fmt.Sprintf("ds/f%02d", i)] = pattern(1<<20, uint64(i))
	}
	put(t, store, objects)
	disk := t.TempDir() + "/disk"
	s := up(t, "--tier", disk+":64MiB", "--tier", memory+":16MiB:MEM")
	_, target := publish(t, s.Kubelet, bucket(store, "v", "ds", "complete", "always"))
	readAll := func() {
		t.Helper()
		for name, want := range objects {
			if got := mustShell(t, "cat "+target+"/data/"+strings.TrimPrefix(name, "ds/")); got != string(want) {
				t.Errorf("%s has wrong bytes", name)
			}
		}
	}
	tiersOf := func(n int) []*workerpb.TierStatus {
		t.Helper()
		all := workerStatus(t, s.Dir()).GetTiers()
		if len(all) != n {
			t.Fatalf("%d tiers, want %d: %v", len(all), n, all)
		}
		return all
	}
	readAll()
	eventually(t, "what does not fit into memory is on the disk", func() bool {
		all := tiersOf(2)
		return all[0].GetKind() == "MEM" && all[0].GetObjects() > 0 && all[0].GetCachedBytes() <= 15<<20 &&
			all[0].GetObjects()+all[1].GetObjects() >= int64(len(objects)) && all[0].GetEvictedBytes() == 0
	})
	fetched := workerStatus(t, s.Dir()).GetFetchedBytes()
	readAll()
	if again := workerStatus(t, s.Dir()).GetFetchedBytes(); again != fetched {
		t.Errorf("%d bytes were fetched again", again-fetched)
	}
	uuid := workerStatus(t, s.Dir()).GetUuid()

	first, _ := serving(t, s.Dir())
	syscall.Kill(first, syscall.SIGKILL)
	readAll()
	first, _ = serving(t, s.Dir())
	if err := syscall.Kill(s.PID(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another worker serves", func() bool {
		now, volumes := serving(t, s.Dir())
		return now != 0 && now != first && volumes == 1
	})
	readAll()
	tiersOf(2)
	if n := workerStatus(t, s.Dir()).GetFetchedBytes(); n != 0 {
		t.Errorf("the new worker has fetched %d bytes", n)
	}
	out := mustShell(t, s.Binary+" status --dir "+s.Dir())
	if !strings.Contains(out, "MEM      ") || !strings.Contains(out, disk) {
		t.Errorf("status does not tell of the tiers:\n%s", out)
	}
	if workerStatus(t, s.Dir()).GetUuid() != uuid {
		t.Error("it is another worker now")
	}
}
