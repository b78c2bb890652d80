package driver

import (
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/larderfs/larder/cacheworker/object"
)

// checkCapability accepts every access mode: a volume is a read-only view of a dataset, so
// modes for writers are modes for readers too, and every publish is read-only. Block
// devices there are none.
func checkCapability(c *csi.VolumeCapability) error {
	switch {
	case c == nil:
		return fmt.Errorf("volume_capability: missing: %w", object.ErrInvalid)
	case c.GetBlock() != nil:
		return fmt.Errorf("volume_capability: a dataset is no block device; use volumeMode: Filesystem: %w", object.ErrInvalid)
	case c.GetMount() == nil:
		return fmt.Errorf("volume_capability: its access type is missing; use mount: %w", object.ErrInvalid)
	case c.GetAccessMode().GetMode() == csi.VolumeCapability_AccessMode_UNKNOWN:
		return fmt.Errorf("volume_capability: its access mode is missing or unknown: %w", object.ErrInvalid)
	}
	for _, flag := range c.GetMount().GetMountFlags() { // may be sensitive: never repeated
		if flag != "ro" {
			return fmt.Errorf("volume_capability: mount options other than ro are not supported; use the parameters: %w", object.ErrInvalid)
		}
	}
	return nil
}

func checkCapabilities(cs []*csi.VolumeCapability) error {
	if len(cs) == 0 {
		return fmt.Errorf("volume_capabilities: missing: %w", object.ErrInvalid)
	}
	for _, c := range cs {
		if err := checkCapability(c); err != nil {
			return err
		}
	}
	return nil
}
