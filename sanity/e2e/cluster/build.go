package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// part is what one module builds. Modules are apart because their dependencies disagree.
type part struct {
	module   string // folder beside this package
	packages []string
	tags     string
	cgo      bool
	flags    string   // for the linker
	links    []string // other names of the first program
}

const kubernetesVersion = "v1.36.3"

func parts() []part {
	versions := ""
	for _, p := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		versions += fmt.Sprintf(" -X %[1]s.gitVersion=%[2]s -X %[1]s.gitMajor=1 -X %[1]s.gitMinor=36 -X %[1]s.gitTreeState=clean"+
			" -X %[1]s.gitCommit=0000000000000000000000000000000000000000 -X %[1]s.buildDate=2026-01-01T00:00:00Z", p, kubernetesVersion)
	}
	const containerd, plugins = "github.com/containerd/containerd/v2/cmd/", "github.com/containernetworking/plugins/plugins/"
	return []part{
		{module: "runc", packages: []string{"github.com/opencontainers/runc"}, tags: "seccomp", cgo: true},
		{module: "containerd", tags: "no_btrfs no_devmapper no_zfs no_tracing", packages: []string{
			containerd + "containerd", containerd + "containerd-shim-runc-v2", containerd + "ctr",
			plugins + "main/ptp", plugins + "main/loopback", plugins + "ipam/host-local"}},
		{module: "coredns", packages: []string{"."}},
		{module: "kube", packages: []string{"."}, flags: versions,
			links: []string{"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet", "kubectl"}},
		{module: "helm", packages: []string{"helm.sh/helm/v4/cmd/helm"}},
		{module: "../s3test/gateway", packages: []string{"github.com/versity/versitygw/cmd/versitygw"}},
		{module: "kube", packages: []string{"github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner"}},
	}
}

// build returns a directory for each part; what is not in the cache is built. Two builds at a
// time wait for each other.
func (c *cluster) build(ctx context.Context) ([]string, error) {
	if err := os.MkdirAll(c.cache, 0o755); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(c.cache, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return nil, err
	}
	var dirs []string
	for _, p := range parts() {
		dir, err := c.buildPart(ctx, p)
		if err != nil {
			return nil, err
		}
		dirs = append(dirs, dir)
	}
	return dirs, nil
}

func (c *cluster) buildPart(ctx context.Context, p part) (string, error) {
	_, file, _, _ := runtime.Caller(0)
	source := filepath.Join(filepath.Dir(file), "..", p.module)
	key, err := p.key(source)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(c.cache, filepath.Base(p.packages[0])+"-"+key)
	if p.packages[0] == "." {
		dir = filepath.Join(c.cache, p.module+"-"+key)
	}
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	start := time.Now()
	fmt.Fprintf(os.Stderr, "building %s, once: %s\n", strings.Join(p.packages, " "), dir)
	partial := dir + ".partial"
	if err := os.RemoveAll(partial); err != nil {
		return "", err
	}
	if err := os.Mkdir(partial, 0o755); err != nil {
		return "", err
	}
	args := []string{"build", "-C", source, "-trimpath", "-tags", p.tags, "-ldflags", "-s -w" + p.flags, "-o", partial + "/"}
	cmd := exec.CommandContext(ctx, "go", append(args, p.packages...)...)
	cmd.Env = append(os.Environ(), "GOFLAGS=", "GOWORK=off", "CGO_ENABLED=0")
	if p.cgo {
		cmd.Env = append(cmd.Env, "CGO_ENABLED=1")
	}
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("build %s in %s: %w", strings.Join(p.packages, " "), source, err)
	}
	for _, l := range p.links {
		if err := os.Symlink(p.module, filepath.Join(partial, l)); err != nil {
			return "", err
		}
	}
	fmt.Fprintf(os.Stderr, "built in %v\n", time.Since(start).Round(time.Second))
	return dir, os.Rename(partial, dir)
}

// key changes with everything that the build depends on: versions, our own files, flags.
func (p part) key(source string) (string, error) {
	h := sha256.New()
	fmt.Fprintf(h, "%+v %s\n", p, runtime.Version())
	files, err := filepath.Glob(filepath.Join(source, "*"))
	if err != nil {
		return "", err
	}
	for _, name := range files { // Glob sorts
		f, err := os.Open(name)
		if err != nil {
			return "", err
		}
		_, err = io.Copy(h, f)
		f.Close()
		if err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:8]), nil
}

// link makes c.bin() the directory of all programs.
func (c *cluster) link(dirs []string) error {
	if err := os.MkdirAll(c.bin(), 0o755); err != nil {
		return err
	}
	for _, dir := range dirs {
		programs, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, p := range programs {
			name := filepath.Join(c.bin(), p.Name())
			if err := os.Remove(name); err != nil && !os.IsNotExist(err) {
				return err
			}
			if err := os.Symlink(filepath.Join(dir, p.Name()), name); err != nil {
				return err
			}
		}
	}
	return nil
}
