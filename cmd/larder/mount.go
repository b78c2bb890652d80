package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/larderfs/larder/master/client"
	"github.com/larderfs/larder/master/namespace"
)

// mountEntry is an entry of `larder mount ls -o json`, and `larder mount show -o json`. Fields are
// added, never changed.
type mountEntry struct {
	Path        string            `json:"path"`
	URI         string            `json:"uri"`
	ReadOnly    bool              `json:"readOnly"`
	Options     map[string]string `json:"options"`
	Credential  string            `json:"credential,omitempty"` // where it is; never the credential
	AllowInline []string          `json:"allowInline"`          // "*" is all
	AllowClass  []string          `json:"allowClass"`
	Object      string            `json:"object,omitempty"` // the Mount object of the cluster that it is made from
	Broken      string            `json:"broken,omitempty"` // why no volume can use it
}

// mountTable is who keeps the mounts: the master, or the cluster's Mount objects.
type mountTable interface {
	Mounts(ctx context.Context) ([]client.Mount, error)
	PutMount(ctx context.Context, m client.Mount) error
	DeleteMount(ctx context.Context, path string) error
}

func mountCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "mount", Short: "Mounts of the namespace: one tree over all under stores",
		Long: `A mount joins a path of the namespace to an under store. Volumes with the parameter path are
served from what is mounted there, and mounts below their path appear as folders in them:

  larder mount add /sales s3://bucket/sales --credential secret:larder-system/sales-keys
  larder mount add /sales/archive s3://old-bucket --option region=eu-west-1 --read-only
  larder mount set /sales --allow-inline team-a,team-b
  larder mount set /sales --option ttl=24h

With a ttl whatever of an object is cached is freed so long after the first of it was, but what is pinned. Workers follow every change, and no volume is mounted again for it.`,
	}
	cmd.AddCommand(mountAddCommand(), mountSetCommand(), mountListCommand(), mountShowCommand(), mountMoveCommand(), mountRemoveCommand())
	return cmd
}

// mountFlags are what mounts have beside path and URI.
type mountFlags struct {
	m       client.Mount
	options map[string]string
}

func (f *mountFlags) register(flags *pflag.FlagSet) {
	flags.BoolVar(&f.m.ReadOnly, "read-only", false, "nothing is ever written to it, whatever a volume may")
	flags.StringToStringVar(&f.options, "option", nil, "`name=value` (repeated): endpoint, region, pathStyle of the store; ttl, how long something may be cached (24h)")
	flags.StringVar(&f.m.Credential, "credential", "", "`where` its credential is: secret:namespace/name, file:/path or env:PREFIX_ (of the workers); without one it is read with the volume's own")
	flags.StringSliceVar(&f.m.AllowInline, "allow-inline", nil, "Kubernetes `namespaces` whose inline volumes may use it; * for all (default none)")
	flags.StringSliceVar(&f.m.AllowClass, "allow-class", nil, "Kubernetes `namespaces` whose claims may use it; - for none (default all)")
}

// apply sets in m what was given.
func (f *mountFlags) apply(flags *pflag.FlagSet, m *client.Mount) {
	given := func(name string) bool { return flags.Changed(name) }
	if given("read-only") {
		m.ReadOnly = f.m.ReadOnly
	}
	if given("option") {
		m.Options = maps.Clone(m.Options)
		if m.Options == nil {
			m.Options = map[string]string{}
		}
		maps.Copy(m.Options, f.options)
		maps.DeleteFunc(m.Options, func(_, v string) bool { return v == "" }) // name= takes one away
	}
	if given("credential") {
		m.Credential = f.m.Credential
	}
	if given("allow-inline") {
		m.AllowInline = f.m.AllowInline
	}
	if given("allow-class") {
		m.AllowClass = f.m.AllowClass
	}
}

func mountAddCommand() *cobra.Command {
	var q mountQuestion
	var f mountFlags
	cmd := &cobra.Command{
		Use: "add PATH URI", Short: "Mount an under store at a path", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			m := client.Mount{Path: args[0], URI: args[1]}
			f.apply(cmd.Flags(), &m)
			m, err := client.ParseMount(m)
			if err != nil {
				return err
			}
			return q.ask(cmd.Context(), func(ctx context.Context, t mountTable) error {
				had, err := findMount(ctx, t, m.Path)
				m.Object = had.Object
				switch {
				case err == nil && had.Equal(m):
					return q.said(cmd.OutOrStdout(), m, "is mounted so already")
				case err == nil:
					return fmt.Errorf("%s is mounted already, differently (%s): change it with larder mount set, or remove it first with larder mount rm %s: %w", m.Path, had.URI, m.Path, client.ErrExists)
				case !errors.Is(err, client.ErrNotFound):
					return err
				}
				if err := t.PutMount(ctx, m); err != nil {
					return err
				}
				return q.said(cmd.OutOrStdout(), m, "mounted")
			})
		},
	}
	q.flags(cmd)
	f.register(cmd.Flags())
	return cmd
}

func mountSetCommand() *cobra.Command {
	var q mountQuestion
	var f mountFlags
	var uri string
	cmd := &cobra.Command{
		Use: "set PATH", Short: "Change a mount: what is given, and nothing else", Args: cobra.ExactArgs(1),
		Long: `Change what is given of a mount, and leave the rest. A list of namespaces replaces the one before;
--option name= takes an option away.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return q.ask(cmd.Context(), func(ctx context.Context, t mountTable) error {
				m, err := findMount(ctx, t, args[0])
				if err != nil {
					return err
				}
				f.apply(cmd.Flags(), &m)
				if uri != "" {
					m.URI = uri
				}
				if m, err = client.ParseMount(m); err != nil {
					return err
				}
				if err := t.PutMount(ctx, m); err != nil {
					return err
				}
				return q.said(cmd.OutOrStdout(), m, "changed")
			})
		},
	}
	q.flags(cmd)
	f.register(cmd.Flags())
	cmd.Flags().StringVar(&uri, "uri", "", "another under `store`")
	return cmd
}

func mountMoveCommand() *cobra.Command {
	var q mountQuestion
	cmd := &cobra.Command{
		Use: "mv PATH NEW-PATH", Short: "Mount at another path what is mounted at one", Args: cobra.ExactArgs(2),
		Long: `Mount at another path what is mounted at one, then remove the first. Files that are open are read to
their end; who looks up the old path finds nothing there any more.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return q.ask(cmd.Context(), func(ctx context.Context, t mountTable) error {
				m, err := findMount(ctx, t, args[0])
				if err != nil {
					return err
				}
				old := m.Path
				if m.Path = args[1]; m.Object != "" { // its path is one of its fields
					return q.moveObject(ctx, cmd.OutOrStdout(), t, m)
				}
				if m, err = client.ParseMount(m); err != nil {
					return err
				}
				if _, err := findMount(ctx, t, m.Path); !errors.Is(err, client.ErrNotFound) {
					return errors.Join(err, fmt.Errorf("something is mounted at %s: %w", m.Path, client.ErrExists))
				}
				if err := t.PutMount(ctx, m); err != nil {
					return err
				}
				if err := t.DeleteMount(ctx, old); err != nil {
					return fmt.Errorf("it is mounted at both paths now: %w", err)
				}
				return q.said(cmd.OutOrStdout(), m, "moved")
			})
		},
	}
	q.flags(cmd)
	return cmd
}

// moveObject gives a Mount object another path.
func (q *mountQuestion) moveObject(ctx context.Context, w io.Writer, t mountTable, m client.Mount) error {
	if _, ok := t.(*objectTable); !ok {
		return fmt.Errorf("it is made from the Kubernetes object mounts.larder.dev/%s: name the cluster with --kubeconfig: %w", m.Object, client.ErrRefused)
	}
	m, err := client.ParseMount(m)
	if err != nil {
		return err
	}
	if _, err := findMount(ctx, t, m.Path); !errors.Is(err, client.ErrNotFound) {
		return errors.Join(err, fmt.Errorf("something is mounted at %s: %w", m.Path, client.ErrExists))
	}
	if err := t.PutMount(ctx, m); err != nil {
		return err
	}
	return q.said(w, m, "moved")
}

func mountRemoveCommand() *cobra.Command {
	var q mountQuestion
	cmd := &cobra.Command{
		Use: "rm PATH", Short: "Remove a mount; the under store keeps what it has", Args: cobra.ExactArgs(1),
		Long: `Remove a mount from the namespace. Nothing in the under store changes. Files that are open are read to
their end; who looks up a path below it finds nothing there any more.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return q.ask(cmd.Context(), func(ctx context.Context, t mountTable) error {
				m, err := findMount(ctx, t, args[0])
				if err != nil {
					return err
				}
				if err := t.DeleteMount(ctx, m.Path); err != nil {
					return err
				}
				return q.said(cmd.OutOrStdout(), m, "removed")
			})
		},
	}
	q.flags(cmd)
	return cmd
}

func mountListCommand() *cobra.Command {
	var q mountQuestion
	cmd := &cobra.Command{
		Use: "ls", Short: "List the mounts", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return q.ask(cmd.Context(), func(ctx context.Context, t mountTable) error {
				ms, err := t.Mounts(ctx)
				if err != nil {
					return err
				}
				entries := []mountEntry{}
				for _, m := range ms {
					e := newMountEntry(m)
					if o, ok := t.(*objectTable); ok && o.trouble[m.Object] != "" {
						e.Broken = o.trouble[m.Object]
					}
					entries = append(entries, e)
				}
				return q.print(cmd.OutOrStdout(), entries, func(w io.Writer) error { return printMounts(w, entries) })
			})
		},
	}
	q.flags(cmd)
	return cmd
}

func mountShowCommand() *cobra.Command {
	var q mountQuestion
	cmd := &cobra.Command{
		Use: "show PATH", Short: "Show what a path of the namespace leads to", Args: cobra.ExactArgs(1),
		Long: `Show the mount that a path belongs to, where it leads, who may use it, and the mounts below it. The path
need not be that of a mount.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			path, err := client.ParsePath(args[0])
			if err != nil {
				return err
			}
			return q.ask(cmd.Context(), func(ctx context.Context, t mountTable) error {
				ms, err := t.Mounts(ctx)
				if err != nil {
					return err
				}
				v, ok := namespace.At(ms, path)
				if !ok {
					return fmt.Errorf("%s: %w", namespace.Nothing(path), client.ErrNotFound)
				}
				p := newPathEntry(v)
				return q.print(cmd.OutOrStdout(), p, func(w io.Writer) error { return printPath(w, p) })
			})
		},
	}
	q.flags(cmd)
	return cmd
}

func findMount(ctx context.Context, t mountTable, path string) (client.Mount, error) {
	path, err := client.ParsePath(path)
	if err != nil {
		return client.Mount{}, err
	}
	ms, err := t.Mounts(ctx)
	if err != nil {
		return client.Mount{}, err
	}
	if i := slices.IndexFunc(ms, func(m client.Mount) bool { return m.Path == path }); i >= 0 {
		return ms[i], nil
	}
	return client.Mount{}, fmt.Errorf("no mount has the path %s; larder mount ls shows them: %w", path, client.ErrNotFound)
}

// clusterQuestion is for the cluster, where there is one, or for the master.
type clusterQuestion struct {
	question
	kubeconfig string
	dirGiven   func() bool
}

func (q *clusterQuestion) flags(cmd *cobra.Command, what string) {
	q.question.flags(cmd)
	cmd.Flags().StringVar(&q.kubeconfig, "kubeconfig", "", "kubeconfig `file` of a cluster that "+what+" (default this pod's cluster, unless --master or --dir is given; else the master)")
	q.dirGiven = func() bool { return cmd.Flags().Changed("dir") }
}

// mountQuestion is about mounts.
type mountQuestion struct{ clusterQuestion }

func (q *mountQuestion) flags(cmd *cobra.Command) {
	q.clusterQuestion.flags(cmd, "keeps mounts as Mount objects")
}

func (q *mountQuestion) ask(ctx context.Context, f func(context.Context, mountTable) error) error {
	if err := q.check(); err != nil {
		return err
	}
	c, err := q.cluster()
	if err != nil {
		return err
	}
	if c != nil {
		return f(ctx, c)
	}
	return q.question.ask(ctx, func(ctx context.Context, m *client.Client) error { return f(ctx, m) })
}

// said tells what was done to a mount.
func (q *mountQuestion) said(w io.Writer, m client.Mount, what string) error {
	return q.print(w, newMountEntry(m), func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "%s (%s) %s\n", m.Path, m.URI, what)
		return err
	})
}

func newMountEntry(m client.Mount) mountEntry {
	e := mountEntry{Path: m.Path, URI: m.URI, ReadOnly: m.ReadOnly, Options: m.Options, Credential: m.Credential,
		AllowInline: m.AllowInline, AllowClass: m.AllowClass, Object: m.Object}
	if e.Options == nil {
		e.Options = map[string]string{}
	}
	if len(e.AllowInline) == 0 || e.AllowInline[0] == client.NoNamespace {
		e.AllowInline = []string{}
	}
	switch {
	case len(e.AllowClass) == 0:
		e.AllowClass = []string{client.AllNamespaces}
	case e.AllowClass[0] == client.NoNamespace:
		e.AllowClass = []string{}
	}
	if err := m.Validate(); err != nil { // an older master took it
		e.Broken = err.Error()
	}
	return e
}

func printMounts(w io.Writer, entries []mountEntry) error {
	t := newTable(w)
	fmt.Fprintln(t, "PATH\tURI\tREAD-ONLY\tCREDENTIAL\tINLINE\tCLASSES\tOPTIONS")
	for _, e := range entries {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", e.Path, e.URI, e.state(), orDash(e.Credential),
			orDash(strings.Join(e.AllowInline, ",")), orDash(strings.Join(e.AllowClass, ",")), orDash(e.options()))
	}
	return t.Flush()
}

func (e mountEntry) state() string {
	switch {
	case e.Broken != "":
		return "broken"
	case e.ReadOnly:
		return "yes"
	}
	return "no"
}

func (e mountEntry) options() string {
	var all []string
	for _, k := range slices.Sorted(maps.Keys(e.Options)) {
		all = append(all, k+"="+e.Options[k])
	}
	return strings.Join(all, ",")
}

// pathEntry is what `larder mount show -o json` prints.
type pathEntry struct {
	Path  string       `json:"path"`
	URI   string       `json:"uri,omitempty"`   // where the path itself leads
	Mount *mountEntry  `json:"mount,omitempty"` // the one that it belongs to
	Below []mountEntry `json:"below"`           // mounts below it, which hide what the store has there
}

func newPathEntry(v namespace.View) pathEntry {
	p := pathEntry{Path: v.Path, Below: []mountEntry{}}
	for _, part := range v.Parts {
		e := newMountEntry(part.Mount)
		if part.At == "" {
			p.URI, p.Mount = part.URI, &e
		} else {
			p.Below = append(p.Below, e)
		}
	}
	return p
}

func printPath(w io.Writer, p pathEntry) error {
	t := newTable(w)
	fmt.Fprintf(t, "Path:\t%s\n", p.Path)
	if e := p.Mount; e != nil {
		fmt.Fprintf(t, "Leads to:\t%s\n", p.URI)
		fmt.Fprintf(t, "Mount:\t%s (%s)\n", e.Path, e.URI)
		fmt.Fprintf(t, "Read-only:\t%s\n", e.state())
		if e.Broken != "" {
			fmt.Fprintf(t, "Why broken:\t%s\n", e.Broken)
		}
		credential := e.Credential
		if credential == "" {
			credential = "the volume's own"
		}
		fmt.Fprintf(t, "Credential:\t%s\n", credential)
		fmt.Fprintf(t, "Options:\t%s\n", orDash(e.options()))
		fmt.Fprintf(t, "Inline volumes of:\t%s\n", orDash(strings.Join(e.AllowInline, ", ")))
		fmt.Fprintf(t, "Claims of:\t%s\n", orDash(strings.Join(e.AllowClass, ", ")))
		if e.Object != "" {
			fmt.Fprintf(t, "Made from:\tmounts.larder.dev/%s\n", e.Object)
		}
	} else {
		fmt.Fprintf(t, "Leads to:\tthe mounts below it\n")
	}
	for i, e := range p.Below {
		label := ""
		if i == 0 {
			label = "Mounts below:"
		}
		fmt.Fprintf(t, "%s\t%s (%s)\n", label, e.Path, e.URI)
	}
	return t.Flush()
}
