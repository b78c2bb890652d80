package driver

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/larderfs/larder/cacheworker/telemetry"
)

// Metrics are those of a CSI service.
var Metrics = []telemetry.Metric{
	{Name: "larder_csi_call_seconds", Help: "Duration of CSI calls, by method and gRPC code.", Labels: []string{"method", "code"}, Histogram: true},
	{Name: "larder_csi_calls_in_flight", Help: "CSI calls under way."},
	{Name: "larder_csi_lost_mounts_total", Help: "Mounts that were given up or found dead: their pods have to be started again."},
}

// counters are what a server counts.
type counters struct {
	took     telemetry.Latencies // by method and code
	inFlight atomic.Int64
	lost     atomic.Int64
}

// Collector has the metrics of the server.
func (s *Server) Collector() prometheus.Collector {
	return telemetry.NewCollector(Metrics, func(sc telemetry.Scrape) {
		sc.Latencies("larder_csi_call_seconds", &s.counters.took)
		sc.Set("larder_csi_calls_in_flight", float64(s.counters.inFlight.Load()))
		sc.Set("larder_csi_lost_mounts_total", float64(s.counters.lost.Load()))
	})
}
