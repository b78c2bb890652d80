package main

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// startUnprivileged starts a program as uid without any capability, for root too, and with no
// way to get one: neither by a set-user-ID file nor by one with capabilities.
func startUnprivileged(cmd *exec.Cmd, uid uint32) error {
	cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uid, Gid: uid}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends with this goroutine, which has given its rights up
		err := dropBounding()
		if err == nil {
			err = cmd.Start()
		}
		started <- err
	}()
	return <-started
}

// dropBounding empties the thread's bounding set, so that an execve of its child grants nothing,
// and forbids new privileges.
func dropBounding() error {
	for c := uintptr(0); ; c++ {
		held, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0)
		if err == unix.EINVAL { // behind the kernel's last capability
			break
		}
		if err != nil {
			return fmt.Errorf("read bounding set: %w", err)
		}
		if held == 0 {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no new privileges: %w", err)
	}
	return nil
}

// nobody is whom the worker runs as where nothing else is said.
const nobody = 65534

// ownerOf is the user who owns a directory.
func ownerOf(dir string) (uint32, error) {
	st, err := os.Stat(dir)
	if err != nil {
		return 0, err
	}
	return st.Sys().(*syscall.Stat_t).Uid, nil
}
