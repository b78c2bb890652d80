package main

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/larderfs/larder/cacheworker"
	"github.com/larderfs/larder/cacheworker/fusefs"
	"github.com/larderfs/larder/cacheworker/telemetry"
	"github.com/larderfs/larder/driver"
	"github.com/larderfs/larder/driver/takeover"
	"github.com/larderfs/larder/master"
)

const referenceFile = "REFERENCE.md"

// metricTables are the metrics of all processes.
var metricTables = []struct {
	process string
	table   []telemetry.Metric
}{
	{"Every process", telemetry.Metrics},
	{"Worker", cacheworker.Metrics},
	{"Node plugin: the broker", takeover.Metrics},
	{"Node plugin and controller: CSI", driver.Metrics},
	{"Master", master.Metrics},
}

func TestReferenceIsAsTheCodeIs(t *testing.T) {
	want := reference(t)
	if *rewrite {
		if err := os.WriteFile(referenceFile, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(referenceFile)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("%s is not what the code says: make docs. The first line that differs:\n%s", referenceFile, firstDifference(string(got), want))
	}
}

func firstDifference(got, want string) string {
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range min(len(g), len(w)) {
		if g[i] != w[i] {
			return fmt.Sprintf("has  %s\nwant %s", g[i], w[i])
		}
	}
	return fmt.Sprintf("has %d lines, want %d", len(g), len(w))
}

func TestMetricsAreNamedAsPrometheusWants(t *testing.T) {
	seen := map[string]bool{}
	for _, p := range metricTables {
		for _, wrong := range telemetry.Check(p.table) {
			t.Errorf("%s: %s", p.process, wrong)
		}
		for _, m := range p.table {
			if seen[m.Name] {
				t.Errorf("%s is in two tables", m.Name)
			}
			seen[m.Name] = true
		}
	}
}

// reference is made of nothing but the code: no clock, no host, no path.
func reference(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	b.WriteString("# Reference\n\n<!-- Made from the code by `make docs`: change that instead. -->\n\n" +
		"What everything is called. What it is for is in the [README](../../README.md).\n\n## Commands\n\n")
	b.WriteString("Every flag of a command that serves is also a key of its `--config` file.\n")
	commands(&b, root())
	parameters(t, &b)
	b.WriteString("\n## Metrics\n\nPrometheus, at `/metrics` of each process. All histograms have the same buckets, in seconds: ")
	for i, bound := range telemetry.Buckets() {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprint(&b, bound)
	}
	b.WriteString(".\n")
	for _, p := range metricTables {
		fmt.Fprintf(&b, "\n### %s\n\n| metric | kind | meaning |\n|---|---|---|\n", p.process)
		for _, m := range p.table {
			name := m.Name
			if len(m.Labels) > 0 {
				name += "{" + strings.Join(m.Labels, ",") + "}"
			}
			fmt.Fprintf(&b, "| `%s` | %s | %s |\n", name, m.Kind(), cell(m.Help))
		}
	}
	errnos(&b)
	errorCodes(&b)
	b.WriteString("\n## What a command's exit code says\n\n| code | meaning |\n|---|---|\n| `0` | all went well |\n| `1` | it failed, or what was to be checked is wrong |\n")
	for _, e := range exitCodes {
		fmt.Fprintf(&b, "| `%d` | %s |\n", e.code, cell(e.meaning))
	}
	return b.String()
}

func commands(b *strings.Builder, cmd *cobra.Command) {
	if cmd.Hidden || cmd.Name() == "help" || cmd.Name() == "completion" {
		return
	}
	if _, group := cmd.Annotations[onlyGroups]; cmd.Runnable() && !group {
		fmt.Fprintf(b, "\n### `%s`\n\n%s.\n", cmd.UseLine(), strings.TrimSuffix(cmd.Short, "."))
		flags(b, cmd)
	}
	for _, sub := range cmd.Commands() {
		commands(b, sub)
	}
}

func flags(b *strings.Builder, cmd *cobra.Command) {
	first := true
	cmd.NonInheritedFlags().VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		if first {
			b.WriteString("\n| flag | default | meaning |\n|---|---|---|\n")
			first = false
		}
		kind, usage := pflag.UnquoteUsage(f)
		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + "`, `" + name
		}
		if kind != "" {
			name += " " + kind
		}
		def := strings.Trim(strings.TrimSuffix(f.DefValue, ":0"), "[]") // a tier that takes what there is; lists
		switch {
		case f.Name == "node-name":
			def = "the host's name"
		case def == "false" || def == "0s" && f.Value.Type() == "duration" || f.Value.Type() != "string" && def == "0":
			def = ""
		case def != "":
			def = "`" + def + "`"
		}
		fmt.Fprintf(b, "| `%s` | %s | %s |\n", name, def, cell(usage))
	})
}

func parameters(t *testing.T, b *strings.Builder) {
	t.Helper()
	all, err := driver.ParameterTable()
	if err != nil {
		t.Error(err)
	}
	b.WriteString("\n## Parameters of volumes\n\nOf a StorageClass (`parameters`) and of an inline volume (`volumeAttributes`).\n\n| parameter | default | meaning |\n|---|---|---|\n")
	for _, p := range all {
		def := ""
		if p.Default != "" {
			def = "`" + p.Default + "`"
		}
		fmt.Fprintf(b, "| `%s` | %s | %s |\n", p.Name, def, cell(p.Meaning))
	}
	fmt.Fprintf(b, "\nKeys of a Secret: `%s`.\n", strings.Join(driver.SecretKeys(), "`, `"))
}

func errnos(b *strings.Builder) {
	b.WriteString("\n## What a reader is told\n\nWhen and why is in [SEMANTICS.md](../../cacheworker/SEMANTICS.md).\n\n| error | errno |\n|---|---|\n")
	for _, e := range fusefs.Errnos() {
		what := "all others"
		if e.Err != nil {
			what = cell(e.Err.Error())
		}
		fmt.Fprintf(b, "| %s | `%s` |\n", what, e.Name())
	}
}

func errorCodes(b *strings.Builder) {
	b.WriteString("\n## What a CSI call answers\n\n| code | errors |\n|---|---|\n")
	all := driver.ErrorCodes()
	slices.SortStableFunc(all, func(x, y driver.ErrorCode) int { return cmp.Compare(x.Code, y.Code) })
	for i := 0; i < len(all); {
		var what []string
		code := all[i].Code
		for ; i < len(all) && all[i].Code == code; i++ {
			text := "all others: a bug of Larder's"
			if all[i].Err != nil {
				text = all[i].Err.Error()
			}
			if !slices.Contains(what, text) {
				what = append(what, text)
			}
		}
		fmt.Fprintf(b, "| `%s` | %s |\n", code, cell(strings.Join(what, "; ")))
	}
}

// cell is text within a table.
func cell(s string) string {
	return strings.ReplaceAll(strings.Join(strings.Fields(s), " "), "|", `\|`)
}
