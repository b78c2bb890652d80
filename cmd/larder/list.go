package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/larderfs/larder/master/client"
)

// workerEntry is an entry of `larder worker ls -o json`: a node, its worker, and what is
// published there. Fields are added, never changed.
type workerEntry struct {
	Node          string        `json:"node"`
	Worker        string        `json:"worker"` // its UUID
	Addresses     []string      `json:"addresses"`
	Gone          bool          `json:"gone"` // no heartbeat for the length of its lease
	Version       string        `json:"version"`
	CapacityBytes int64         `json:"capacityBytes"`
	ReservedBytes int64         `json:"reservedBytes"` // by volumes bound to the node
	Registered    time.Time     `json:"registered"`
	Seen          time.Time     `json:"seen"`             // last heartbeat; not set by a master that had none
	Drained       time.Time     `json:"drained,omitzero"` // since when it gets nothing new; not set if it does
	Volumes       []volumeUsers `json:"volumes"`
}

// volumeUsers is a volume on a node.
type volumeUsers struct {
	Volume string     `json:"volume"`
	Inline bool       `json:"inline"`
	Pods   []podEntry `json:"pods"`
}

type podEntry struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid"`
}

func (p podEntry) String() string {
	if p.Name == "" {
		return p.UID
	}
	return p.Namespace + "/" + p.Name
}

// volumeEntry is an entry of `larder volume ls -o json`.
type volumeEntry struct {
	Volume     string            `json:"volume"`
	Name       string            `json:"name,omitempty"`
	Inline     bool              `json:"inline"`
	Parameters map[string]string `json:"parameters,omitempty"`
	Bytes      int64             `json:"capacityBytes"`
	Node       string            `json:"node,omitempty"` // the one it is bound to
	Nodes      []nodeUsers       `json:"nodes"`          // where it is mounted
}

type nodeUsers struct {
	Node string     `json:"node"`
	Pods []podEntry `json:"pods"`
}

func workerListCommand() *cobra.Command {
	var q question
	cmd := &cobra.Command{
		Use: "ls", Short: "List nodes, workers, and the volumes and pods there", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return q.ask(cmd.Context(), func(ctx context.Context, m *client.Client) error {
				ws, err := m.AllWorkers(ctx, false)
				if err != nil {
					return err
				}
				entries := workerEntries(ws)
				return q.print(cmd.OutOrStdout(), entries, func(w io.Writer) error { return printWorkers(w, entries, time.Now()) })
			})
		},
	}
	q.flags(cmd)
	return cmd
}

func workerDrainCommand() *cobra.Command {
	return drainCommand(false, &cobra.Command{
		Use: "drain NODE", Short: "Bring nothing new to a node",
		Long: `Have a node get no load and no pin, and no volume with binding: node, until larder worker undrain. Volumes that are
published there, and those that Kubernetes publishes there later, are served as ever; jobs that are at work there go on; free
and unpin reach it. To move its pods away is Kubernetes' (kubectl drain). It is kept when masters and workers are restarted.`,
	})
}

func workerUndrainCommand() *cobra.Command {
	return drainCommand(true, &cobra.Command{Use: "undrain NODE", Short: "Undo larder worker drain"})
}

func drainCommand(undo bool, cmd *cobra.Command) *cobra.Command {
	var q question
	cmd.Args = cobra.ExactArgs(1)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return q.ask(cmd.Context(), func(ctx context.Context, m *client.Client) error {
			if err := m.DrainWorker(ctx, args[0], undo); err != nil {
				return err
			}
			ws, err := m.AllWorkers(ctx, false)
			if err != nil {
				return err
			}
			entries := workerEntries(slices.DeleteFunc(ws, func(w client.Worker) bool { return w.Node != args[0] }))
			return q.print(cmd.OutOrStdout(), entries, func(w io.Writer) error { return printWorkers(w, entries, time.Now()) })
		})
	}
	q.flags(cmd)
	return cmd
}

func workerEntries(ws []client.Worker) []workerEntry {
	entries := []workerEntry{}
	for _, w := range ws {
		e := workerEntry{Node: w.Node, Worker: w.UUID, Addresses: append([]string{}, w.Addresses...), Gone: w.Gone, Version: w.Version,
			CapacityBytes: w.CapacityBytes, ReservedBytes: w.ReservedBytes, Registered: w.Registered, Seen: w.Seen, Drained: w.Drained, Volumes: []volumeUsers{}}
		for _, v := range w.Volumes {
			e.Volumes = append(e.Volumes, volumeUsers{v.Volume.ID, v.Inline, podEntries(v.Pods)})
		}
		entries = append(entries, e)
	}
	return entries
}

func podEntries(pods []client.Pod) []podEntry {
	entries := []podEntry{}
	for _, p := range pods {
		entries = append(entries, podEntry(p))
	}
	return entries
}

func printWorkers(out io.Writer, entries []workerEntry, now time.Time) error {
	t := newTable(out)
	fmt.Fprintln(t, "NODE\tWORKER\tADDRESS\tSTATE\tVERSION\tCAPACITY\tRESERVED\tVOLUMES\tPODS\tSEEN")
	for _, e := range entries {
		state, pods, seen := "alive", map[string]bool{}, "-"
		if e.Gone {
			state = "gone"
		}
		if !e.Drained.IsZero() {
			state += ", drained"
		}
		for _, v := range e.Volumes {
			for _, p := range v.Pods {
				pods[p.UID] = true
			}
		}
		if !e.Seen.IsZero() {
			seen = age(now.Sub(e.Seen)) + " ago"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d\t%d\t%s\n", e.Node, short(e.Worker), first(e.Addresses), state, e.Version,
			bytes(e.CapacityBytes), bytes(e.ReservedBytes), len(e.Volumes), len(pods), seen)
	}
	return t.Flush()
}

func volumeCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "volume", Short: "Volumes of the cluster"}
	cmd.AddCommand(volumeListCommand(), volumeShowCommand(), publishCommand(), unpublishCommand())
	return cmd
}

func volumeListCommand() *cobra.Command {
	var q question
	cmd := &cobra.Command{
		Use: "ls", Short: "List volumes, and the nodes and pods that have them", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return q.ask(cmd.Context(), func(ctx context.Context, m *client.Client) error {
				ws, err := m.Workers(ctx)
				if err != nil {
					return err
				}
				vs, err := allVolumes(ctx, m)
				if err != nil {
					return err
				}
				entries := volumeEntries(vs, ws)
				return q.print(cmd.OutOrStdout(), entries, func(w io.Writer) error { return printVolumes(w, entries) })
			})
		},
	}
	q.flags(cmd)
	return cmd
}

func allVolumes(ctx context.Context, m *client.Client) (all []client.Volume, err error) {
	for token := ""; ; {
		vs, next, err := m.Volumes(ctx, 0, token)
		if err != nil {
			return nil, err
		}
		if all = append(all, vs...); next == "" {
			return all, nil
		}
		token = next
	}
}

// volumeEntries are the master's volumes, and the inline ones, of which it knows where they are.
func volumeEntries(vs []client.Volume, ws []client.Worker) []volumeEntry {
	entries := []volumeEntry{}
	at := map[string]int{}
	for _, v := range vs {
		at[v.ID] = len(entries)
		entries = append(entries, volumeEntry{Volume: v.ID, Name: v.Name, Parameters: v.Parameters, Bytes: v.CapacityBytes, Node: v.Node, Nodes: []nodeUsers{}})
	}
	for _, w := range ws {
		for _, p := range w.Volumes {
			i, ok := at[p.Volume.ID]
			if !ok {
				i = len(entries)
				at[p.Volume.ID] = i
				entries = append(entries, volumeEntry{Volume: p.Volume.ID, Inline: p.Inline, Nodes: []nodeUsers{}})
			}
			entries[i].Nodes = append(entries[i].Nodes, nodeUsers{w.Node, podEntries(p.Pods)})
		}
	}
	slices.SortFunc(entries, func(a, b volumeEntry) int { return strings.Compare(a.Volume, b.Volume) })
	return entries
}

func printVolumes(out io.Writer, entries []volumeEntry) error {
	t := newTable(out)
	fmt.Fprintln(t, "VOLUME\tNAME\tSOURCE\tBOUND\tNODE\tPODS")
	for _, e := range entries {
		name, source := e.Name, cmp.Or(e.Parameters["source"], e.Parameters["path"])
		switch {
		case e.Inline:
			name = "(inline)"
		case name == "":
			name = "-"
		}
		if source == "" {
			source = "-"
		}
		bound := e.Node
		if bound == "" {
			bound = "-"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t", e.Volume, name, source, bound)
		if len(e.Nodes) == 0 {
			fmt.Fprintln(t, "-\t")
		}
		for i, n := range e.Nodes {
			if i > 0 {
				fmt.Fprint(t, "\t\t\t\t")
			}
			var pods []string
			for _, p := range n.Pods {
				pods = append(pods, p.String())
			}
			fmt.Fprintf(t, "%s\t%s\n", n.Node, strings.Join(pods, " "))
		}
	}
	return t.Flush()
}
