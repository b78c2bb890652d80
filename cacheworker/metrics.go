package cacheworker

import (
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/fusefs"
	"github.com/larderfs/larder/cacheworker/source"
	"github.com/larderfs/larder/cacheworker/telemetry"
)

// Metrics are a worker's.
var Metrics = []telemetry.Metric{
	{Name: "larder_cache_bytes", Help: "Bytes of chunks in live cache files."},
	{Name: "larder_cache_disk_bytes", Help: "Bytes of the cache's file system that are taken: live files, room for what is being written, and evicted files that somebody still holds."},
	{Name: "larder_cache_unlinked_bytes", Help: "Bytes of evicted files that somebody still holds."},
	{Name: "larder_cache_capacity_bytes", Help: "Bytes that the cache may use."},
	{Name: "larder_cache_objects", Help: "Objects with a cache file."},
	{Name: "larder_cache_complete_objects", Help: "Objects that are complete and verified."},
	{Name: "larder_cache_leased_objects", Help: "Objects that somebody reads or may read by a descriptor: eviction passes over them."},
	{Name: "larder_cache_healthy", Help: "Whether the cache's disk takes what is written: 0 if it has refused something within the last minute, else 1."},
	{Name: "larder_cache_reading_index", Help: "Whether the index is being read, after a start: 1 while the cache has more than the other metrics say, else 0."},
	{Name: "larder_cache_unverified_bytes", Help: "Bytes cached before the machine started and not checked since: they are in the background, and before their first use."},
	{Name: "larder_cache_scrubbed_bytes_total", Help: "Bytes that were checked in the background."},
	{Name: "larder_cache_bad_chunks_total", Help: "Chunks that were not what their sum says, or could not be read: readers got their bytes from the store."},
	{Name: "larder_cache_errors_total", Help: "Writes that the cache's file system or its index refused. The log has the first of a row."},
	{Name: "larder_cache_rejected_total", Help: "Objects and chunks for which the cache had no room."},
	{Name: "larder_cache_evictions_total", Help: "Objects evicted."},
	{Name: "larder_cache_evicted_bytes_total", Help: "Bytes of chunks evicted."},
	{Name: "larder_cache_expired_bytes_total", Help: "Bytes of those that were freed because the ttl of a mount had ended."},

	{Name: "larder_tier_capacity_bytes", Help: "Bytes that a tier may use; tiers are numbered as they are given.", Labels: tierLabels},
	{Name: "larder_tier_disk_bytes", Help: "Bytes of its file system that it takes, as larder_cache_disk_bytes.", Labels: tierLabels},
	{Name: "larder_tier_healthy", Help: "Whether it is open, and its disk takes what is written: 1 or 0.", Labels: tierLabels},
	{Name: "larder_tier_evicted_bytes_total", Help: "Bytes of chunks evicted from it, or moved to another.", Labels: tierLabels},
	{Name: "larder_tier_received_bytes_total", Help: "Bytes moved to it from other tiers.", Labels: tierLabels},

	{Name: "larder_read_bytes_total", Help: "Bytes given to readers by the worker, by where they came from: disk (a cache file), memory (fetched and not on the disk), store (the reader waited for them). What the kernel reads in passthrough, or has in its page cache, nobody counts.", Labels: []string{"from"}},
	{Name: "larder_chunks_total", Help: "Chunks that reads touched, by where they were: cache, store.", Labels: []string{"from"}},
	{Name: "larder_volume_read_bytes_total", Help: "The same as larder_read_bytes_total by the volume's claim. An inline volume has a namespace only; claims beyond the first 100 of a worker are other.", Labels: []string{"namespace", "claim", "from"}},
	{Name: "larder_volume_chunks_total", Help: "The same as larder_chunks_total by the volume's claim.", Labels: []string{"namespace", "claim", "from"}},
	{Name: "larder_volume_store_bytes_total", Help: "Bytes fetched from under stores by the claim of the volume that asked first.", Labels: []string{"namespace", "claim"}},
	{Name: "larder_volume_passthrough_opened_bytes_total", Help: "Sizes of files opened in passthrough by the volume's claim: the most that can have been read so without the page cache's help.", Labels: []string{"namespace", "claim"}},

	{Name: "larder_fuse_reads_total", Help: "FUSE READ requests that reached the worker: those in passthrough and from the page cache do not."},
	{Name: "larder_fuse_read_bytes_total", Help: "Bytes of their answers."},
	{Name: "larder_fuse_opens_total", Help: "Files opened, by how they are read: passthrough (by the kernel), cached (by the worker, and the page cache), direct (by the worker, because the passthrough that was due failed).", Labels: []string{"mode"}},
	{Name: "larder_fuse_passthrough_opened_bytes_total", Help: "Sizes of the files opened in passthrough: what is read of them nobody tells."},
	{Name: "larder_fuse_readahead_declined_total", Help: "READs of the kernel's read-ahead beyond the columns that are read, which were not answered. Nobody sees an error: whoever wants the bytes asks again."},
	{Name: "larder_fuse_stale_opens_total", Help: "Opens after which the kernel looked the name up again, because it leads to something else now."},
	{Name: "larder_fuse_request_seconds", Help: "Time to answer FUSE requests; of reads only those that the cache file did not answer at once.", Labels: []string{"op"}, Histogram: true},
	{Name: "larder_fuse_errors_total", Help: "FUSE requests that the store or the cache failed, by what the reader was told.", Labels: []string{"errno"}},

	{Name: "larder_store_requests_total", Help: "Requests to under stores: list, head, get. Retries are included.", Labels: []string{"kind"}},
	{Name: "larder_store_request_seconds", Help: "Time to the header of the answer, by how the request ended: ok, absent, refused (the credential, or the request), trouble (5xx, 429), noanswer.", Labels: []string{"kind", "outcome"}, Histogram: true},
	{Name: "larder_store_bytes_total", Help: "Bytes fetched from under stores."},
	{Name: "larder_store_retries_total", Help: "Requests that were sent again."},
	{Name: "larder_store_breaker_trips_total", Help: "Times that a store was left alone because it had failed many times in a row."},
	{Name: "larder_store_breakers_open", Help: "Stores that are left alone now, but for one request at a time that asks whether they are back."},
	{Name: "larder_store_waiting_requests", Help: "Requests that wait for such a store."},
	{Name: "larder_grants_denied_total", Help: "Times that a store refused a credential, whose grants there ended."},
	{Name: "larder_grant_requests_total", Help: "Objects that were here, and for which the store was asked whether a credential may read them."},

	{Name: "larder_fills_total", Help: "Fetches from under stores begun: chunks in a row, by one GET unless it breaks off."},
	{Name: "larder_fills_canceled_total", Help: "Fetches given up because nobody waited for them any more."},
	{Name: "larder_fill_joined_chunks_total", Help: "Chunks for which a reader waited that somebody else had asked for."},
	{Name: "larder_fill_ahead_bytes_total", Help: "Bytes fetched before somebody asked for them: read ahead, or to complete an object."},
	{Name: "larder_fill_ahead_read_bytes_total", Help: "Of those, bytes of chunks that somebody has read since, or whose file was given away, so that nobody can tell."},
	{Name: "larder_fill_ahead_wasted_bytes_total", Help: "Of those, bytes of chunks that were evicted, or dropped from memory, before somebody read them."},
	{Name: "larder_fill_completed_objects_total", Help: "Objects completed in the background."},
	{Name: "larder_fill_in_flight_bytes", Help: "Memory of what is being fetched, and is not on the disk yet."},
	{Name: "larder_fill_in_flight_limit_bytes", Help: "The most of it that there may be."},
	{Name: "larder_fill_waiting", Help: "Fetches that wait for memory, or for another to end."},
	{Name: "larder_fill_unwritten_chunks", Help: "Chunks that were fetched and wait to be written to the disk."},
	{Name: "larder_fill_memory_bytes", Help: "Memory of chunks for which the cache has no room."},
	{Name: "larder_fill_complete_queue_objects", Help: "Objects that wait to be completed in the background."},

	{Name: "larder_metadata_entries", Help: "Names remembered, those included that are known not to be there."},
	{Name: "larder_metadata_answers_total", Help: "Lookups and lists, by where the answer was: memory, store.", Labels: []string{"from"}},
	{Name: "larder_metadata_requests", Help: "Requests for names under way."},
	{Name: "larder_metadata_ahead_requests", Help: "Those of them that nobody waits for yet: pages listed ahead."},
	{Name: "larder_hidden_keys", Help: "Keys that no path can express, in the listings remembered now."},

	{Name: "larder_socket_clients", Help: "Clients connected to domain sockets."},
	{Name: "larder_socket_requests_total", Help: "Their requests."},
	{Name: "larder_socket_descriptors_total", Help: "Descriptors of cache files given to them."},
	{Name: "larder_socket_read_bytes_total", Help: "Bytes given to them in replies."},

	{Name: "larder_mounts", Help: "Mounts served."},
	{Name: "larder_takeovers_total", Help: "Mounts taken over from an earlier worker."},
	{Name: "larder_resent_requests_total", Help: "Requests that an earlier worker had left, and this one has answered."},
}

var tierLabels = []string{"tier", "kind"}

func (w *Worker) collectTiers(s telemetry.Scrape) {
	for i, t := range w.store.Tiers() {
		labels := []string{strconv.Itoa(i), t.Kind.String()}
		s.Set("larder_tier_capacity_bytes", float64(t.CapacityBytes), labels...)
		s.Set("larder_tier_disk_bytes", float64(t.DiskBytes), labels...)
		s.Is("larder_tier_healthy", t.Err == nil && t.Healthy, labels...)
		s.Set("larder_tier_evicted_bytes_total", float64(t.EvictedBytes), labels...)
		s.Set("larder_tier_received_bytes_total", float64(t.ReceivedBytes), labels...)
	}
}

// collect makes metrics of counters that exist anyway.
func (w *Worker) collect(s telemetry.Scrape) {
	w.collectCache(s)
	w.collectTiers(s)
	w.collectReads(s)
	w.collectStore(s)
	w.collectFills(s)
	w.mounts.mu.Lock()
	takeovers, n := w.mounts.takeovers, len(w.mounts.held)
	w.mounts.mu.Unlock()
	s.Set("larder_mounts", float64(n))
	s.Set("larder_takeovers_total", float64(takeovers))
	s.Set("larder_resent_requests_total", float64(w.counters.Resent.Load()))
}

func (w *Worker) collectCache(s telemetry.Scrape) {
	st := w.store.Stats()
	for name, v := range map[string]int64{
		"larder_cache_bytes": st.CachedBytes, "larder_cache_disk_bytes": st.DiskBytes, "larder_cache_unlinked_bytes": st.UnlinkedBytes,
		"larder_cache_capacity_bytes": st.CapacityBytes, "larder_cache_objects": int64(st.Objects),
		"larder_cache_complete_objects": int64(st.CompleteObjects), "larder_cache_leased_objects": int64(st.LeasedObjects),
		"larder_cache_unverified_bytes": st.UnverifiedBytes, "larder_cache_scrubbed_bytes_total": st.ScrubbedBytes,
		"larder_cache_bad_chunks_total": st.BadChunks, "larder_cache_errors_total": st.PutErrors, "larder_cache_rejected_total": st.Rejected,
		"larder_cache_evictions_total": st.Evictions, "larder_cache_evicted_bytes_total": st.EvictedBytes,
		"larder_cache_expired_bytes_total": w.expired.Load(),
	} {
		s.Set(name, float64(v))
	}
	s.Is("larder_cache_healthy", st.Healthy)
	s.Is("larder_cache_reading_index", st.Reading)
}

func (w *Worker) collectReads(s telemetry.Scrape) {
	f, c := w.fills.Stats(), &w.counters
	for from, v := range map[string]uint64{"disk": f.DiskBytes, "memory": f.MemoryBytes, "store": f.StoreBytes} {
		s.Set("larder_read_bytes_total", float64(v), from)
	}
	s.Set("larder_chunks_total", float64(f.HitChunks), "cache")
	s.Set("larder_chunks_total", float64(f.MissChunks), "store")
	for _, a := range w.accounts.all() {
		for from, v := range map[string]uint64{"disk": a.diskBytes, "memory": a.memoryBytes, "store": a.storeBytes} {
			s.Set("larder_volume_read_bytes_total", float64(v), a.namespace, a.name, from)
		}
		s.Set("larder_volume_chunks_total", float64(a.hits), a.namespace, a.name, "cache")
		s.Set("larder_volume_chunks_total", float64(a.misses), a.namespace, a.name, "store")
		s.Set("larder_volume_store_bytes_total", float64(a.fetchedBytes), a.namespace, a.name)
		s.Set("larder_volume_passthrough_opened_bytes_total", float64(a.passedBytes), a.namespace, a.name)
	}
	s.Set("larder_fuse_reads_total", float64(c.Reads.Load()))
	s.Set("larder_fuse_read_bytes_total", float64(c.ReadBytes.Load()))
	for mode, v := range map[string]uint64{"passthrough": c.Passed.Load(), "cached": c.Cached.Load(), "direct": c.Unpassed.Load()} {
		s.Set("larder_fuse_opens_total", float64(v), mode)
	}
	s.Set("larder_fuse_passthrough_opened_bytes_total", float64(c.PassedBytes.Load()))
	s.Set("larder_fuse_readahead_declined_total", float64(c.Declined.Load()))
	s.Set("larder_fuse_stale_opens_total", float64(c.Stale.Load()))
	for i, op := range fusefs.Ops {
		s.Latency("larder_fuse_request_seconds", &c.Took[i], op)
	}
	for errno, v := range c.Failures() {
		s.Set("larder_fuse_errors_total", float64(v), errno)
	}
	s.Set("larder_socket_clients", float64(w.sockets.Clients.Load()))
	s.Set("larder_socket_requests_total", float64(w.sockets.Requests.Load()))
	s.Set("larder_socket_descriptors_total", float64(w.sockets.Descriptors.Load()))
	s.Set("larder_socket_read_bytes_total", float64(w.sockets.ReadBytes.Load()))
}

func (w *Worker) collectStore(s telemetry.Scrape) {
	r := &w.requests
	s.Set("larder_store_requests_total", float64(r.Lists.Load()), string(source.List))
	s.Set("larder_store_requests_total", float64(r.Heads.Load()), string(source.Head))
	s.Set("larder_store_requests_total", float64(r.Gets.Load()), string(source.Get))
	s.Set("larder_store_bytes_total", float64(r.Bytes.Load()))
	for _, kind := range source.Kinds {
		for _, how := range source.Outcomes {
			s.Latency("larder_store_request_seconds", r.Took(kind, how), string(kind), string(how))
		}
	}
	g, open := w.sources.guardStats()
	s.Set("larder_store_retries_total", float64(g.Retries))
	s.Set("larder_store_breaker_trips_total", float64(g.Trips))
	s.Set("larder_store_breakers_open", float64(open))
	s.Set("larder_store_waiting_requests", float64(g.Waiting))
	md := w.metadata.Stats()
	s.Set("larder_metadata_entries", float64(md.Entries))
	s.Set("larder_metadata_answers_total", float64(md.Hits), "memory")
	s.Set("larder_metadata_answers_total", float64(md.Misses), "store")
	s.Set("larder_metadata_requests", float64(md.Flights))
	s.Set("larder_metadata_ahead_requests", float64(md.AheadFlights))
	s.Set("larder_hidden_keys", float64(md.Hidden))
}

func (w *Worker) collectFills(s telemetry.Scrape) {
	f := w.fills.Stats()
	for name, v := range map[string]uint64{
		"larder_grants_denied_total": f.Denied, "larder_grant_requests_total": f.Heads,
		"larder_fills_total": f.Gets, "larder_fills_canceled_total": f.Canceled, "larder_fill_joined_chunks_total": f.Joined,
		"larder_fill_ahead_bytes_total": f.AheadBytes, "larder_fill_ahead_read_bytes_total": f.ForeseenBytes,
		"larder_fill_ahead_wasted_bytes_total": f.WastedBytes, "larder_fill_completed_objects_total": f.Completed,
	} {
		s.Set(name, float64(v))
	}
	for name, v := range map[string]int64{
		"larder_fill_in_flight_bytes": f.InFlightBytes, "larder_fill_in_flight_limit_bytes": f.InFlightLimit,
		"larder_fill_waiting": int64(f.Waiting), "larder_fill_unwritten_chunks": f.Unwritten,
		"larder_fill_memory_bytes": f.MemoryHeld, "larder_fill_complete_queue_objects": int64(f.CompletesQueue),
	} {
		s.Set(name, float64(v))
	}
}

func (w *Worker) serveMetrics(ctx context.Context) error {
	ready := w.mounts.ready
	if w.cfg.Alone != nil {
		ready = w.readyAlone
	}
	reg := telemetry.NewRegistry(telemetry.NewCollector(Metrics, w.collect), telemetry.Info("worker", w.cfg.Version))
	return ServeMetrics(ctx, w.cfg.MetricsListen, reg, telemetry.Probes{Ready: ready})
}

func (w *Worker) serveProfiles(ctx context.Context) error { return ServeProfiles(ctx, w.cfg.Profiles) }

// ServeMetrics serves /metrics, /healthz and /readyz at "host:port" or "unix:///path", or nowhere, until ctx ends.
func ServeMetrics(ctx context.Context, addr string, g prometheus.Gatherer, p telemetry.Probes) error {
	return serveHTTP(ctx, "metrics", addr, func(l net.Listener) error { return telemetry.Serve(ctx, l, telemetry.Handler(g, p)) })
}

// ServeProfiles serves /debug/pprof/, as ServeMetrics does.
func ServeProfiles(ctx context.Context, addr string) error {
	return serveHTTP(ctx, "pprof", addr, func(l net.Listener) error { return telemetry.Serve(ctx, l, telemetry.Profiles()) })
}

func serveHTTP(ctx context.Context, what, addr string, serve func(net.Listener) error) error {
	if addr == "" {
		return nil
	}
	var l net.Listener
	var err error
	if path, ok := strings.CutPrefix(addr, "unix://"); ok {
		l, err = brokerwire.ListenStream(path, 0o660)
		defer os.Remove(path)
	} else {
		l, err = new(net.ListenConfig).Listen(ctx, "tcp", addr)
	}
	if err == nil {
		err = serve(l)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}
