package driver

import (
	"sync"
	"testing"

	"github.com/larderfs/larder/sanity/csisanity"
)

// csi-sanity over the services and fakes with real mounts; the same over the whole of
// Larder is in package sanity. Ginkgo runs once in a process: with -count the first run counts.
func TestCSISanity(t *testing.T) {
	sanityOnce.Do(func() {
		b := start(t)
		csisanity.Run(t, csisanity.Leg{
			Name: "fake", Socket: b.socket, Parameters: attrs{"source": "s3://bkt"}, Secrets: secret("sanity"),
		})
		sanityFailed = t.Failed()
	})
	if sanityFailed {
		t.Error("csi-sanity failed")
	}
}

var (
	sanityOnce   sync.Once
	sanityFailed bool
)
