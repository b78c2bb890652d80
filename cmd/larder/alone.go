package main

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/larderfs/larder/cacheworker"
	"github.com/larderfs/larder/driver"
)

// alone makes a worker's configuration that of a sidecar, if it is told of a socket. Its control
// socket is in the first tier, which nobody else has.
func alone(c *cacheworker.Config, socketDir string, parameters map[string]string) error {
	if socketDir == "" {
		if len(parameters) > 0 {
			return errors.New("--parameter: only with --socket-dir")
		}
		return nil
	}
	p, err := driver.NewParameters(c.FileRoot)
	if err != nil {
		return fmt.Errorf("--file-root: %w", err)
	}
	v, _, err := p.LocalVolume("sidecar", parameters, nil)
	if err != nil {
		return fmt.Errorf("--parameter: %w", err)
	}
	if socketDir, err = filepath.Abs(socketDir); err != nil {
		return err
	}
	c.Alone = &cacheworker.Alone{Volume: v, SocketDir: socketDir}
	c.ControlSocket = filepath.Join(c.Tiers[0].Dir, controlSocket)
	return nil
}
