package sanity

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/larderfs/larder/sanity/s3test"
	"github.com/larderfs/larder/sanity/stack"
)

// `larder up` has a worker in reserve, which serves when the first one dies; the death of the one in
// reserve is nobody's business, and a planned hand-over passes it by.
func TestTheWorkerInReserve(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"ds/a": pattern(100_000, 1), "ds/b": pattern(100_000, 2)})
	s := up(t)
	_, target := publish(t, s.Kubelet, bucket(store, "v", "ds", "freshness", "1s"))
	mustShell(t, "cat "+target+"/data/a")
	for range 2 {
		first, _ := serving(t, s.Dir())
		spare := inReserve(t, s, 0)
		syscall.Kill(first, syscall.SIGKILL)
		mustShell(t, "cat "+target+"/data/b")
		if now, volumes := serving(t, s.Dir()); now != spare || volumes != 1 {
			t.Errorf("worker %d serves %d volumes, in reserve was %d", now, volumes, spare)
		}
	}
	first, _ := serving(t, s.Dir())
	spare := inReserve(t, s, 0)
	syscall.Kill(spare, syscall.SIGKILL)
	spare = inReserve(t, s, spare)
	if now, _ := serving(t, s.Dir()); now != first {
		t.Errorf("worker %d serves, before the reserve died %d did", now, first)
	}
	if err := syscall.Kill(s.PID(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another worker serves", func() bool {
		now, volumes := serving(t, s.Dir())
		return now != 0 && now != first && volumes == 1
	})
	if now, _ := serving(t, s.Dir()); now == spare {
		t.Error("the worker in reserve had the cache before the new one")
	}
	inReserve(t, s, spare)
	mustShell(t, "cat "+target+"/data/a "+target+"/data/b")
}

// inReserve waits for a child of larder up that waits for the cache's lock, and is another than before.
func inReserve(t *testing.T, s *stack.Stack, before int) (pid int) {
	t.Helper()
	eventually(t, "a worker is in reserve", func() bool {
		locks, err := os.ReadFile("/proc/locks")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(locks)) {
			f := strings.Fields(line) // 1: -> FLOCK ADVISORY WRITE pid …
			if len(f) < 6 || f[1] != "->" || f[2] != "FLOCK" {
				continue
			}
			fmt.Sscan(f[5], &pid)
			stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			_, rest, _ := strings.Cut(string(stat), ") ") // behind the name
			var state string
			var parent int
			fmt.Sscan(rest, &state, &parent)
			if parent == s.PID() && pid != before {
				return true
			}
		}
		return false
	})
	return pid
}
