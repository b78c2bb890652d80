package main

import (
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// slot is what a reader shares with the parent by memory, which says what it is doing at this
// moment: a pipe would say it too late, and nothing once the reader hangs.
type slot struct {
	Begin   atomic.Int64 // CLOCK_MONOTONIC, ns, of the operation under way; 0 between two
	Needs   atomic.Int64 // 1 if that one cannot be answered without the worker, as far as is known
	Op      atomic.Int64 // index in ops
	Ops     atomic.Int64 // operations completed
	Bytes   atomic.Int64 // read and found right
	Sent    atomic.Int64 // reports written to the pipe
	Holds   atomic.Int64 // passthrough handles that are open
	Passing atomic.Int64 // bytes read through passthrough handles
}

// newSlot makes the memory for one.
func newSlot() (*slot, *os.File, error) {
	fd, err := unix.MemfdCreate("chaos-slot", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, nil, fmt.Errorf("memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), "slot")
	if err := f.Truncate(int64(os.Getpagesize())); err != nil {
		f.Close()
		return nil, nil, err
	}
	s, err := mapSlot(f)
	if err != nil {
		f.Close()
	}
	return s, f, err
}

// mapSlot shows the memory to this process, for as long as it lives.
func mapSlot(f *os.File) (*slot, error) {
	b, err := unix.Mmap(int(f.Fd()), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map slot: %w", err)
	}
	return (*slot)(unsafe.Pointer(&b[0])), nil
}

func (s *slot) unmap() {
	unix.MunmapPtr(unsafe.Pointer(s), uintptr(os.Getpagesize()))
}

// now is CLOCK_MONOTONIC in nanoseconds: the same clock in every process.
func now() int64 {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return ts.Nano()
}

// report is what a reader says on its pipe.
type report struct {
	Op    string `json:"op,omitempty"` // an operation that took long
	Begin int64  `json:"begin,omitempty"`
	End   int64  `json:"end,omitempty"`
	Needs bool   `json:"needs,omitempty"` // it could not be answered without the worker
	Err   string `json:"err,omitempty"`
	Wrong string `json:"wrong,omitempty"` // where a wrong byte was read
}
