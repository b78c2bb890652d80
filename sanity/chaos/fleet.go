package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// fleet is the readers, seen from the parent.
type fleet struct {
	command func(ctx context.Context, name string, args ...string) *exec.Cmd

	mu      sync.Mutex // guards the fields below
	members []*member
	ops     []operation
	stops   []span // times in which a process was stopped on purpose; To is 0 while it is
	errs    []string
	wrong   []string
}

// member is one reader.
type member struct {
	name     string
	cmd      *exec.Cmd
	in       io.Closer
	slot     *slot
	received atomic.Int64
	ended    chan struct{} // closed when the process has
	err      error         // to be read after that
	closing  atomic.Bool
}

// start starts a reader; it reads until it is told to end.
func (f *fleet) start(ctx context.Context, t task) (*member, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	slot, shared, err := newSlot()
	if err != nil {
		return nil, err
	}
	defer shared.Close()
	m := &member{name: t.Way, slot: slot, ended: make(chan struct{})}
	m.cmd = f.command(ctx, self, "read")
	m.cmd.ExtraFiles = []*os.File{shared}
	var diag bytes.Buffer
	m.cmd.Stderr = &diag
	in, err := m.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := m.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := m.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start reader %s: %w", t.Way, err)
	}
	m.in = in
	f.mu.Lock()
	f.members = append(f.members, m)
	f.mu.Unlock()
	go func() {
		defer close(m.ended)
		f.listen(m, out)
		if m.err = m.cmd.Wait(); m.err != nil {
			m.err = fmt.Errorf("reader %s: %w: %s", m.name, m.err, bytes.TrimSpace(diag.Bytes()))
		}
		if m.err != nil && !m.closing.Load() {
			f.fail(m.err.Error())
		}
	}()
	return m, json.NewEncoder(in).Encode(t)
}

func (f *fleet) listen(m *member, out io.Reader) {
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var r report
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			f.fail(fmt.Sprintf("reader %s says %q: %v", m.name, lines.Bytes(), err))
			continue
		}
		f.take(r)
		m.received.Add(1)
	}
}

func (f *fleet) take(r report) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.Op != "" {
		f.ops = append(f.ops, operation{span: span{r.Begin, r.End}, By: r.Op, Needs: r.Needs})
	}
	if r.Err != "" {
		f.errs = append(f.errs, fmt.Sprintf("at %.3f s: %s", seconds(r.End), r.Err))
	}
	if r.Wrong != "" {
		f.wrong = append(f.wrong, r.Wrong)
	}
}

// fail counts an error that no reader reported.
func (f *fleet) fail(text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.errs = append(f.errs, text)
}

func (f *fleet) faults() (errs, wrong []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.errs), slices.Clone(f.wrong)
}

func (f *fleet) all() []*member {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.members)
}

// called notes a mount call.
func (f *fleet) called(from, to int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ops = append(f.ops, operation{span: span{from, to}, By: "call", Call: true})
}

// stopped notes that a process was stopped on purpose.
func (f *fleet) stopped(from, to int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stops = append(f.stops, span{from, to})
}

// inFlight reports whether a request that the worker has to answer seems to be under way.
func (f *fleet) inFlight() bool {
	for _, m := range f.all() {
		if m.slot.Begin.Load() != 0 && m.slot.Needs.Load() == 1 {
			return true
		}
	}
	return false
}

// held is how many passthrough handles are open.
func (f *fleet) held() (n int64) {
	for _, m := range f.all() {
		n += m.slot.Holds.Load()
	}
	return n
}

// caughtUp reports whether every operation that began before t has ended and was reported.
func (f *fleet) caughtUp(t int64) bool {
	for _, m := range f.all() {
		select {
		case <-m.ended:
			continue
		default:
		}
		if b := m.slot.Begin.Load(); b != 0 && b <= t || m.slot.Sent.Load() > m.received.Load() {
			return false
		}
	}
	return true
}

// evaluate judges the kills by what is known now. Operations from before the first of them are forgotten.
func (f *fleet) evaluate(kills ...*kill) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(kills) == 0 {
		return
	}
	first := kills[0].At
	f.ops = slices.DeleteFunc(f.ops, func(op operation) bool { return op.To < first })
	f.stops = slices.DeleteFunc(f.stops, func(s span) bool { return s.To < first-int64(2*hangs) })
	for _, k := range kills {
		k.evaluate(f.ops, f.stops)
	}
}

// hangs is how long an operation may take.
const hangs = 60 * time.Second

// hung finds a reader that is blocked for too long, and says where in the kernel it is.
func (f *fleet) hung() error {
	t := now()
	for _, m := range f.all() {
		b := m.slot.Begin.Load()
		if b == 0 {
			continue
		}
		f.mu.Lock()
		took := without(span{b, t}, f.stops)
		f.mu.Unlock()
		if took > hangs {
			return fmt.Errorf("reader %s (pid %d) is in %s since %v\n%s", m.name, m.cmd.Process.Pid, ops[m.slot.Op.Load()],
				took, stacks(m.cmd.Process.Pid))
		}
	}
	return nil
}

// stacks are where the threads of a process are in the kernel.
func stacks(pid int) string {
	var b strings.Builder
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	for _, t := range threads {
		wchan, _ := os.ReadFile(filepath.Join(t, "wchan"))
		stack, _ := os.ReadFile(filepath.Join(t, "stack"))
		fmt.Fprintf(&b, "thread %s: %s\n%s", filepath.Base(t), wchan, stack)
	}
	return b.String()
}

// close ends the readers, which takes as long as their last operations.
func (f *fleet) close(timeout time.Duration) error {
	for _, m := range f.all() {
		m.closing.Store(true)
		m.in.Close()
	}
	end := time.After(timeout)
	var errs []error
	for _, m := range f.all() {
		select {
		case <-m.ended:
		case <-end:
			errs = append(errs, fmt.Errorf("reader %s does not end\n%s", m.name, stacks(m.cmd.Process.Pid)))
			end = time.After(0)
		}
	}
	return errors.Join(errs...)
}

// done takes an ended reader out.
func (f *fleet) done(m *member) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.members = slices.DeleteFunc(f.members, func(o *member) bool { return o == m })
	m.slot.unmap()
}

var started = now()

// seconds since the start.
func seconds(t int64) float64 { return float64(t-started) / 1e9 }
