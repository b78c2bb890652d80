package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"

	"github.com/larderfs/larder/master/client"
)

// location is what `larder locate -o json` prints. Fields are added, never changed.
type location struct {
	URI         string         `json:"uri"`
	CachedBytes int64          `json:"cachedBytes"` // sum over the nodes
	Nodes       []nodeLocation `json:"nodes"`       // who has most first, who is not known last
}

type nodeLocation struct {
	Node        string   `json:"node"`
	Worker      string   `json:"worker"` // its UUID
	Addresses   []string `json:"addresses"`
	CachedBytes int64    `json:"cachedBytes"`
	Objects     int64    `json:"objects"`
	Complete    int64    `json:"completeObjects"`
	Stores      int64    `json:"stores"` // under stores with such a bucket or folder
	Unanswered  string   `json:"unanswered,omitempty"`
}

func locateCommand() *cobra.Command {
	var q question
	var endpoint string
	cmd := &cobra.Command{
		Use: "locate PATH", Short: "Show which nodes have how much of a path of the namespace, or an under-store URI, cached",
		Long: `Ask all workers how much they have cached of an object, or of everything below a prefix:

  larder locate /sales/2026
  larder locate s3://bucket/warehouse/sales
  larder locate file:///data/table/

With a / at the end only what lies below the name counts; without one, the object of that name too.
A ? or # in a key is written as %3F or %23. Nodes that do not answer are listed as such.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return q.ask(cmd.Context(), func(ctx context.Context, m *client.Client) error {
				found, err := m.Locate(ctx, args[0], endpoint)
				if err != nil {
					return err
				}
				l := newLocation(args[0], found)
				return q.print(cmd.OutOrStdout(), l, l.print)
			})
		},
	}
	q.flags(cmd)
	cmd.Flags().StringVar(&endpoint, "endpoint", "", "`URL` of the S3 store; empty for all that have such a bucket")
	return cmd
}

func newLocation(uri string, found []client.Located) location {
	l := location{URI: uri, Nodes: []nodeLocation{}}
	for _, f := range found {
		l.CachedBytes += f.Held.CachedBytes
		l.Nodes = append(l.Nodes, nodeLocation{Node: f.Node, Worker: f.UUID, Addresses: append([]string{}, f.Addresses...),
			CachedBytes: f.Held.CachedBytes, Objects: f.Held.Objects, Complete: f.Held.CompleteObjects, Stores: f.Held.Stores, Unanswered: f.Unanswered})
	}
	slices.SortStableFunc(l.Nodes, func(a, b nodeLocation) int {
		return cmp.Or(cmp.Compare(len(a.Unanswered), 0)-cmp.Compare(len(b.Unanswered), 0), cmp.Compare(b.CachedBytes, a.CachedBytes), cmp.Compare(a.Node, b.Node))
	})
	return l
}

func (l location) print(out io.Writer) error {
	if len(l.Nodes) == 0 {
		_, err := fmt.Fprintln(out, "no worker is registered")
		return err
	}
	t := newTable(out)
	fmt.Fprintln(t, "NODE\tWORKER\tADDRESS\tCACHED\tOBJECTS\tCOMPLETE\t")
	holders, unknown, stores := 0, 0, int64(0)
	for _, n := range l.Nodes {
		fmt.Fprintf(t, "%s\t%s\t%s\t", n.Node, short(n.Worker), first(n.Addresses))
		if n.Unanswered != "" {
			unknown++
			fmt.Fprintf(t, "?\t?\t?\t%s\n", n.Unanswered)
			continue
		}
		if n.CachedBytes > 0 {
			holders++
		}
		stores = max(stores, n.Stores)
		fmt.Fprintf(t, "%s\t%d\t%d\t\n", bytes(n.CachedBytes), n.Objects, n.Complete)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(out, "\n%s on %d of %d nodes", bytes(l.CachedBytes), holders, len(l.Nodes))
	if unknown > 0 {
		fmt.Fprintf(out, "; %d did not answer", unknown)
	}
	if stores > 1 {
		fmt.Fprintf(out, "; up to %d stores have such a bucket: --endpoint tells them apart", stores)
	}
	_, err := fmt.Fprintln(out)
	return err
}
