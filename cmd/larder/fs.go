package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/larderfs/larder/cacheworker/workerpb"
	"github.com/larderfs/larder/master/client"
)

// pathInfo is an entry of `larder fs ls -o json`, and `larder fs stat -o json`. Fields are added, never
// changed.
type pathInfo struct {
	Path        string     `json:"path"`
	Folder      bool       `json:"folder"`
	Size        int64      `json:"size"`
	Modified    *time.Time `json:"modified,omitempty"`
	Version     string     `json:"version,omitempty"`
	CachedBytes int64      `json:"cachedBytes"` // by the worker that was asked
	Entries     []pathInfo `json:"entries,omitempty"`
}

func fsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "fs", Short: "Look into the namespace, without a volume",
		Long: `Look into the namespace: what is mounted, and what the stores have there. The worker of this node is
asked, which reads each mount with the mount's own credential; so it is for root and the worker's user.
A mount whose credential is a Secret can be read where a volume of it is in use.

  larder fs ls /sales
  larder fs du /sales -o json`,
	}
	cmd.AddCommand(fsListCommand(), fsStatCommand(), fsCatCommand(), fsUsageCommand(), fsTreeCommand())
	return cmd
}

// browse asks a worker about paths.
type browse struct {
	dir string
	run string
	output
	worker workerpb.WorkerClient
}

func (b *browse) flags(cmd *cobra.Command) {
	b.where(cmd)
	b.output.flags(cmd)
}

// where is flags for what prints nothing but bytes.
func (b *browse) where(cmd *cobra.Command) {
	b.format = "table"
	cmd.Flags().StringVar(&b.dir, "dir", "/var/lib/larder", "the --dir of larder up")
	cmd.Flags().StringVar(&b.run, "run-dir", "", "the worker's --run-dir, instead of --dir")
}

// ask connects to the worker.
func (b *browse) ask(f func() error) error {
	if err := b.check(); err != nil {
		return err
	}
	run := b.run
	if run == "" {
		run = filepath.Join(b.dir, "run")
	}
	run, err := filepath.Abs(run)
	if err != nil {
		return err
	}
	conn, err := dialUnix(filepath.Join(run, controlSocket))
	if err != nil {
		return err
	}
	defer conn.Close()
	b.worker = workerpb.NewWorkerClient(conn)
	err = f()
	s := status.Convert(err)
	switch {
	case err == nil:
		return nil
	case s.Code() == codes.Unavailable && strings.Contains(s.Message(), "connection error"):
		return callError{s.Code(), fmt.Sprintf("ask the worker in %s: nobody answers; is larder up or larder worker running, and is this its --dir or --run-dir: %s", run, s.Message())}
	case s.Code() != codes.Unknown:
		return callError{s.Code(), s.Message()}
	}
	return err
}

func (b *browse) stat(ctx context.Context, p string) (pathInfo, error) {
	e, err := b.worker.StatPath(ctx, &workerpb.StatPathRequest{Path: p})
	return infoOf(p, e), err
}

func infoOf(p string, e *workerpb.PathEntry) pathInfo {
	i := pathInfo{Path: p, Folder: e.GetFolder(), Size: e.GetSize(), Version: e.GetVersion(), CachedBytes: e.GetCachedBytes()}
	if m := e.GetModified(); m != nil {
		t := m.AsTime()
		i.Modified = &t
	}
	return i
}

// list calls f with each entry of a folder.
func (b *browse) list(ctx context.Context, p string, f func(pathInfo) error) error {
	for after := ""; ; {
		r, err := b.worker.ListFolder(ctx, &workerpb.ListFolderRequest{Path: p, After: after})
		if err != nil {
			return err
		}
		for _, e := range r.GetEntries() {
			if err := f(infoOf(path.Join(p, e.GetName()), e)); err != nil {
				return err
			}
		}
		if after = r.GetNext(); after == "" {
			return nil
		}
	}
}

func (i pathInfo) name() string {
	if i.Folder {
		return path.Base(i.Path) + "/"
	}
	return path.Base(i.Path)
}

func (i pathInfo) when() string {
	if i.Modified == nil {
		return "-"
	}
	return date(*i.Modified)
}

// pathArg is the only argument, normalised; "/" without one.
func pathArg(args []string) (string, error) {
	if len(args) == 0 {
		return "/", nil
	}
	return client.ParsePath(args[0])
}

func fsListCommand() *cobra.Command {
	var b browse
	cmd := &cobra.Command{
		Use: "ls [PATH]", Short: "List a folder of the namespace, or show a file", Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := pathArg(args)
			if err != nil {
				return err
			}
			return b.ask(func() error {
				at, err := b.stat(cmd.Context(), p)
				if err != nil {
					return err
				}
				all := []pathInfo{}
				if !at.Folder {
					all = append(all, at)
				} else if err := b.list(cmd.Context(), p, func(i pathInfo) error { all = append(all, i); return nil }); err != nil {
					return err
				}
				return b.print(cmd.OutOrStdout(), all, func(w io.Writer) error { return printFolder(w, all) })
			})
		},
	}
	b.flags(cmd)
	return cmd
}

func printFolder(w io.Writer, all []pathInfo) error {
	t := newTable(w)
	fmt.Fprintln(t, "SIZE\tCACHED\tMODIFIED\tNAME")
	for _, i := range all {
		if i.Folder {
			fmt.Fprintf(t, "-\t-\t-\t%s\n", i.name())
			continue
		}
		fmt.Fprintf(t, "%d\t%s\t%s\t%s\n", i.Size, cachedShare(i.CachedBytes, i.Size), i.when(), i.name())
	}
	return t.Flush()
}

func cachedShare(part, whole int64) string {
	if whole == 0 {
		return "-"
	}
	return fmt.Sprintf("%d%%", 100*part/whole)
}

func fsStatCommand() *cobra.Command {
	var b browse
	cmd := &cobra.Command{
		Use: "stat PATH", Short: "Show what is known of a path of the namespace", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := pathArg(args)
			if err != nil {
				return err
			}
			return b.ask(func() error {
				i, err := b.stat(cmd.Context(), p)
				if err != nil {
					return err
				}
				return b.print(cmd.OutOrStdout(), i, i.print)
			})
		},
	}
	b.flags(cmd)
	return cmd
}

func (i pathInfo) print(w io.Writer) error {
	t := newTable(w)
	kind := "file"
	if i.Folder {
		kind = "folder"
	}
	fmt.Fprintf(t, "Path:\t%s\nKind:\t%s\n", i.Path, kind)
	if !i.Folder {
		fmt.Fprintf(t, "Size:\t%d\nCached:\t%d (%s)\nModified:\t%s\nVersion:\t%s\n", i.Size, i.CachedBytes, cachedShare(i.CachedBytes, i.Size), i.when(), i.Version)
	}
	return t.Flush()
}

func fsCatCommand() *cobra.Command {
	var b browse
	cmd := &cobra.Command{
		Use: "cat PATH…", Short: "Write files of the namespace to standard output, through the cache", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return b.ask(func() error {
				for _, a := range args {
					p, err := client.ParsePath(a)
					if err != nil {
						return err
					}
					if err := b.cat(cmd.Context(), cmd.OutOrStdout(), p); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
	b.where(cmd)
	return cmd
}

func (b *browse) cat(ctx context.Context, w io.Writer, p string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := b.worker.ReadFile(ctx, &workerpb.ReadFileRequest{Path: p})
	if err != nil {
		return err
	}
	for {
		piece, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := w.Write(piece.GetData()); err != nil {
			return err
		}
	}
}

// usage is what `larder fs du -o json` prints.
type usage struct {
	Path        string `json:"path"`
	Bytes       int64  `json:"bytes"`
	Files       int64  `json:"files"`
	Folders     int64  `json:"folders"`
	CachedBytes int64  `json:"cachedBytes"` // by the worker that was asked

	Entries []usage `json:"entries,omitempty"` // of the folder itself: what is directly in it
}

func (u *usage) add(o usage) {
	u.Bytes, u.Files, u.Folders, u.CachedBytes = u.Bytes+o.Bytes, u.Files+o.Files, u.Folders+o.Folders, u.CachedBytes+o.CachedBytes
}

func fsUsageCommand() *cobra.Command {
	var b browse
	cmd := &cobra.Command{
		Use: "du [PATH]", Short: "Sum up the bytes below a path, and how many of them are cached here", Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := pathArg(args)
			if err != nil {
				return err
			}
			return b.ask(func() error {
				at, err := b.stat(cmd.Context(), p)
				if err != nil {
					return err
				}
				u, err := b.usage(cmd.Context(), at, true)
				if err != nil {
					return err
				}
				return b.print(cmd.OutOrStdout(), u, func(w io.Writer) error {
					t := newTable(w)
					fmt.Fprintln(t, "SIZE\tCACHED\tFILES\tPATH")
					for _, e := range append(slices.Clone(u.Entries), u) {
						fmt.Fprintf(t, "%s\t%s\t%d\t%s\n", bytes(e.Bytes), cachedShare(e.CachedBytes, e.Bytes), e.Files, e.Path)
					}
					return t.Flush()
				})
			})
		},
	}
	b.flags(cmd)
	return cmd
}

func (b *browse) usage(ctx context.Context, i pathInfo, entries bool) (usage, error) {
	if !i.Folder {
		return usage{Path: i.Path, Bytes: i.Size, Files: 1, CachedBytes: i.CachedBytes}, nil
	}
	u := usage{Path: i.Path}
	err := b.list(ctx, i.Path, func(e pathInfo) error {
		below, err := b.usage(ctx, e, false)
		if err != nil {
			return err
		}
		if e.Folder {
			u.Folders++
		}
		if u.add(below); entries {
			u.Entries = append(u.Entries, below)
		}
		return nil
	})
	return u, err
}

func fsTreeCommand() *cobra.Command {
	var b browse
	var depth int
	cmd := &cobra.Command{
		Use: "tree [PATH]", Short: "Show a folder of the namespace and what is below it", Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := pathArg(args)
			if err != nil {
				return err
			}
			return b.ask(func() error {
				at, err := b.stat(cmd.Context(), p)
				if err != nil {
					return err
				}
				if err := b.fill(cmd.Context(), &at, depth); err != nil {
					return err
				}
				return b.print(cmd.OutOrStdout(), at, func(w io.Writer) error {
					fmt.Fprintln(w, p)
					printTree(w, at, "")
					return nil
				})
			})
		},
	}
	b.flags(cmd)
	cmd.Flags().IntVar(&depth, "depth", 3, "how `many` folders deep")
	return cmd
}

// fill adds what is in a folder, so many folders deep.
func (b *browse) fill(ctx context.Context, at *pathInfo, depth int) error {
	if !at.Folder || depth <= 0 {
		return nil
	}
	return b.list(ctx, at.Path, func(e pathInfo) error {
		if err := b.fill(ctx, &e, depth-1); err != nil {
			return err
		}
		at.Entries = append(at.Entries, e)
		return nil
	})
}

func printTree(w io.Writer, at pathInfo, indent string) {
	for i, e := range at.Entries {
		branch, more := "├── ", "│   "
		if i == len(at.Entries)-1 {
			branch, more = "└── ", "    "
		}
		fmt.Fprintf(w, "%s%s%s\n", indent, branch, e.name())
		printTree(w, e, indent+more)
	}
}
