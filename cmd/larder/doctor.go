package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/driver/broker"
	"github.com/larderfs/larder/driver/mounttable"
	"github.com/larderfs/larder/master/client"
)

// finding is an entry of `larder doctor -o json`. Fields are added, never changed.
type finding struct {
	Check  string `json:"check"`
	State  string `json:"state"` // ok, warning or error
	Found  string `json:"found"`
	Remedy string `json:"remedy,omitempty"`
}

// The states of findings.
const (
	ok      = "ok"
	warning = "warning"
	bad     = "error"
)

// patient is what the doctor looks at. The roots are other folders in tests.
type patient struct {
	run       string
	master    string
	endpoints []string
	proc, sys string
}

func doctorCommand() *cobra.Command {
	var dir string
	p := patient{proc: "/proc", sys: "/sys"}
	var o output
	cmd := &cobra.Command{
		Use: "doctor", Short: "Check this node: kernel, processes, mounts, cache, stores and clock", Args: cobra.NoArgs,
		Long: `Check what Larder needs on this node, and say what to do about what is wrong. It changes nothing, and touches no
mount. Stores are those of the volumes that are published, and --endpoint. The exit code is 1 if there is an error.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.check(); err != nil {
				return err
			}
			if p.run == "" {
				p.run = filepath.Join(dir, "run")
			}
			if p.master == "" {
				p.master = "unix://" + filepath.Join(p.run, masterSocket)
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), 20*time.Second)
			defer cancel()
			findings := p.examine(ctx)
			if err := o.print(cmd.OutOrStdout(), findings, func(w io.Writer) error { return printFindings(w, findings) }); err != nil {
				return err
			}
			if n := count(findings, bad); n > 0 {
				return fmt.Errorf("%d errors", n)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&dir, "dir", "/var/lib/larder", "the --dir of larder up")
	f.StringVar(&p.run, "run-dir", "", "the --run-dir of larder worker and csi node, instead of --dir")
	f.StringVar(&p.master, "master", "", "`address` of the master: unix:///path or host:port; instead of that of --dir")
	f.StringSliceVar(&p.endpoints, "endpoint", nil, "`URLs` of more S3 stores to reach")
	o.flags(cmd)
	return cmd
}

func count(findings []finding, state string) (n int) {
	for _, f := range findings {
		if f.State == state {
			n++
		}
	}
	return n
}

func printFindings(out io.Writer, findings []finding) error {
	t := newTable(out)
	fmt.Fprintln(t, "CHECK\tSTATE\tFOUND")
	for _, f := range findings {
		fmt.Fprintf(t, "%s\t%s\t%s\n", f.Check, f.State, f.Found)
		if f.Remedy != "" {
			fmt.Fprintf(t, "\t\t→ %s\n", f.Remedy)
		}
	}
	return t.Flush()
}

// examine looks at everything, from the kernel to the stores.
func (p patient) examine(ctx context.Context) (all []finding) {
	all = append(all, p.kernel(), p.device(), p.requestTimeout(), p.requestSize())
	s, err := askStatus(ctx, p.run)
	if err != nil {
		all = append(all, finding{"processes", bad, err.Error(), "start `larder worker` and `larder csi node` (or `larder up`), or name their --run-dir"})
	} else {
		all = append(all, processes(s)...)
		all = append(all, cacheDisk(s)...)
	}
	all = append(all, p.mounts(s)...)
	endpoints := slices.Clone(p.endpoints)
	published, found := p.askMaster(ctx)
	all = append(all, found...)
	endpoints = append(endpoints, published...)
	slices.Sort(endpoints)
	for _, e := range slices.Compact(endpoints) {
		all = append(all, store(ctx, e))
	}
	return all
}

// kernel says what this one cannot.
func (p patient) kernel() finding {
	f := finding{Check: "kernel"}
	text, err := os.ReadFile(filepath.Join(p.proc, "sys/kernel/osrelease"))
	var major, minor int
	if err == nil {
		_, err = fmt.Sscanf(string(text), "%d.%d", &major, &minor)
	}
	f.Found = strings.TrimSpace(string(text))
	switch v := major*1000 + minor; {
	case err != nil:
		return finding{"kernel", warning, fmt.Sprintf("its version is not known: %v", err), ""}
	case v < 5012:
		f.State, f.Remedy = bad, "Larder needs 5.12 (mount_setattr): use a newer kernel"
	case v < 6009:
		f.State, f.Remedy = warning, "before 6.9 there is neither passthrough nor resend: reads go through the worker, and one in flight when it is killed hangs; use 6.12 or later"
	case v < 6012:
		f.State, f.Remedy = warning, "6.12 or later is where everything is claimed"
	default:
		f.State = ok
	}
	return f
}

func (p patient) device() finding {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case err == nil:
		unix.Close(fd)
		return finding{"/dev/fuse", ok, "opens", ""}
	case errors.Is(err, unix.ENOENT):
		return finding{"/dev/fuse", bad, "is not there", "modprobe fuse"}
	}
	return finding{"/dev/fuse", bad, err.Error(), "run as root, in a container with the device; only `larder csi node` needs it"}
}

func (p patient) sysctl(name string) (int, bool) {
	text, err := os.ReadFile(filepath.Join(p.proc, "sys", strings.ReplaceAll(name, ".", "/")))
	if err != nil {
		return 0, false
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	return n, err == nil
}

func (p patient) requestTimeout() finding {
	const name = "fs.fuse.max_request_timeout"
	if n, known := p.sysctl(name); known && n != 0 {
		return finding{"requests", bad, fmt.Sprintf("%s is %d s: a mount dies while it waits so long for a worker", name, n), "sysctl " + name + "=0"}
	}
	return finding{"requests", ok, "may wait for a worker", ""}
}

func (p patient) requestSize() finding {
	const name, want = "fs.fuse.max_pages_limit", 256
	if n, known := p.sysctl(name); known && n < want {
		return finding{"request size", warning, fmt.Sprintf("%s is %d: READs are small", name, n), fmt.Sprintf("sysctl %s=%d, before volumes are mounted", name, want)}
	}
	return finding{"request size", ok, "1 MiB", ""}
}

// processes says who answers, and what the kernel did not give them.
func processes(s nodeStatus) (all []finding) {
	for _, e := range s.Errors {
		all = append(all, finding{"processes", bad, e, "readers wait for it; its log says why it is away"})
	}
	if s.UUID != "" {
		all = append(all, finding{"worker", ok, fmt.Sprintf("%s (%s)", s.UUID, s.Version), ""})
	}
	if s.BrokerPID != 0 {
		all = append(all, finding{"broker", ok, fmt.Sprintf("pid %d", s.BrokerPID), ""})
	}
	for _, f := range s.Features {
		if !f.Available {
			all = append(all, finding{f.Name, warning, "is off: " + f.Reason, ""})
		}
	}
	return all
}

// cacheDisk is about the worker's cache directory.
func cacheDisk(s nodeStatus) (all []finding) {
	if s.UUID == "" {
		return nil
	}
	f := finding{"cache", ok, fmt.Sprintf("%s of %s in %d objects", bytes(s.CachedBytes), bytes(s.CapacityBytes), s.Objects), ""}
	switch {
	case s.CapacityBytes == 0:
		f.State, f.Remedy = bad, "it has no room: everything is read through; give --tier a capacity, or its file system space"
	case s.ReadingIndex:
		f.State, f.Remedy = warning, "the index is still being read: what is not known yet is fetched again"
	}
	all = append(all, f)
	if s.CacheErrors > 0 {
		all = append(all, finding{"cache's disk", bad, fmt.Sprintf("%d writes were refused since %s", s.CacheErrors, date(s.Started)), "reads go on from the store; see the kernel's log for the disk, and the worker's for the error"})
	}
	if s.BadChunks > 0 {
		all = append(all, finding{"cache's disk", warning, fmt.Sprintf("%d chunks were not what their sums say", s.BadChunks), "they were fetched again; if the machine was not cut off its power, suspect the disk"})
	}
	return all
}

// mounts compares the kernel's table with the broker's. It touches none of them.
func (p patient) mounts(s nodeStatus) (all []finding) {
	table, err := mounttable.Read()
	if err != nil {
		return []finding{{"mounts", bad, err.Error(), ""}}
	}
	served := map[string]bool{}
	ours := []string{mountSource(p.run), mountSource(filepath.Dir(p.run))} // of csi node, and of larder up
	for _, m := range s.Mounts {
		served[m.Path] = m.Served
		if e, ok := table.At(m.Path); ok {
			ours = append(ours, e.Source)
		}
	}
	waiting := 0
	for _, e := range table {
		if e.FSType != broker.FSType || !slices.Contains(ours, e.Source) {
			continue
		}
		sameFS := func(o mounttable.Entry) bool { return o.Dev == e.Dev && served[o.Path] } // binds of what is served are
		if slices.ContainsFunc(table, sameFS) {
			continue
		}
		waiting++
		all = append(all, finding{"mounts", bad, e.Path + " has no worker: who reads it waits",
			"see why the worker is away; if nothing comes back, deleting the pod unmounts it"})
	}
	if waiting == 0 {
		all = append(all, finding{"mounts", ok, fmt.Sprintf("%d, all served", len(s.Mounts)), ""})
	}
	return all
}

// askMaster returns the endpoints of the volumes that the master knows.
func (p patient) askMaster(ctx context.Context) (endpoints []string, all []finding) {
	m, err := client.New(client.Config{Target: p.master, Timeout: 5 * time.Second})
	if err != nil {
		return nil, []finding{{"master", bad, err.Error(), ""}}
	}
	defer m.Close()
	st, err := m.Status(ctx)
	if err != nil {
		return nil, []finding{{"master", bad, err.Error(), "volumes are read and published without it, but none is made; is --master right, and a NetworkPolicy open?"}}
	}
	all = []finding{{"master", ok, fmt.Sprintf("%s, %d workers, %d volumes", st.Version, st.Workers, st.Volumes), ""}}
	if st.Workers == 0 {
		all = append(all, finding{"workers", warning, "none is registered", "has `larder worker` a --master?"})
	}
	vs, err := allVolumes(ctx, m)
	if err != nil {
		return nil, append(all, finding{"volumes", bad, err.Error(), ""})
	}
	for _, v := range vs {
		if e := v.Parameters["endpoint"]; e != "" {
			endpoints = append(endpoints, e)
		}
	}
	return endpoints, all
}

const (
	skewWarned = 30 * time.Second
	skewMost   = 15 * time.Minute // S3 refuses signatures beyond
)

// store asks one without a credential: that it answers, and what time it has.
func store(ctx context.Context, endpoint string) finding {
	check := "store " + endpoint
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodHead, endpoint, nil)
	if err != nil {
		return finding{check, bad, err.Error(), "want http://host[:port] or https://host[:port]"}
	}
	before := time.Now()
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		return finding{check, bad, err.Error(), "reads of what is not cached fail; check name, network and certificates from this node"}
	}
	resp.Body.Close()
	took := time.Since(before)
	found := fmt.Sprintf("answers in %v", took.Round(time.Millisecond))
	at, err := http.ParseTime(resp.Header.Get("Date"))
	if err != nil {
		return finding{check, ok, found, ""}
	}
	skew := max(before.Sub(at.Add(time.Second)), at.Sub(before.Add(took)), 0)
	switch {
	case skew >= skewMost:
		return finding{check, bad, fmt.Sprintf("%s; its clock and this node's differ by %v: it refuses our signatures", found, skew.Round(time.Second)), "set this node's clock (NTP)"}
	case skew >= skewWarned:
		return finding{check, warning, fmt.Sprintf("%s; its clock and this node's differ by %v", found, skew.Round(time.Second)), "set this node's clock (NTP)"}
	}
	return finding{check, ok, found + ", and its clock is ours", ""}
}
