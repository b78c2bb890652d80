package cachestore

import (
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
)

// Faults are for tests that read through a store whose disk fails.
type Faults struct{ sys *faulty }

// SetFaults has the disk fail where fail says so, that of the index included: its calls are named "index …".
func SetFaults(cfg *Config, fail func(op string) error) Faults {
	sys := &faulty{fail: fail}
	cfg.sys = sys
	cfg.disk = errorfs.Wrap(vfs.Default, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if op.Kind.ReadOrWrite() == errorfs.OpIsRead || op.Kind == errorfs.OpRemove || op.Kind == errorfs.OpFileClose {
			return nil
		}
		return sys.failed("index")
	}))
	return Faults{sys}
}

// Count is how often the disk has failed.
func (f Faults) Count() int64 { return f.sys.faults.Load() }

// CheckInvariants compares the store's counts with its tables and with the disk.
func CheckInvariants(t testing.TB, s *Store) { checkInvariants(t, s) }

// diskErrors are what a disk says that is broken or full.
var diskErrors = []error{syscall.EIO, syscall.ENOSPC, syscall.EDQUOT, syscall.EROFS}

// Eventually waits for what there is no event for.
func Eventually(t testing.TB, what string, ok func() bool) { t.Helper(); eventually(t, what, ok) }
