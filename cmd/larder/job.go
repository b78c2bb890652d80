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

	"github.com/larderfs/larder/master/client"
	"github.com/larderfs/larder/master/record"
)

// jobEntry is what `larder job show -o json` prints, and an entry of `larder job ls -o json`. Fields are added, never
// changed.
type jobEntry struct {
	Job      string          `json:"job"`
	Kind     record.JobKind  `json:"kind"`
	URIs     []string        `json:"uris"`
	Endpoint string          `json:"endpoint,omitempty"`
	State    record.JobState `json:"state"`
	Created  time.Time       `json:"created"`
	Files    int64           `json:"files"` // sum over the nodes, as all below
	Bytes    int64           `json:"bytes"`
	Present  int64           `json:"presentFiles"` // of the files: cached before
	Failed   int64           `json:"failedFiles"`
	Nodes    []nodeJob       `json:"nodes"`
}

type nodeJob struct {
	Node    string          `json:"node"`
	State   record.JobState `json:"state"`
	Files   int64           `json:"files"`
	Bytes   int64           `json:"bytes"`
	Present int64           `json:"presentFiles"`
	Failed  int64           `json:"failedFiles"`
	Error   string          `json:"error,omitempty"`
	Started time.Time       `json:"started,omitzero"`
	Updated time.Time       `json:"updated,omitzero"`
}

func newJobEntry(j client.Job) jobEntry {
	e := jobEntry{Job: j.ID, Kind: j.Kind, URIs: j.URIs, Endpoint: j.Endpoint, State: j.State(), Created: j.Created, Nodes: []nodeJob{}}
	for _, n := range j.Nodes {
		e.Files, e.Bytes, e.Present, e.Failed = e.Files+n.Files, e.Bytes+n.Bytes, e.Present+n.PresentFiles, e.Failed+n.FailedFiles
		e.Nodes = append(e.Nodes, nodeJob{n.Node, n.State, n.Files, n.Bytes, n.PresentFiles, n.FailedFiles, n.Error, n.Started, n.Updated})
	}
	return e
}

func loadCommand() *cobra.Command {
	return startCommand(record.Load, &cobra.Command{
		Use: "load PATH…", Short: "Cache what lies below paths of the namespace, or under-store URIs, before anybody reads it",
		Long: `Have workers cache an object, or everything below a folder or prefix, at low priority:

  larder load /sales/2026
  larder load /sales /dimensions --nodes all
  larder load s3://bucket/a/ s3://bucket/b/ --nodes node-1,node-2
  larder load /sales/2026

Without --nodes, those nodes do it where a volume of it is published; each reads with the volume's credential. Nodes that
are named, or all, read what they have no volume of with the credential of the mount that shows it (larder mount), and fail where
they have none. A drained node (larder worker drain) does nothing. The job goes on when this command is interrupted, and when workers or the master are killed; what is cached
already is not fetched again.`,
	})
}

func freeCommand() *cobra.Command {
	return startCommand(record.Free, &cobra.Command{
		Use: "free PATH…", Short: "Evict what lies below paths of the namespace, or under-store URIs, from the caches",
		Long: `Have workers evict an object, or everything below a prefix. Who has a file open reads on; whoever opens it
later has it fetched again. What is pinned goes, too.

  larder free /sales/2025
  larder free s3://bucket/warehouse/sales`,
	})
}

func pinCommand() *cobra.Command {
	return startCommand(record.Pin, &cobra.Command{
		Use: "pin PATH…", Short: "Cache what lies below paths of the namespace, or under-store URIs, and have it stay",
		Long: `Do as larder load does, and never evict it to make room for others, until larder unpin or larder free. Half of a
node's cache may be pinned; files beyond that fail. A new version of an object is not pinned: pin it again.

  larder pin /dimensions
  larder pin s3://bucket/dimensions/`,
	})
}

func unpinCommand() *cobra.Command {
	return startCommand(record.Unpin, &cobra.Command{
		Use: "unpin PATH…", Short: "Let what was pinned below paths of the namespace, or under-store URIs, be evicted again",
	})
}

// defaultNodes are those that do a job of which nobody says who is to.
var defaultNodes = map[record.JobKind]string{
	record.Load: "those where a volume of it is published", record.Pin: "those where a volume of it is published",
	record.Free: "all", record.Unpin: "all",
}

// startCommand is a command that makes a job and follows it.
func startCommand(kind record.JobKind, cmd *cobra.Command) *cobra.Command {
	q := clusterQuestion{}
	var spec client.JobSpec
	var nodes string
	var detach bool
	cmd.Args = cobra.MinimumNArgs(1)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		spec.Kind, spec.URIs = kind, args
		if spec.All = nodes == "all"; nodes != "" && !spec.All {
			spec.Nodes = strings.Split(nodes, ",")
		}
		if err := q.check(); err != nil {
			return err
		}
		if kind == record.Load || kind == record.Pin {
			c, cluster, err := q.connect()
			if err != nil {
				return err
			}
			if c != nil {
				return q.loadObject(cmd, c.Loads(), cluster, spec, detach)
			}
		}
		return q.ask(cmd.Context(), func(ctx context.Context, m *client.Client) error {
			j, err := createSoon(ctx, m, spec)
			if err != nil {
				return err
			}
			if detach {
				return q.print(cmd.OutOrStdout(), newJobEntry(j), func(w io.Writer) error {
					_, err := fmt.Fprintln(w, j.ID)
					return err
				})
			}
			return q.follow(ctx, m, j, cmd.OutOrStdout(), cmd.ErrOrStderr())
		})
	}
	if kind == record.Load || kind == record.Pin {
		q.flags(cmd, "makes the job of a Load object")
	} else {
		q.question.flags(cmd)
	}
	f := cmd.Flags()
	f.StringVar(&spec.Endpoint, "endpoint", "", "`URL` of the S3 store; empty for all that have such a bucket")
	f.StringVar(&nodes, "nodes", "", "`names` of nodes with commas between, or all (default "+defaultNodes[kind]+")")
	f.BoolVar(&detach, "detach", false, "print the job's id and do not wait for its end")
	return cmd
}

// createSoon waits a little for a master, or for the first worker, that is starting.
func createSoon(ctx context.Context, m *client.Client, spec client.JobSpec) (client.Job, error) {
	for deadline := time.Now().Add(createWithin); ; {
		j, err := m.CreateJob(ctx, spec)
		if !errors.Is(err, client.ErrUnavailable) || time.Now().After(deadline) {
			return j, err
		}
		select {
		case <-time.After(followEvery):
		case <-ctx.Done():
			return j, err
		}
	}
}

const createWithin = 10 * time.Second

// follow shows the progress until the job ends, and then its end; a master that is away for a while is waited for. A job
// that did not succeed is an error.
func (q *question) follow(ctx context.Context, m *client.Client, j client.Job, out, progress io.Writer) error {
	bar := newMeter(progress)
	for !j.State().Ended() {
		bar.show(newJobEntry(j).progress())
		select {
		case <-time.After(followEvery):
		case <-ctx.Done():
			bar.end()
			return fmt.Errorf("job %s goes on; `larder job show %[1]s` tells how far it is, `larder job cancel %[1]s` ends it", j.ID)
		}
		now, err := m.Job(ctx, j.ID)
		switch {
		case err == nil:
			j = now
		case !errors.Is(err, client.ErrUnavailable) && ctx.Err() == nil:
			bar.end()
			return err
		}
	}
	bar.end()
	e := newJobEntry(j)
	if err := q.print(out, e, e.print); err != nil {
		return err
	}
	switch e.State {
	case record.JobDone:
		return nil
	case record.JobSkipped:
		return fmt.Errorf("job %s: no node has a volume of it: publish one there first, or load what is mounted with --nodes all", j.ID)
	}
	return fmt.Errorf("job %s %s", j.ID, e.State)
}

const followEvery = 500 * time.Millisecond

// meter shows progress: a line that is written over on a terminal, else a line now and then.
type meter struct {
	out      io.Writer
	terminal bool
	last     time.Time
	since    time.Time
	shown    bool
}

func newMeter(out io.Writer) *meter {
	f, ok := out.(*os.File)
	return &meter{out: out, terminal: ok && isTerminal(f), since: time.Now()}
}

// plainEvery is how often a line is written where lines stay.
const plainEvery = 10 * time.Second

func (b *meter) show(progress string) {
	now := time.Now()
	if !b.terminal && now.Sub(b.last) < plainEvery {
		return
	}
	b.last, b.shown = now, true
	line := progress + ", " + age(now.Sub(b.since))
	if b.terminal {
		fmt.Fprintf(b.out, "\r\x1b[K%s", line)
		return
	}
	fmt.Fprintln(b.out, line)
}

func (e jobEntry) progress() string {
	ended := 0
	for _, n := range e.Nodes {
		if n.State.Ended() {
			ended++
		}
	}
	return fmt.Sprintf("%s %s: %d files, %s, %d of %d nodes ended", e.Job, e.State, e.Files, bytes(e.Bytes), ended, len(e.Nodes))
}

func (b *meter) end() {
	if b.terminal && b.shown {
		fmt.Fprint(b.out, "\r\x1b[K")
	}
}

func (e jobEntry) print(out io.Writer) error {
	now := time.Now()
	fmt.Fprintf(out, "%s  %s  %s\n\n", e.Job, e.State, strings.Join(e.URIs, " "))
	t := newTable(out)
	fmt.Fprintln(t, "NODE\tSTATE\tFILES\tBYTES\tPRESENT\tFAILED\tUPDATED\t")
	for _, n := range e.Nodes {
		updated := "-"
		if !n.Updated.IsZero() {
			updated = age(now.Sub(n.Updated)) + " ago"
		}
		fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%d\t%d\t%s\t%s\n", n.Node, n.State, n.Files, bytes(n.Bytes), n.Present, n.Failed, updated, n.Error)
	}
	return t.Flush()
}

func jobCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "job", Short: "Loads and frees: what they are doing, and how they ended"}
	cmd.AddCommand(jobListCommand(), jobShowCommand(), jobCancelCommand())
	return cmd
}

func jobListCommand() *cobra.Command {
	var q question
	cmd := &cobra.Command{
		Use: "ls", Short: "List the jobs of the last days", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return q.ask(cmd.Context(), func(ctx context.Context, m *client.Client) error {
				js, err := m.Jobs(ctx)
				if err != nil {
					return err
				}
				entries := []jobEntry{}
				for _, j := range js {
					entries = append(entries, newJobEntry(j))
				}
				return q.print(cmd.OutOrStdout(), entries, func(w io.Writer) error { return printJobs(w, entries, time.Now()) })
			})
		},
	}
	q.flags(cmd)
	return cmd
}

func printJobs(out io.Writer, entries []jobEntry, now time.Time) error {
	t := newTable(out)
	fmt.Fprintln(t, "JOB\tSTATE\tAGE\tNODES\tFILES\tBYTES\tFAILED\tURIS")
	for _, e := range entries {
		fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%d\t%s\t%d\t%s\n", e.Job, e.State, age(now.Sub(e.Created)), len(e.Nodes), e.Files, bytes(e.Bytes), e.Failed, strings.Join(e.URIs, " "))
	}
	return t.Flush()
}

func jobShowCommand() *cobra.Command {
	var q question
	var follow bool
	cmd := &cobra.Command{
		Use: "show JOB", Short: "Show how far a job is on each node", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return q.ask(cmd.Context(), func(ctx context.Context, m *client.Client) error {
				j, err := m.Job(ctx, args[0])
				if err != nil {
					return err
				}
				if follow {
					return q.follow(ctx, m, j, cmd.OutOrStdout(), cmd.ErrOrStderr())
				}
				e := newJobEntry(j)
				return q.print(cmd.OutOrStdout(), e, e.print)
			})
		},
	}
	q.flags(cmd)
	cmd.Flags().BoolVar(&follow, "follow", false, "wait for the job's end; exit code 1 unless it is done")
	return cmd
}

func jobCancelCommand() *cobra.Command {
	var q question
	cmd := &cobra.Command{
		Use: "cancel JOB", Short: "End a job; what it has cached stays", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return q.ask(cmd.Context(), func(ctx context.Context, m *client.Client) error { return m.CancelJob(ctx, args[0]) })
		},
	}
	q.flags(cmd)
	return cmd
}
