package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// memory is a memory cgroup in which the kernel kills for want of memory.
type memory struct {
	dir string
	v2  bool
}

// newMemory makes one; an error says why this machine has none for us.
func newMemory() (*memory, error) {
	const root = "/sys/fs/cgroup"
	m := &memory{dir: filepath.Join(root, "memory", fmt.Sprintf("larder-chaos-%d", os.Getpid()))}
	if controllers, err := os.ReadFile(filepath.Join(root, "cgroup.controllers")); err == nil {
		if !strings.Contains(string(controllers), "memory") {
			return nil, errors.New("no memory controller")
		}
		m = &memory{dir: filepath.Join(root, filepath.Base(m.dir)), v2: true}
	}
	if err := os.Mkdir(m.dir, 0o755); err != nil {
		return nil, err
	}
	return m, nil
}

// tight is little enough that a process which does anything at all is killed.
const tight = "1M"

// starve moves a process in and waits until the kernel has killed it. If it does not within
// a time, the caller has to.
func (m *memory) starve(ctx context.Context, p process) (killed bool, err error) {
	before := m.kills()
	if err := m.limit(tight); err != nil {
		return false, err
	}
	if err := m.write("cgroup.procs", fmt.Sprint(p.pid)); err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := p.awaitEnd(ctx); err != nil {
		return false, nil
	}
	return m.kills() > before, nil
}

func (m *memory) limit(bytes string) error {
	if m.v2 {
		return m.write("memory.max", bytes)
	}
	return m.write("memory.limit_in_bytes", bytes)
}

func (m *memory) write(name, value string) error {
	return os.WriteFile(filepath.Join(m.dir, name), []byte(value), 0)
}

// kills is how many processes the kernel has killed in it.
func (m *memory) kills() (n int) {
	name := "memory.oom_control"
	if m.v2 {
		name = "memory.events"
	}
	text, _ := os.ReadFile(filepath.Join(m.dir, name))
	for line := range strings.Lines(string(text)) {
		fmt.Sscanf(line, "oom_kill %d", &n)
	}
	return n
}

// close removes it; a process that has just died may still be in it.
func (m *memory) close(ctx context.Context) error {
	var err error
	eventually(ctx, "", func() bool { err = os.Remove(m.dir); return err == nil })
	return err
}
