package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/master/client"
)

// workersStatus is what `larder top -o json` prints. Fields are added, never changed.
type workersStatus struct {
	Time    time.Time      `json:"time"`
	Workers []workerStatus `json:"workers"` // by node
}

type workerStatus struct {
	Node          string    `json:"node"`
	Worker        string    `json:"worker"` // its UUID
	Addresses     []string  `json:"addresses"`
	State         string    `json:"state"`            // ok, gone, unanswered
	Reason        string    `json:"reason,omitempty"` // why not ok
	Seen          time.Time `json:"seen"`             // when the figures are of
	Started       time.Time `json:"started"`
	CachedBytes   int64     `json:"cachedBytes"`
	CapacityBytes int64     `json:"capacityBytes"`
	Objects       int64     `json:"objects"`
	HitChunks     uint64    `json:"hitChunks"`
	MissChunks    uint64    `json:"missChunks"`
	FetchedBytes  uint64    `json:"fetchedBytes"`
	ReadRequests  uint64    `json:"readRequests"` // FUSE READs that reached the worker
	Mounts        int64     `json:"mounts"`
	Pods          int       `json:"pods"`

	HitRatio         *float64 `json:"hitRatio,omitempty"`         // of the chunks that the worker was asked for; unset without any
	FetchBytesPerSec *float64 `json:"fetchBytesPerSec,omitempty"` // since the sample before; unset without one of the same process
	ReadsPerSec      *float64 `json:"readsPerSec,omitempty"`
}

const (
	stateOK         = "ok"
	stateGone       = "gone"
	stateUnanswered = "unanswered"
)

func topCommand() *cobra.Command {
	var q question
	var once bool
	var every time.Duration
	cmd := &cobra.Command{
		Use: "top", Short: "Show all workers live",
		Long: `Ask all workers for their counters and show them, again each second on a terminal, until interrupted.
Elsewhere, and with --once or -o json, one table is printed after two samples, a second apart.

HIT is the share of chunks that were in the cache when the worker was asked for them, READS/S what reached
the worker: files that are completely cached are read by the kernel alone.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if every < 100*time.Millisecond {
				return fmt.Errorf("--interval %v: want 100ms or more", every)
			}
			return q.ask(cmd.Context(), func(ctx context.Context, m *client.Client) error {
				s := sampler{ask: m.AllWorkers}
				screen, tty := cmd.OutOrStdout().(*os.File)
				if tty = tty && isTerminal(screen); tty && !once && q.format == "table" {
					return s.live(ctx, screen, every)
				}
				w, err := s.twice(ctx, every)
				if err != nil {
					return err
				}
				return q.print(cmd.OutOrStdout(), w, w.print)
			})
		},
	}
	q.flags(cmd)
	cmd.Flags().BoolVar(&once, "once", false, "print one table, also on a terminal")
	cmd.Flags().DurationVar(&every, "interval", time.Second, "time between two samples")
	return cmd
}

// sampler makes rates of counters.
type sampler struct {
	ask    func(ctx context.Context, live bool) ([]client.Worker, error)
	before workersStatus
}

func (s *sampler) sample(ctx context.Context) (workersStatus, error) {
	ws, err := s.ask(ctx, true)
	if err != nil {
		return workersStatus{}, err
	}
	s.before = newWorkersStatus(time.Now().UTC(), ws, s.before)
	return s.before, nil
}

func (s *sampler) twice(ctx context.Context, pause time.Duration) (workersStatus, error) {
	if _, err := s.sample(ctx); err != nil {
		return workersStatus{}, err
	}
	if !sleep(ctx, pause) {
		return workersStatus{}, context.Cause(ctx)
	}
	return s.sample(ctx)
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func newWorkersStatus(now time.Time, ws []client.Worker, before workersStatus) workersStatus {
	was := map[string]workerStatus{}
	for _, w := range before.Workers {
		was[w.Node] = w
	}
	s := workersStatus{Time: now, Workers: []workerStatus{}}
	for _, w := range ws {
		s.Workers = append(s.Workers, newWorkerStatus(w, was[w.Node]))
	}
	return s
}

func newWorkerStatus(w client.Worker, was workerStatus) workerStatus {
	s := workerStatus{
		Node: w.Node, Worker: w.UUID, Addresses: append([]string{}, w.Addresses...), State: stateOK, Reason: w.Unanswered,
		Seen: w.Seen, Started: w.Stats.Started, CachedBytes: w.Stats.CachedBytes, CapacityBytes: w.CapacityBytes, Objects: w.Stats.Objects,
		HitChunks: w.Stats.HitChunks, MissChunks: w.Stats.MissChunks, FetchedBytes: w.Stats.FetchedBytes,
		ReadRequests: w.Stats.ReadRequests, Mounts: w.Stats.Mounts, Pods: len(pods(w)),
	}
	switch {
	case w.Gone:
		s.State = stateGone
	case w.Unanswered != "":
		s.State = stateUnanswered
	}
	if asked := s.HitChunks + s.MissChunks; asked > 0 {
		ratio := float64(s.HitChunks) / float64(asked)
		s.HitRatio = &ratio
	}
	if d := s.Seen.Sub(was.Seen).Seconds(); d > 0 && s.State == stateOK && was.State == stateOK && was.Started.Equal(s.Started) {
		fetch, reads := float64(s.FetchedBytes-was.FetchedBytes)/d, float64(s.ReadRequests-was.ReadRequests)/d
		s.FetchBytesPerSec, s.ReadsPerSec = &fetch, &reads
	}
	return s
}

// pods are those that volumes are published to on the worker's node, each once.
func pods(w client.Worker) map[string]bool {
	uids := map[string]bool{}
	for _, v := range w.Volumes {
		for _, p := range v.Pods {
			uids[p.UID] = true
		}
	}
	return uids
}

func (s workersStatus) print(out io.Writer) error {
	if len(s.Workers) == 0 {
		_, err := fmt.Fprintln(out, "no worker is registered")
		return err
	}
	t := newTable(out)
	fmt.Fprintln(t, "NODE\tWORKER\tADDRESS\tCACHED\tCAPACITY\tUSED\tHIT\tFETCH\tREADS/S\tMOUNTS\tPODS\tAGE\t")
	for _, w := range s.Workers {
		fmt.Fprintf(t, "%s\t%s\t%s\t", w.Node, short(w.Worker), first(w.Addresses))
		if w.State != stateOK {
			fmt.Fprintf(t, "-\t%s\t-\t-\t-\t-\t-\t%d\t-\t%s\n", bytes(w.CapacityBytes), w.Pods, w.Reason)
			continue
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t%d\t%s\t\n", bytes(w.CachedBytes), bytes(w.CapacityBytes),
			percent(share(w.CachedBytes, w.CapacityBytes)), percent(w.HitRatio), perSecond(w.FetchBytesPerSec),
			rate(w.ReadsPerSec), w.Mounts, w.Pods, age(s.Time.Sub(w.Started)))
	}
	return t.Flush()
}

func share(part, whole int64) *float64 {
	if whole <= 0 {
		return nil
	}
	f := float64(part) / float64(whole)
	return &f
}

func percent(f *float64) string {
	if f == nil {
		return "-"
	}
	return fmt.Sprintf("%.0f%%", 100**f)
}

func perSecond(f *float64) string {
	if f == nil {
		return "-"
	}
	return fmt.Sprintf("%.1f MB/s", *f/1e6)
}

func rate(f *float64) string {
	if f == nil {
		return "-"
	}
	return fmt.Sprintf("%.0f", *f)
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// What a terminal understands.
const (
	otherScreen = "\x1b[?1049h\x1b[?25l" // and no cursor
	thisScreen  = "\x1b[?25h\x1b[?1049l"
	home        = "\x1b[H"
	restOfLine  = "\x1b[K"
	restOfAll   = "\x1b[J"
)

// live shows a table until ctx ends, which is how a person ends it.
func (s *sampler) live(ctx context.Context, screen *os.File, every time.Duration) (err error) {
	if _, err := io.WriteString(screen, otherScreen); err != nil {
		return err
	}
	defer func() {
		_, werr := io.WriteString(screen, thisScreen)
		err = errors.Join(err, werr)
	}()
	for {
		_, serr := s.sample(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if _, err := io.WriteString(screen, frame(s.before, serr, screen)); err != nil {
			return err
		}
		if !sleep(ctx, every) {
			return nil
		}
	}
}

// frame is one picture: the last table that there was, and what is wrong with the master now.
func frame(last workersStatus, err error, screen *os.File) string {
	rows, columns := 1<<10, 1<<10
	if ws, err := unix.IoctlGetWinsize(int(screen.Fd()), unix.TIOCGWINSZ); err == nil && ws.Row > 0 && ws.Col > 0 {
		rows, columns = int(ws.Row), int(ws.Col)
	}
	return cut(last, err, rows, columns)
}

func cut(last workersStatus, err error, rows, columns int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "larder top   %s   %d workers", last.Time.Local().Format(time.TimeOnly), len(last.Workers))
	if err != nil {
		fmt.Fprintf(&b, "   the master does not answer: %v", err)
	}
	b.WriteString("\n\n")
	last.print(&b) // a Builder takes everything
	lines := strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
	lines = lines[:min(len(lines), rows)]
	for i, line := range lines {
		if r := []rune(line); len(r) > columns {
			lines[i] = string(r[:columns])
		}
	}
	return home + strings.Join(lines, restOfLine+"\n") + restOfLine + restOfAll
}
