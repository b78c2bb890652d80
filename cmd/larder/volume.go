package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/larderfs/larder/master/client"
)

// volumeDetail is what `larder volume show -o json` prints. Fields are added, never changed.
type volumeDetail struct {
	Volume     string            `json:"volume"`
	Name       string            `json:"name,omitempty"`
	Inline     bool              `json:"inline"`
	Parameters map[string]string `json:"parameters,omitempty"`
	Bytes      int64             `json:"capacityBytes"`
	Node       string            `json:"node,omitempty"` // the one it is bound to
	Created    time.Time         `json:"created,omitzero"`
	Namespace  string            `json:"namespace,omitempty"` // of its claim, or of the pod that named it itself
	Claim      string            `json:"claim,omitempty"`
	Nodes      []volumeNode      `json:"nodes"` // where it is mounted
}

// volumeNode is a volume on a node. Counters are since its worker took the mount.
type volumeNode struct {
	Node                string     `json:"node"`
	Worker              string     `json:"worker"` // its UUID
	Pods                []podEntry `json:"pods"`
	Mounted             time.Time  `json:"mounted,omitzero"` // not set while the broker is away, nor are the two below
	Takeovers           int64      `json:"takeovers"`
	LongestStallSeconds float64    `json:"longestStallSeconds"` // without a worker, before a take-over
	Without             []string   `json:"without,omitempty"`   // which guarantees are weaker: resend, passthrough
	OpenFiles           uint64     `json:"openFiles"`
	Trouble             string     `json:"trouble,omitempty"` // what readers were told lately

	Counted      time.Time `json:"counted,omitzero"` // since when
	ReadBytes    uint64    `json:"readBytes"`        // by the worker: the sum of the next three
	DiskBytes    uint64    `json:"diskBytes"`
	MemoryBytes  uint64    `json:"memoryBytes"`
	StoreBytes   uint64    `json:"storeBytes"`             // readers waited for
	PassedBytes  uint64    `json:"passthroughOpenedBytes"` // sizes of files that the kernel reads itself, uncounted
	FetchedBytes uint64    `json:"fetchedBytes"`           // from under stores
	HitChunks    uint64    `json:"hitChunks"`
	MissChunks   uint64    `json:"missChunks"`

	Unanswered string `json:"unanswered,omitempty"` // why the rest is not known
}

func volumeShowCommand() *cobra.Command {
	var q question
	cmd := &cobra.Command{
		Use: "show NAME|ID", Short: "Show what a volume is of, who uses it, and what it has read", Args: cobra.ExactArgs(1),
		Long: `Show a volume by its name (that of its PersistentVolume) or its id: what it is of and how it is read, and for each node where
it is mounted the pods, since when, the take-overs, and what was read and fetched since the node's worker took it. What the
kernel reads itself (files in passthrough, pages it has) nobody counts: of those files OPENED says the sizes.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return q.ask(cmd.Context(), func(ctx context.Context, m *client.Client) error {
				d, err := describeVolume(ctx, m, args[0])
				if err != nil {
					return err
				}
				return q.print(cmd.OutOrStdout(), d, func(w io.Writer) error { return d.print(w, time.Now()) })
			})
		},
	}
	q.flags(cmd)
	return cmd
}

// describeVolume finds a volume by name or id, and asks who has it.
func describeVolume(ctx context.Context, m *client.Client, which string) (volumeDetail, error) {
	ws, err := m.AllWorkers(ctx, false)
	if err != nil {
		return volumeDetail{}, err
	}
	vs, err := allVolumes(ctx, m)
	if err != nil {
		return volumeDetail{}, err
	}
	entries := volumeEntries(vs, ws)
	i := slices.IndexFunc(entries, func(e volumeEntry) bool { return e.Volume == which || e.Name == which && which != "" })
	if i < 0 {
		return volumeDetail{}, fmt.Errorf("no volume has the name or the id %q; larder volume ls lists them: %w", which, client.ErrNotFound)
	}
	e := entries[i]
	d := volumeDetail{Volume: e.Volume, Name: e.Name, Inline: e.Inline, Parameters: e.Parameters, Bytes: e.Bytes, Node: e.Node}
	if i := slices.IndexFunc(vs, func(v client.Volume) bool { return v.ID == e.Volume }); i >= 0 {
		d.Created = vs[i].Created
	}
	on, err := m.DescribeVolume(ctx, e.Volume)
	if err != nil {
		return volumeDetail{}, err
	}
	d.add(on)
	return d, nil
}

// add adds what the nodes say.
func (d *volumeDetail) add(on []client.VolumeOnNode) {
	d.Nodes = []volumeNode{}
	for _, n := range on {
		v := n.Volume
		if d.Namespace == "" {
			d.Namespace, d.Claim = v.Namespace, v.Claim
		}
		if len(d.Parameters) == 0 { // the master does not know what an inline one is of
			d.Parameters = v.Parameters
		}
		d.Nodes = append(d.Nodes, volumeNode{
			Node: n.Node, Worker: n.UUID, Pods: podEntries(n.Pods), Mounted: v.Mounted, Takeovers: v.Takeovers, LongestStallSeconds: v.LongestStall.Seconds(),
			Without: v.Without, OpenFiles: v.OpenFiles, Trouble: v.Trouble, Counted: v.Counted,
			ReadBytes: v.DiskBytes + v.MemoryBytes + v.StoreBytes, DiskBytes: v.DiskBytes, MemoryBytes: v.MemoryBytes, StoreBytes: v.StoreBytes,
			PassedBytes: v.PassedBytes, FetchedBytes: v.FetchedBytes, HitChunks: v.HitChunks, MissChunks: v.MissChunks, Unanswered: n.Unanswered,
		})
	}
}

func (d volumeDetail) print(out io.Writer, now time.Time) error {
	t := newTable(out)
	name := d.Name
	if d.Inline {
		name = "(inline)"
	}
	fmt.Fprintf(t, "Volume:\t%s\n", d.Volume)
	fmt.Fprintf(t, "Name:\t%s\n", orDash(name))
	fmt.Fprintf(t, "Of:\t%s\n", orDash(cmp.Or(d.Parameters["source"], d.Parameters["path"])))
	switch {
	case d.Claim != "":
		fmt.Fprintf(t, "Claim:\t%s/%s\n", d.Namespace, d.Claim)
	case d.Namespace != "":
		fmt.Fprintf(t, "Namespace:\t%s\n", d.Namespace)
	}
	if d.Node != "" {
		fmt.Fprintf(t, "Bound to:\t%s, %s of whose cache are reserved\n", d.Node, bytes(d.Bytes))
	}
	if !d.Created.IsZero() {
		fmt.Fprintf(t, "Created:\t%s (%s ago)\n", date(d.Created), age(now.Sub(d.Created)))
	}
	var parameters []string
	for _, k := range slices.Sorted(maps.Keys(d.Parameters)) {
		if k != "source" && k != "path" {
			parameters = append(parameters, k+"="+d.Parameters[k])
		}
	}
	fmt.Fprintf(t, "Parameters:\t%s\n", orDash(strings.Join(parameters, " ")))
	if err := t.Flush(); err != nil || len(d.Nodes) == 0 {
		if err == nil {
			_, err = fmt.Fprintln(out, "\nmounted nowhere")
		}
		return err
	}
	fmt.Fprintln(out)
	return d.printNodes(out, now)
}

func (d volumeDetail) printNodes(out io.Writer, now time.Time) error {
	t := newTable(out)
	fmt.Fprintln(t, "NODE\tMOUNTED\tTAKEOVERS\tLONGEST STALL\tREAD\tOPENED\tFETCHED\tHIT CHUNKS\tFILES\tWITHOUT\tPODS")
	for _, n := range d.Nodes {
		var pods []string
		for _, p := range n.Pods {
			pods = append(pods, p.String())
		}
		who := orDash(strings.Join(pods, " "))
		if n.Unanswered != "" {
			fmt.Fprintf(t, "%s\t?\t?\t?\t?\t?\t?\t?\t?\t?\t%s\t%s\n", n.Node, who, n.Unanswered)
			continue
		}
		since, takeovers, longest := "?", "?", "?"
		if !n.Mounted.IsZero() {
			since, takeovers, longest = age(now.Sub(n.Mounted))+" ago", fmt.Sprint(n.Takeovers), stall(n.LongestStallSeconds)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d of %d\t%d\t%s\t%s\t%s\n", n.Node, since, takeovers, longest, bytes(int64(n.ReadBytes)), bytes(int64(n.PassedBytes)),
			bytes(int64(n.FetchedBytes)), n.HitChunks, n.HitChunks+n.MissChunks, n.OpenFiles, orDash(strings.Join(n.Without, ",")), who, n.Trouble)
	}
	return t.Flush()
}
