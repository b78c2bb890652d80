package cacheworker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/workerpb"
)

func isGone(err error) bool {
	return errors.Is(err, object.ErrChanged) || errors.Is(err, object.ErrNotFound)
}

// control answers what is asked about the worker itself.
type control struct {
	workerpb.UnimplementedWorkerServer
	w *Worker
}

// serveControl leaves the socket's file when it ends: at a hand-over it is the next worker's by then.
func serveControl(ctx context.Context, l net.Listener, w *Worker) error {
	s := grpc.NewServer()
	workerpb.RegisterWorkerServer(s, control{w: w})
	defer context.AfterFunc(ctx, s.Stop)()
	if err := s.Serve(identified{l}); err != nil && ctx.Err() == nil {
		return fmt.Errorf("control socket: %w", err)
	}
	return nil
}

// Status implements workerpb.WorkerServer.
func (c control) Status(context.Context, *workerpb.StatusRequest) (*workerpb.WorkerStatus, error) {
	w := c.w
	s, f, r := w.store.Stats(), w.fills.Stats(), &w.requests
	out := &workerpb.WorkerStatus{
		Uuid: w.store.UUID().String(), Version: w.cfg.Version, Pid: int64(os.Getpid()), Started: timestamppb.New(w.started),
		CachedBytes: s.CachedBytes, UnlinkedBytes: s.UnlinkedBytes, CapacityBytes: s.CapacityBytes,
		Objects: int64(s.Objects), CompleteObjects: int64(s.CompleteObjects),
		ReadRequests: w.counters.Reads.Load(), ReadBytes: w.counters.ReadBytes.Load(),
		HitChunks: uint64(f.HitChunks), MissChunks: uint64(f.MissChunks), FetchedBytes: uint64(r.Bytes.Load()),
		ListRequests: uint64(r.Lists.Load()), HeadRequests: uint64(r.Heads.Load()), GetRequests: uint64(r.Gets.Load()),
		Evictions: uint64(s.Evictions), EvictedBytes: uint64(s.EvictedBytes), ResentRequests: w.counters.Resent.Load(),
		ReadingIndex: s.Reading, UnverifiedBytes: s.UnverifiedBytes, BadChunks: uint64(s.BadChunks), CacheErrors: uint64(s.PutErrors),
	}
	w.mounts.mu.Lock()
	out.Takeovers = w.mounts.takeovers
	w.mounts.mu.Unlock()
	pass, resend := !w.cfg.Features.NoPassthrough && w.cfg.ViewDir != "", !w.cfg.Features.NoResend
	for id, h := range w.mounts.all() {
		out.Volumes = append(out.Volumes, volumeStatus(id, h))
		pass, resend = pass && h.Passthrough(), resend && h.Resend()
	}
	out.Features = []*workerpb.Feature{
		{Name: "passthrough", Available: pass, Reason: reason(pass, "the kernel (6.9 or later), --view, or a flag")},
		{Name: "resend", Available: resend, Reason: reason(resend, "the kernel (6.9 or later), or a flag")},
		{Name: "splice", Available: !w.cfg.Features.NoSplice, Reason: reason(!w.cfg.Features.NoSplice, "a flag")},
	}
	return out, nil
}

func reason(available bool, lacks string) string {
	if available {
		return ""
	}
	return "not offered by " + lacks
}

const troubleFresh = time.Minute // a failure that is older says nothing of now

func volumeStatus(id string, h *held) *workerpb.VolumeStatus {
	nodes, open := h.Stats()
	trouble := h.Trouble(troubleFresh)
	out := &workerpb.VolumeStatus{VolumeId: id, Healthy: trouble == "", Condition: trouble, Nodes: uint64(nodes), OpenHandles: uint64(open)}
	if !h.Resend() {
		out.Without = append(out.Without, "resend")
	}
	if !h.Passthrough() {
		out.Without = append(out.Without, "passthrough")
	}
	return out
}

// Volume implements workerpb.WorkerServer.
func (c control) Volume(ctx context.Context, req *workerpb.VolumeRequest) (*workerpb.VolumeStatus, error) {
	h := c.w.mounts.get(req.GetVolumeId())
	if h == nil {
		return nil, status.Errorf(codes.NotFound, "volume %q is not served here", req.GetVolumeId())
	}
	out := volumeStatus(req.GetVolumeId(), h)
	s := c.w.store.Stats()
	out.UsedBytes, out.TotalBytes = s.CachedBytes, s.CapacityBytes
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	out.Healthy, out.Condition = true, "" // it is asked, whatever readers were told
	if err := (socketVolume{c.w.mounts, h}).dataset().Check(ctx); err != nil {
		out.Healthy, out.Condition = false, err.Error()
	}
	return out, nil
}

const healthTimeout = 5 * time.Second

// collector makes metrics of counters that exist anyway.
type collector struct{ w *Worker }

var (
	descCached    = prometheus.NewDesc("larder_cache_bytes", "Bytes of chunks in live cache files.", nil, nil)
	descUnlinked  = prometheus.NewDesc("larder_cache_unlinked_bytes", "Bytes of evicted files that somebody still holds.", nil, nil)
	descCapacity  = prometheus.NewDesc("larder_cache_capacity_bytes", "Bytes that the cache may use.", nil, nil)
	descObjects   = prometheus.NewDesc("larder_cache_objects", "Objects with a cache file.", nil, nil)
	descComplete  = prometheus.NewDesc("larder_cache_complete_objects", "Objects that are complete and verified.", nil, nil)
	descUnchecked = prometheus.NewDesc("larder_cache_unverified_bytes", "Bytes cached before the machine started and not checked since.", nil, nil)
	descReading   = prometheus.NewDesc("larder_cache_reading_index", "1 while the cache's index is read after a start, else 0.", nil, nil)
	descBad       = prometheus.NewDesc("larder_cache_bad_chunks_total", "Chunks that were not what their sum says, or could not be read.", nil, nil)
	descErrors    = prometheus.NewDesc("larder_cache_errors_total", "Writes that the cache's file system or its index refused.", nil, nil)
	descRejected  = prometheus.NewDesc("larder_cache_rejected_total", "Objects and chunks for which the cache had no room.", nil, nil)
	descReads     = prometheus.NewDesc("larder_fuse_reads_total", "FUSE READ requests that reached the worker.", nil, nil)
	descReadBytes = prometheus.NewDesc("larder_fuse_read_bytes_total", "Bytes of their answers.", nil, nil)
	descStale     = prometheus.NewDesc("larder_fuse_stale_opens_total", "Opens answered with ESTALE so that the kernel looks the name up again.", nil, nil)
	descChunks    = prometheus.NewDesc("larder_chunks_total", "Chunks asked for, by where they were.", []string{"from"}, nil)
	descRequests  = prometheus.NewDesc("larder_store_requests_total", "Requests to under stores, by kind.", []string{"kind"}, nil)
	descFetched   = prometheus.NewDesc("larder_store_bytes_total", "Bytes fetched from under stores.", nil, nil)
	descEvicted   = prometheus.NewDesc("larder_cache_evicted_bytes_total", "Bytes evicted.", nil, nil)
	descTakeovers = prometheus.NewDesc("larder_takeovers_total", "Mounts taken over from an earlier worker.", nil, nil)
	descResent    = prometheus.NewDesc("larder_resent_requests_total", "Requests that an earlier worker had left, and this one has answered.", nil, nil)
	descMounts    = prometheus.NewDesc("larder_mounts", "Mounts served.", nil, nil)
	descHidden    = prometheus.NewDesc("larder_hidden_keys", "Keys that no path can express, left out of listings.", nil, nil)
)

// Describe implements prometheus.Collector: the metrics are described by collecting them.
func (c collector) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, ch) }

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	w := c.w
	s, f, md, r := w.store.Stats(), w.fills.Stats(), w.metadata.Stats(), &w.requests
	gauge := func(d *prometheus.Desc, v float64) { ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v) }
	count := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
	}
	gauge(descCached, float64(s.CachedBytes))
	gauge(descUnlinked, float64(s.UnlinkedBytes))
	gauge(descCapacity, float64(s.CapacityBytes))
	gauge(descObjects, float64(s.Objects))
	gauge(descComplete, float64(s.CompleteObjects))
	gauge(descUnchecked, float64(s.UnverifiedBytes))
	gauge(descReading, boolean(s.Reading))
	count(descBad, float64(s.BadChunks))
	count(descErrors, float64(s.PutErrors))
	count(descRejected, float64(s.Rejected))
	gauge(descHidden, float64(md.Hidden))
	count(descReads, float64(w.counters.Reads.Load()))
	count(descReadBytes, float64(w.counters.ReadBytes.Load()))
	count(descStale, float64(w.counters.Stale.Load()))
	count(descChunks, float64(f.HitChunks), "cache")
	count(descChunks, float64(f.MissChunks), "store")
	count(descRequests, float64(r.Lists.Load()), "list")
	count(descRequests, float64(r.Heads.Load()), "head")
	count(descRequests, float64(r.Gets.Load()), "get")
	count(descFetched, float64(r.Bytes.Load()))
	count(descEvicted, float64(s.EvictedBytes))
	w.mounts.mu.Lock()
	takeovers, n := w.mounts.takeovers, len(w.mounts.held)
	w.mounts.mu.Unlock()
	count(descTakeovers, float64(takeovers))
	count(descResent, float64(w.counters.Resent.Load()))
	gauge(descMounts, float64(n))
}

func boolean(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// Probes are what /healthz and /readyz ask; nil is always well.
type Probes struct {
	Live  func(context.Context) error // nil if the process should go on, rather than be started again
	Ready func(context.Context) error // nil if it does its work now
}

// probeTimeout is shorter than the one second that a kubelet waits unless it is told otherwise.
const probeTimeout = 900 * time.Millisecond

func probe(check func(context.Context) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), probeTimeout)
		defer cancel()
		if check != nil {
			if err := check(ctx); err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
				return
			}
		}
		fmt.Fprintln(w, "ok")
	}
}

// ServeMetrics serves /metrics, /healthz and /readyz at "host:port" or "unix:///path" until ctx ends.
func ServeMetrics(ctx context.Context, addr string, g prometheus.Gatherer, p Probes) error {
	var l net.Listener
	var err error
	if path, ok := strings.CutPrefix(addr, "unix://"); ok {
		l, err = brokerwire.ListenStream(path, 0o660)
		defer os.Remove(path)
	} else {
		l, err = net.Listen("tcp", addr)
	}
	if err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(g, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", probe(p.Live))
	mux.HandleFunc("GET /readyz", probe(p.Ready))
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	defer context.AfterFunc(ctx, func() { s.Close() })()
	if err := s.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("metrics: %w", err)
	}
	return nil
}
