package cacheworker

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/larderfs/larder/cacheworker/fill"
)

// memory says how much the worker may use, and divides it.
//
// The limit is the flag's, or nine tenths of the cgroup's (v1 or v2) without what tiers in memory may take, which
// is counted there, or none. Go's heap is
// kept below it by GOMEMLIMIT; what is fetched and not yet written, and what is read through,
// have budgets of their own, at which readers wait.
type memory struct {
	limit int64 // bytes; 0 for none
}

func newMemory(flag, tiers int64, cgroupRoot, self string) (memory, error) {
	if flag > 0 {
		return memory{flag}, nil
	}
	limit, err := cgroupLimit(cgroupRoot, self)
	if err != nil || limit == 0 {
		return memory{}, err
	}
	own := (limit - tiers) / 10 * 9
	if own < minMemory && tiers > 0 {
		return memory{}, fmt.Errorf("of the cgroup's %d bytes %d are for tiers in memory: that leaves less than 64MiB for the worker", limit, tiers)
	}
	return memory{own}, nil
}

// goLimit is Go's soft limit: what remains is for chunks, which are outside the heap, page tables and pipes.
func (m memory) goLimit() int64 {
	if m.limit == 0 {
		return math.MaxInt64
	}
	f := m.fills()
	return m.limit/10*9 - f.MaxInFlightBytes - f.RecentBytes
}

// A worker that starts reads the node tables of all mounts while their readers wait: no collection of
// garbage then, unless that makes more than some.
const (
	quietFor   = 3 * time.Second
	quietBytes = 1 << 30
)

// startQuietly limits Go's heap, more than that at first. end has to be called.
func (m memory) startQuietly() (end func()) {
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(min(m.goLimit(), quietBytes))
	loud := sync.OnceFunc(func() {
		debug.SetGCPercent(100)
		debug.SetMemoryLimit(m.goLimit())
	})
	t := time.AfterFunc(quietFor, loud)
	return func() {
		t.Stop()
		loud()
	}
}

// fills is the share of what is on its way, and of what the cache has no room for.
func (m memory) fills() fill.Config {
	if m.limit == 0 {
		return fill.Config{}
	}
	return fill.Config{
		MaxInFlightBytes: min(160<<20, max(m.limit/4, 8<<20)),
		RecentBytes:      min(64<<20, max(m.limit/16, 1<<20)),
	}
}

// names is how many entries of folders may be remembered, at some 250 bytes each.
func (m memory) names() int {
	if m.limit == 0 {
		return 0
	}
	return int(min(1_000_000, max(m.limit/8/250, 10_000)))
}

// cgroupLimit is the smallest memory limit of the cgroups that this process is in, in bytes; 0 for
// none. root is where they are mounted, self is /proc/self/cgroup.
func cgroupLimit(root, self string) (int64, error) {
	f, err := os.Open(self)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	limit := int64(0)
	for sc := bufio.NewScanner(f); sc.Scan(); {
		_, rest, _ := strings.Cut(sc.Text(), ":") // hierarchy:controllers:path
		controllers, path, _ := strings.Cut(rest, ":")
		var dir, file string
		switch {
		case controllers == "":
			dir, file = root, "memory.max"
			if _, err := os.Stat(filepath.Join(root, "unified")); err == nil {
				dir = filepath.Join(root, "unified")
			}
		case strings.Contains(","+controllers+",", ",memory,"):
			dir, file = filepath.Join(root, "memory"), "memory.limit_in_bytes"
		default:
			continue
		}
		for p := filepath.Clean("/" + path); ; p = filepath.Dir(p) { // a parent's limit counts too
			limit = smaller(limit, readLimit(filepath.Join(dir, p, file)))
			if p == "/" {
				break
			}
		}
	}
	return limit, nil
}

// readLimit is 0 for none: no such file, "max", or v1's page-rounded infinity.
func readLimit(file string) int64 {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil || n >= 1<<60 {
		return 0
	}
	return n
}

func smaller(a, b int64) int64 {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}
