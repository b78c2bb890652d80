package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

type mount struct {
	source, target, kind string
	flags                uintptr
	data                 string
}

func (m mount) make() error {
	if err := os.MkdirAll(m.target, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.data); err != nil {
		return fmt.Errorf("mount %s at %s: %w", m.source, m.target, err)
	}
	return nil
}

// makeMounts gives a node its own /etc, /var, /run, /sys and /proc. Its mount namespace is private
// to the machine; inside it everything is shared, as systemd leaves it.
func makeMounts(dir string) error {
	for _, d := range []string{"etc/upper", "etc/work", "var/lib/kubelet", "var/log", "var/tmp", "containerd", "log"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := dropFUSE(); err != nil {
		return err
	}
	const cgroups = "/run/cgroup" // a new sysfs shows this network namespace, and no cgroups
	mounts := []mount{
		{"overlay", "/etc", "overlay", 0, fmt.Sprintf("lowerdir=/etc,upperdir=%[1]s/etc/upper,workdir=%[1]s/etc/work", dir)},
		{dir + "/var", "/var", "", unix.MS_BIND, ""}, // not an overlay: caches lie below it
		{"tmpfs", "/run", "tmpfs", 0, "mode=755"},
		{"/sys/fs/cgroup", cgroups, "", unix.MS_BIND | unix.MS_REC, ""},
		{"sysfs", "/sys", "sysfs", 0, ""},
		{cgroups, "/sys/fs/cgroup", "", unix.MS_BIND | unix.MS_REC, ""},
		{"fusectl", "/sys/fs/fuse/connections", "fusectl", 0, ""},
		{"proc", "/proc", "proc", 0, ""},
	}
	for _, m := range mounts {
		if err := m.make(); err != nil {
			return err
		}
	}
	if err := coverSysctls(); err != nil {
		return err
	}
	// A user namespace may mount proc only where it sees a proc that nothing covers.
	if err := (mount{"proc", "/run/proc", "proc", 0, ""}).make(); err != nil {
		return err
	}
	if err := os.Symlink("/run", "/var/run"); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "")
}

// dropFUSE detaches the copies of FUSE mounts that came with the namespace: they would keep file
// systems alive that others on this machine unmount, and have nothing to do with the node.
func dropFUSE() error {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	lines := strings.Split(strings.TrimSpace(string(table)), "\n")
	for _, line := range slices.Backward(lines) { // the upper ones first
		mount, kind, _ := strings.Cut(line, " - ")
		if !strings.HasPrefix(kind, "fuse.") {
			continue
		}
		target := unescape.Replace(strings.Fields(mount)[4])
		if err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("detach %s: %w", target, err)
		}
	}
	return nil
}

var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`) // proc_pid_mountinfo(5)

// coverSysctls puts private files over the settings of the whole machine that a kubelet writes.
func coverSysctls() error {
	settings := map[string]string{
		"vm/overcommit_memory": "1", "vm/panic_on_oom": "0", "kernel/panic": "10", "kernel/panic_on_oops": "1",
		"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
	}
	if err := os.MkdirAll("/run/sysctl", 0o755); err != nil {
		return err
	}
	for name, value := range settings {
		file := "/run/sysctl/" + strings.ReplaceAll(name, "/", ".")
		if err := os.WriteFile(file, []byte(value+"\n"), 0o644); err != nil {
			return err
		}
		if err := unix.Mount(file, "/proc/sys/"+name, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("cover %s: %w", name, err)
		}
	}
	return nil
}

func cgroupName(node string) string { return "larder-e2e-" + node }

// makeCgroups makes the parent of the node's pods in every hierarchy.
func makeCgroups(node string) error {
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		return makeCgroupV2(node)
	}
	hierarchies, err := filepath.Glob("/sys/fs/cgroup/*")
	if err != nil {
		return err
	}
	for _, h := range hierarchies {
		group := filepath.Join(h, cgroupName(node))
		if err := os.Mkdir(group, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} { // empty in a new group
			value, err := os.ReadFile(filepath.Join(h, file))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(group, file), value, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// makeCgroupV2 hands every controller that the root gives on to the node's group.
func makeCgroupV2(node string) error {
	const root = "/sys/fs/cgroup"
	group := filepath.Join(root, cgroupName(node))
	if err := os.Mkdir(group, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	controllers, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for _, c := range strings.Fields(string(controllers)) {
		if err := os.WriteFile(filepath.Join(root, "cgroup.subtree_control"), []byte("+"+c), 0o644); err != nil {
			return fmt.Errorf("pass the controller %s on: %w", c, err)
		}
	}
	return nil
}

// removeCgroups removes what a node left. Its processes have ended, but the kernel may take a moment.
func removeCgroups(node string) error {
	groups, err := filepath.Glob("/sys/fs/cgroup/*/" + cgroupName(node))
	if err != nil {
		return err
	}
	var errs []error
	for _, top := range append(groups, "/sys/fs/cgroup/"+cgroupName(node)) {
		var below []string
		err := filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				below = append(below, p)
			}
			return nil // groups go while we look
		})
		errs = append(errs, err)
		for i := len(below) - 1; i >= 0; i-- {
			if err := unix.Rmdir(below[i]); err != nil && err != unix.ENOENT {
				errs = append(errs, fmt.Errorf("remove %s: %w", below[i], err))
			}
		}
	}
	return errors.Join(errs...)
}
