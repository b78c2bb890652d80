package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"
)

func root() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "larder",
		Short: "Keep object-store data warm on the nodes that read it",
		Long: `Larder is a CSI storage driver, a node cache and a cache master. A pod gets its dataset
as one volume, at page-cache speed, with its own node's cache worker beside it.

Try it on one machine:   larder up --dir /var/lib/larder
See what it does:        larder status --dir /var/lib/larder

The exit code is 0 if all went well, 2 if the command line is wrong, 3 if what was named is not there, 4 if it is
not allowed as things are, 5 if nobody answers now, and else 1.`,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	cmd.AddCommand(upCommand(), masterCommand(), workerCommand(), csiCommand(), brokerCommand(), statusCommand(), locateCommand(), loadCommand(), freeCommand(), pinCommand(), unpinCommand(), jobCommand(), topCommand(), fsCommand(), mountCommand(), volumeCommand(), doctorCommand(), versionCommand())
	tellUsage(cmd)
	return cmd
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), "larder", version) },
	}
}

// process is what the subcommands that serve have in common.
type process struct {
	config    string
	logLevel  string
	logFormat string
	lifeline  int
}

// service makes a subcommand that runs until its context ends.
func service(use, short, long string, flags func(*pflag.FlagSet), run func(context.Context, *slog.Logger) error) *cobra.Command {
	var p process
	cmd := &cobra.Command{
		Use: use, Short: short, Long: long, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, lerr := p.logger(cmd.ErrOrStderr())
			if err := errors.Join(p.readConfig(cmd.Flags()), checkFlags(cmd.Flags()), lerr); err != nil {
				return usageError{err}
			}
			ctx, cancel := context.WithCancel(cmd.Context())
			defer cancel()
			if p.lifeline >= 0 {
				go holdOn(os.NewFile(uintptr(p.lifeline), "lifeline"), cancel)
			}
			return run(ctx, log.With("process", strings.Fields(use)[0]))
		},
	}
	f := cmd.Flags()
	f.StringVar(&p.config, "config", "", "YAML `file` with any of these flags as keys; the command line wins")
	f.StringVar(&p.logLevel, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&p.logFormat, "log-format", "text", "text or json")
	f.IntVar(&p.lifeline, "lifeline-fd", -1, "descriptor whose end is the end of the parent")
	f.MarkHidden("lifeline-fd")
	flags(f)
	return cmd
}

// checkFlags reports what flags that parse themselves were given.
func checkFlags(f *pflag.FlagSet) error {
	var errs []error
	f.VisitAll(func(flag *pflag.Flag) {
		if v, ok := flag.Value.(interface{ check() error }); ok && v.check() != nil {
			errs = append(errs, fmt.Errorf("--%s: %w", flag.Name, v.check()))
		}
	})
	return errors.Join(errs...)
}

// holdOn ends the process's context when its parent has died: the other end of the pipe is the parent's.
func holdOn(f *os.File, cancel context.CancelFunc) {
	io.Copy(io.Discard, f)
	cancel()
}

func (p process) logger(w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(p.logLevel)); err != nil {
		return nil, fmt.Errorf("--log-level %q: want debug, info, warn or error", p.logLevel)
	}
	o := &slog.HandlerOptions{Level: level}
	switch p.logFormat {
	case "text":
		return slog.New(slog.NewTextHandler(w, o)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, o)), nil
	}
	return nil, fmt.Errorf("--log-format %q: want text or json", p.logFormat)
}

// readConfig sets from the YAML file what the command line did not. It reports all mistakes.
func (p process) readConfig(f *pflag.FlagSet) error {
	if p.config == "" {
		return nil
	}
	b, err := os.ReadFile(p.config)
	if err != nil {
		return fmt.Errorf("--config: %w", err)
	}
	var values map[string]any
	if err := yaml.Unmarshal(b, &values); err != nil {
		return fmt.Errorf("--config %s: %w", p.config, err)
	}
	var errs []error
	keys := make([]string, 0, len(values))
	for k := range values {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		if err := setFlag(f, k, values[k]); err != nil {
			errs = append(errs, fmt.Errorf("--config %s: %s: %w", p.config, k, err))
		}
	}
	return errors.Join(errs...)
}

func setFlag(f *pflag.FlagSet, name string, value any) error {
	flag := f.Lookup(name)
	if flag == nil || flag.Hidden || name == "config" {
		return errors.New("no such setting; see --help for the flags, which are the keys")
	}
	if flag.Changed {
		return nil
	}
	list, ok := value.([]any)
	if !ok {
		list = []any{value}
	}
	for _, v := range list {
		switch v.(type) {
		case string, bool, float64:
		default:
			return fmt.Errorf("want text, a number, true or false, or a list of them")
		}
		text := fmt.Sprint(v)
		if n, ok := v.(float64); ok {
			text = strconv.FormatFloat(n, 'f', -1, 64)
		}
		if err := flag.Value.Set(text); err != nil {
			return err
		}
	}
	return nil
}
