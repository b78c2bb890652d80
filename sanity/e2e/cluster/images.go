package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/larderfs/larder/sanity/e2e/archive"
)

// The names under which manifests ask for what we build ourselves.
const (
	pauseImage       = "localhost/pause:1"
	provisionerImage = "registry.k8s.io/sig-storage/csi-provisioner:v6.3.0"
	probeImage       = "localhost/larder-e2e:1"
)

func (c *cluster) images(file string) string { return filepath.Join(c.dir, "images", file) }

// makeImages writes the archives that every node imports when it starts.
func (c *cluster) makeImages() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := c.image("pause", pauseImage, self, "pause"); err != nil {
		return err
	}
	if err := c.image("csi-provisioner", provisionerImage, filepath.Join(c.bin(), "csi-provisioner")); err != nil {
		return err
	}
	return c.makeProbeImage(filepath.Join(filepath.Dir(self), "probe"))
}

// exportImages writes the probe's archive into a directory; no cluster need run.
func (c *cluster) exportImages(ctx context.Context, dir string) error {
	dirs, err := c.build(ctx)
	if err != nil {
		return err
	}
	apart := cluster{dir: dir, cache: c.cache}
	if err := apart.link(dirs); err != nil {
		return err
	}
	return errors.Join(apart.makeImages(), os.RemoveAll(apart.bin()))
}

// image makes an image of one static program.
func (c *cluster) image(file, name, program string, args ...string) error {
	return c.imageOf(file, archive.Image{Name: name, Entrypoint: append([]string{"/" + file}, args...)}, func(root string) error {
		return copyFile(filepath.Join(root, file), program, 0o755)
	})
}

// imageOf makes an image of what fill puts into a folder.
func (c *cluster) imageOf(file string, i archive.Image, fill func(root string) error) error {
	root, err := os.MkdirTemp("", "image-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(root)
	if err := each(
		func() error { return os.Chmod(root, 0o755) },
		func() error { return fill(root) },
		func() error { return os.MkdirAll(c.images(""), 0o755) },
		func() error { return archive.Write(c.images(file+".tar"), i, root) },
	); err != nil {
		return fmt.Errorf("image %s: %w", i.Name, err)
	}
	return nil
}

// makeProbeImage is for the tests' pods: a shell, the probe, and an S3 server.
func (c *cluster) makeProbeImage(probe string) error {
	return c.imageOf("probe", archive.Image{Name: probeImage}, func(root string) error {
		bin := filepath.Join(root, "bin")
		busybox, err := exec.LookPath("busybox")
		if err != nil {
			return fmt.Errorf("%w: install busybox-static", err)
		}
		for name, from := range map[string]string{"busybox": busybox, "probe": probe, "versitygw": filepath.Join(c.bin(), "versitygw")} {
			if err := copyFile(filepath.Join(bin, name), from, 0o755); err != nil {
				return err
			}
		}
		for _, name := range strings.Fields("sh ls cat grep sleep mount stat id wget df mkdir rm echo touch sha256sum tail env wc nslookup true dd") {
			if err := os.Symlink("busybox", filepath.Join(bin, name)); err != nil {
				return err
			}
		}
		return os.MkdirAll(filepath.Join(root, "tmp"), 0o777)
	})
}

func copyFile(to, from string, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}

// pause is what the container that holds a pod's namespaces runs: it reaps, and ends when told.
func pause() {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGCHLD)
	for s := range signals {
		if s != syscall.SIGCHLD {
			return
		}
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
}
