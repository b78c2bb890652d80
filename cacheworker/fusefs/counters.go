package fusefs

import (
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/telemetry"
)

// Counters are shared by all mounts of a worker.
type Counters struct {
	Reads     atomic.Uint64 // READs that reached the worker
	ReadBytes atomic.Uint64
	Spliced   atomic.Uint64 // READs answered from the cache file without a copy
	Declined  atomic.Uint64 // READs of the kernel's read-ahead that were not answered: see fill.Reader.Decline
	Stale     atomic.Uint64 // opens answered with ESTALE
	Resends   atomic.Uint64 // times the kernel was asked to deliver requests again
	Resent    atomic.Uint64 // requests that it delivered again, and that were answered

	Passed      atomic.Uint64 // opens in passthrough
	PassedBytes atomic.Uint64 // sizes of their files: what is read of them nobody tells
	Cached      atomic.Uint64 // opens of files that are read through the worker and the page cache
	Unpassed    atomic.Uint64 // opens of files that should have been passed through, and could not

	Took     [len(Ops)]telemetry.Latency // to answer; of READs only those that the cache file did not answer at once
	failures failures
}

// Ops are the kinds of requests that may wait for a store, in the order of Counters.Took.
var Ops = [...]string{opLookup: "lookup", opOpen: "open", opRead: "read", opReaddir: "readdir"}

// spans are their names in a trace.
var spans = [...]string{opLookup: "fuse.lookup", opOpen: "fuse.open", opRead: "fuse.read", opReaddir: "fuse.readdir"}

const (
	opLookup = iota
	opOpen
	opRead
	opReaddir
)

// failures are counted by errno.
type failures struct {
	mu sync.Mutex // guards of
	of map[fuse.Status]uint64
}

func (f *failures) note(s fuse.Status) fuse.Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.of == nil {
		f.of = map[fuse.Status]uint64{}
	}
	f.of[s]++
	return s
}

// Failures are the requests that ended in an error, by the errno's name, those included of which there were none. A
// name that is not there is no failure, nor is an open after which the kernel looks the name up again.
func (c *Counters) Failures() map[string]uint64 {
	out := map[string]uint64{}
	c.failures.mu.Lock()
	defer c.failures.mu.Unlock()
	for _, e := range Errnos() {
		if e.Errno != syscall.ENOENT {
			out[e.Name()] = c.failures.of[fuse.Status(e.Errno)]
		}
	}
	return out
}

// Errno is what the kernel is told of an error.
type Errno struct {
	Err   error // nil stands for all that are not listed
	Errno syscall.Errno
}

// Name is its symbol.
func (e Errno) Name() string { return unix.ErrnoName(e.Errno) }

// Errnos are all that a request that the store or the cache fails can end with.
func Errnos() []Errno {
	var all []Errno
	for _, e := range errnos {
		all = append(all, Errno{e.err, syscall.Errno(e.errno)})
	}
	return append(all, Errno{nil, syscall.EIO})
}
