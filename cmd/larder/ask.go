package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/larderfs/larder/master/client"
)

// question is a command that asks the master.
type question struct {
	dir    string
	master string
	output
}

func (q *question) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&q.dir, "dir", "/var/lib/larder", "the --dir of larder up")
	cmd.Flags().StringVar(&q.master, "master", "", "`address` of the master: unix:///path or host:port, several with commas between; instead of --dir")
	q.output.flags(cmd)
}

// ask hands a client to f.
func (q *question) ask(ctx context.Context, f func(context.Context, *client.Client) error) error {
	if err := q.check(); err != nil {
		return err
	}
	target := q.master
	if target == "" {
		dir, err := filepath.Abs(q.dir)
		if err != nil {
			return err
		}
		target = "unix://" + filepath.Join(dir, "run", masterSocket)
	}
	m, err := client.New(client.Config{Target: target})
	if err != nil {
		return err
	}
	defer m.Close()
	err = f(ctx, m)
	if errors.Is(err, client.ErrUnavailable) {
		err = fmt.Errorf("ask the master at %s: %w", target, err)
	}
	return err
}

// output is how a command prints what it found.
type output struct{ format string }

func (o *output) flags(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&o.format, "output", "o", "table", "table, json or yaml")
}

func (o *output) check() error {
	if !slices.Contains([]string{"table", "json", "yaml"}, o.format) {
		return usageError{fmt.Errorf("-o %q: want table, json or yaml", o.format)}
	}
	return nil
}

// print prints v for programs, or has table print it for people.
func (o *output) print(w io.Writer, v any, table func(io.Writer) error) error {
	switch o.format {
	case "json":
		return printJSON(w, v)
	case "yaml":
		b, err := yaml.Marshal(v)
		if err == nil {
			_, err = w.Write(b)
		}
		return err
	}
	return table(w)
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// newTable aligns what is written to it in columns.
func newTable(w io.Writer) *tabwriter.Writer { return tabwriter.NewWriter(w, 0, 4, 2, ' ', 0) }

// short is enough of a UUID to tell workers apart.
func short(uuid string) string { return uuid[:min(len(uuid), 8)] }

// first is the address that counts, or a dash.
func first(addresses []string) string {
	if len(addresses) == 0 {
		return "-"
	}
	return addresses[0]
}

// age says how long ago something was, in its two largest units.
func age(d time.Duration) string {
	switch s := int64(d / time.Second); {
	case s < 0:
		return "-"
	case s < 60:
		return fmt.Sprintf("%ds", s)
	case s < 3600:
		return fmt.Sprintf("%dm%02ds", s/60, s%60)
	case s < 86400:
		return fmt.Sprintf("%dh%02dm", s/3600, s/60%60)
	default:
		return fmt.Sprintf("%dd%02dh", s/86400, s/3600%24)
	}
}
