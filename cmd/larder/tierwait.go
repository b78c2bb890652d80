package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"
)

// awaitTiers waits for all.
func awaitTiers(ctx context.Context, all []tier, patience time.Duration, log *slog.Logger) error {
	for _, t := range all {
		if err := awaitTier(ctx, t.dir, patience, log); err != nil {
			return err
		}
	}
	return nil
}

// awaitTier waits until a tier is this user's: a hostPath is made by the kubelet as root's, and the
// node plugin of the same node, which may give it away, starts at the same time.
func awaitTier(ctx context.Context, dir string, patience time.Duration, log *slog.Logger) error {
	told := false
	for start := time.Now(); ; {
		owner, err := ownerOf(dir)
		if err == nil && int(owner) != os.Geteuid() {
			err = fmt.Errorf("tier %s belongs to user %d, this is user %d", dir, owner, os.Geteuid())
		}
		if err == nil || patience == 0 || os.Geteuid() == 0 { // what else is wrong the tier itself says
			return nil
		}
		if time.Since(start) > patience {
			return fmt.Errorf("waited %v for the node plugin (larder csi node --worker-uid %d): %w", patience, os.Geteuid(), err)
		}
		if !told {
			told = true
			log.Info("waiting for the node plugin to give the tier to this user", "now", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retry):
		}
	}
}
