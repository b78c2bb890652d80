package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/workerpb"
)

// nodeStatus is what `larder status -o json` prints. Fields are added, never changed.
type nodeStatus struct {
	UUID          string `json:"uuid"` // of the worker
	Version       string `json:"version"`
	PID           int64  `json:"pid,omitempty"`       // of the worker, in its own PID namespace
	BrokerPID     int    `json:"brokerPid,omitempty"` // in its own
	CachedBytes   int64  `json:"cachedBytes"`
	UnlinkedBytes int64  `json:"unlinkedBytes"`
	CapacityBytes int64  `json:"capacityBytes"`
	Objects       int64  `json:"objects"`
	Complete      int64  `json:"completeObjects"`
	ReadRequests  uint64 `json:"readRequests"` // FUSE READs that reached the worker
	ReadBytes     uint64 `json:"readBytes"`
	FetchedBytes  uint64 `json:"fetchedBytes"`
	AheadBytes    uint64 `json:"aheadBytes"`       // of them, before anybody asked
	AheadRead     uint64 `json:"aheadReadBytes"`   // of those, read since
	AheadWasted   uint64 `json:"aheadWastedBytes"` // of those, evicted or dropped before that
	ListRequests  uint64 `json:"listRequests"`
	HeadRequests  uint64 `json:"headRequests"`
	GetRequests   uint64 `json:"getRequests"`
	EvictedBytes  uint64 `json:"evictedBytes"`
	Takeovers     int    `json:"takeovers"`      // of the mounts below
	Resent        uint64 `json:"resentRequests"` // that an earlier worker had left, and this one has answered

	ReadingIndex    bool   `json:"readingIndex,omitempty"`    // what is cached is not known to its end yet
	UnverifiedBytes int64  `json:"unverifiedBytes,omitempty"` // of cachedBytes, from before the machine started
	BadChunks       uint64 `json:"badChunks,omitempty"`
	CacheErrors     uint64 `json:"cacheErrors,omitempty"` // writes that the disk refused

	Started time.Time `json:"started,omitzero"` // of the worker

	Tiers    []tierStatus    `json:"tiers,omitempty"` // fastest first
	Mounts   []mountStatus   `json:"mounts"`
	Features []featureStatus `json:"features"`
	Errors   []string        `json:"errors,omitempty"` // what could not be asked
}

type tierStatus struct {
	Dir           string `json:"dir"`
	Kind          string `json:"kind"` // MEM, SSD, HDD
	Healthy       bool   `json:"healthy"`
	CachedBytes   int64  `json:"cachedBytes"`
	UnlinkedBytes int64  `json:"unlinkedBytes"`
	CapacityBytes int64  `json:"capacityBytes"`
	PinnedBytes   int64  `json:"pinnedBytes"`
	Objects       int64  `json:"objects"`
	EvictedBytes  uint64 `json:"evictedBytes"`
	ReceivedBytes uint64 `json:"receivedBytes"`   // from other tiers
	Error         string `json:"error,omitempty"` // why it could not be opened
}

type mountStatus struct {
	Volume    string    `json:"volume"`
	Path      string    `json:"path"`
	Source    string    `json:"source"`
	Since     time.Time `json:"since"`
	Served    bool      `json:"served"`
	Takeovers int       `json:"takeovers"`
	OpenFiles uint64    `json:"openFiles"`
	Nodes     uint64    `json:"nodes"`

	Worker              string    `json:"worker,omitempty"`     // UUID of the one that serves it
	WorkerPID           int64     `json:"workerPid,omitempty"`  // as the broker sees it, or as it says itself
	WorkerSince         time.Time `json:"workerSince,omitzero"` // since when it does, or since when none does
	LongestStallSeconds float64   `json:"longestStallSeconds"`  // without a worker, before a take-over
	Without             []string  `json:"without,omitempty"`    // which guarantees are weaker: resend, passthrough
}

type featureStatus struct {
	Name      string `json:"name"`
	Available bool   `json:"available"`
	Reason    string `json:"reason,omitempty"`
}

func statusCommand() *cobra.Command {
	var dir, run string
	var o output
	cmd := &cobra.Command{
		Use: "status", Short: "Show the node's cache, mounts and processes", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.check(); err != nil {
				return err
			}
			if run == "" {
				run = filepath.Join(dir, "run")
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), 5*time.Second)
			defer cancel()
			s, err := askStatus(ctx, run)
			if err != nil {
				return err
			}
			return o.print(cmd.OutOrStdout(), s, s.print)
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "/var/lib/larder", "the --dir of larder up")
	cmd.Flags().StringVar(&run, "run-dir", "", "the --run-dir of larder worker and csi node, instead of --dir")
	o.flags(cmd)
	return cmd
}

// askStatus asks worker and broker; one that is away is noted, both is an error.
func askStatus(ctx context.Context, run string) (nodeStatus, error) {
	w, werr := askWorker(ctx, run)
	pid, mounts, berr := askBroker(ctx, run)
	if werr != nil && berr != nil {
		return nodeStatus{}, fmt.Errorf("no larder answers in %s: is it running there?\n%w", run, errors.Join(werr, berr))
	}
	s := newStatus(w, pid, mounts)
	for _, err := range []error{werr, berr} {
		if err != nil {
			s.Errors = append(s.Errors, err.Error())
		}
	}
	return s, nil
}

// newStatus joins what worker and broker say; the worker may be nil.
func newStatus(w *workerpb.WorkerStatus, brokerPID int, mounts []brokerwire.Mount) nodeStatus {
	s := nodeStatus{BrokerPID: brokerPID, Mounts: []mountStatus{}, Features: []featureStatus{}}
	volumes := map[string]*workerpb.VolumeStatus{}
	if w != nil {
		s.UUID, s.Version, s.PID, s.Started = w.GetUuid(), w.GetVersion(), w.GetPid(), w.GetStarted().AsTime()
		s.Resent = w.GetResentRequests()
		s.CachedBytes, s.UnlinkedBytes, s.CapacityBytes = w.GetCachedBytes(), w.GetUnlinkedBytes(), w.GetCapacityBytes()
		s.Objects, s.Complete = w.GetObjects(), w.GetCompleteObjects()
		s.ReadRequests, s.ReadBytes, s.FetchedBytes = w.GetReadRequests(), w.GetReadBytes(), w.GetFetchedBytes()
		s.AheadBytes, s.AheadRead, s.AheadWasted = w.GetAheadBytes(), w.GetAheadReadBytes(), w.GetAheadWastedBytes()
		s.ListRequests, s.HeadRequests, s.GetRequests = w.GetListRequests(), w.GetHeadRequests(), w.GetGetRequests()
		s.EvictedBytes = w.GetEvictedBytes()
		s.ReadingIndex, s.UnverifiedBytes = w.GetReadingIndex(), w.GetUnverifiedBytes()
		s.BadChunks, s.CacheErrors = w.GetBadChunks(), w.GetCacheErrors()
		for _, t := range w.GetTiers() {
			s.Tiers = append(s.Tiers, tierStatus{
				Dir: t.GetDir(), Kind: t.GetKind(), Healthy: t.GetHealthy(), CachedBytes: t.GetCachedBytes(), UnlinkedBytes: t.GetUnlinkedBytes(),
				CapacityBytes: t.GetCapacityBytes(), PinnedBytes: t.GetPinnedBytes(), Objects: t.GetObjects(),
				EvictedBytes: t.GetEvictedBytes(), ReceivedBytes: t.GetReceivedBytes(), Error: t.GetError(),
			})
		}
		for _, f := range w.GetFeatures() {
			s.Features = append(s.Features, featureStatus{f.GetName(), f.GetAvailable(), f.GetReason()})
		}
		for _, v := range w.GetVolumes() {
			volumes[v.GetVolumeId()] = v
		}
	}
	for _, m := range mounts {
		v := volumes[m.VolumeID]
		s.Takeovers += m.Takeovers
		pid := int64(m.WorkerPID)
		if pid == 0 && m.Worker == s.UUID {
			pid = s.PID
		}
		without := slices.Concat(m.Without, v.GetWithout())
		slices.Sort(without)
		s.Mounts = append(s.Mounts, mountStatus{Volume: m.VolumeID, Path: m.Path, Source: m.Volume.Source, Since: m.Since, Served: m.Served,
			Takeovers: m.Takeovers, OpenFiles: v.GetOpenHandles(), Nodes: v.GetNodes(), Worker: m.Worker, WorkerPID: pid,
			WorkerSince: m.WorkerSince, LongestStallSeconds: m.LongestStall.Seconds(), Without: slices.Compact(without)})
	}
	slices.SortFunc(s.Mounts, func(a, b mountStatus) int { return strings.Compare(a.Volume, b.Volume) })
	return s
}

func askWorker(ctx context.Context, run string) (*workerpb.WorkerStatus, error) {
	conn, err := dialUnix(filepath.Join(run, controlSocket))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	w, err := workerpb.NewWorkerClient(conn).Status(ctx, &workerpb.StatusRequest{})
	if err != nil {
		return nil, fmt.Errorf("worker: %w", err)
	}
	return w, nil
}

func askBroker(ctx context.Context, run string) (pid int, held []brokerwire.Mount, err error) {
	c := brokerwire.NewClient(filepath.Join(run, brokerSocket))
	defer c.Close()
	return c.Broker(ctx)
}

func (s nodeStatus) print(out io.Writer) error {
	if s.UUID != "" {
		fmt.Fprintf(out, "worker   %s (%s), pid %d, since %s\n", s.UUID, s.Version, s.PID, date(s.Started))
	}
	if s.BrokerPID != 0 {
		fmt.Fprintf(out, "broker   pid %d\n", s.BrokerPID)
	}
	if s.UUID != "" {
		s.printCache(out)
	}
	for _, f := range s.Features {
		if !f.Available {
			fmt.Fprintf(out, "without  %s: %s\n", f.Name, f.Reason)
		}
	}
	for _, e := range s.Errors {
		fmt.Fprintf(out, "error    %s\n", e)
	}
	return s.printMounts(out)
}

func (s nodeStatus) printCache(out io.Writer) {
	fmt.Fprintf(out, "cached   %s of %s in %d objects, %d complete\n", bytes(s.CachedBytes), bytes(s.CapacityBytes), s.Objects, s.Complete)
	s.printTiers(out)
	if s.ReadingIndex {
		fmt.Fprintln(out, "index    being read: there is more in the cache than this")
	}
	if s.UnverifiedBytes > 0 {
		fmt.Fprintf(out, "verified %s of %s; the rest is from before the machine started, and checked before its first use\n",
			bytes(s.CachedBytes-s.UnverifiedBytes), bytes(s.CachedBytes))
	}
	if s.BadChunks > 0 || s.CacheErrors > 0 {
		fmt.Fprintf(out, "disk     %d bad chunks, fetched again; %d writes refused\n", s.BadChunks, s.CacheErrors)
	}
	fmt.Fprintf(out, "reads    %d reached the worker, %s fetched from under stores\n", s.ReadRequests, bytes(int64(s.FetchedBytes)))
	fmt.Fprintf(out, "ahead    %s of that before anybody asked, %s of it read since, %s evicted unread\n",
		bytes(int64(s.AheadBytes)), bytes(int64(s.AheadRead)), bytes(int64(s.AheadWasted)))
	fmt.Fprintf(out, "resent   %d requests that an earlier worker had left\n", s.Resent)
}

// printTiers has a line for each of several tiers.
func (s nodeStatus) printTiers(out io.Writer) {
	if len(s.Tiers) < 2 {
		return
	}
	for _, t := range s.Tiers {
		state := ""
		switch {
		case t.Error != "":
			state = ", not used: " + t.Error
		case !t.Healthy:
			state = ", refuses to be written"
		}
		fmt.Fprintf(out, "%-8s %s of %s in %d objects, %s pinned, %s moved in, %s evicted: %s%s\n", t.Kind, bytes(t.CachedBytes), bytes(t.CapacityBytes),
			t.Objects, bytes(t.PinnedBytes), bytes(int64(t.ReceivedBytes)), bytes(int64(t.EvictedBytes)), t.Dir, state)
	}
}

func (s nodeStatus) printMounts(out io.Writer) error {
	if len(s.Mounts) == 0 {
		return nil
	}
	fmt.Fprintln(out)
	t := newTable(out)
	fmt.Fprintln(t, "VOLUME\tSOURCE\tWORKER\tSINCE\tTAKEOVERS\tLONGEST STALL\tWITHOUT\tOPEN\tMOUNTED\tPATH")
	for _, m := range s.Mounts {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%s\t%s\t%d\t%s\t%s\n", m.Volume, m.Source, m.holder(), date(m.WorkerSince), m.Takeovers,
			stall(m.LongestStallSeconds), orDash(strings.Join(m.Without, ",")), m.OpenFiles, date(m.Since), m.Path)
	}
	return t.Flush()
}

// holder is the worker of a mount, in brief.
func (m mountStatus) holder() string {
	if !m.Served {
		return "none"
	}
	return fmt.Sprintf("%s pid %d", short(m.Worker), m.WorkerPID)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func stall(seconds float64) string {
	return time.Duration(seconds * float64(time.Second)).Round(time.Millisecond).String()
}

func date(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func bytes(n int64) string {
	for _, u := range []struct {
		name string
		size int64
	}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}} {
		if n >= u.size {
			return fmt.Sprintf("%.1f %s", float64(n)/float64(u.size), u.name)
		}
	}
	return fmt.Sprintf("%d B", n)
}
