package master

import (
	"context"
	"path"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/larderfs/larder/cacheworker/telemetry"
	"github.com/larderfs/larder/master/registry"
)

// Metrics are a master's.
var Metrics = []telemetry.Metric{
	{Name: "larder_master_call_seconds", Help: "Duration of calls, by method and gRPC code.", Labels: []string{"method", "code"}, Histogram: true},
	{Name: "larder_master_workers", Help: "Workers whose lease holds."},
	{Name: "larder_master_volumes", Help: "Volumes provisioned."},
	{Name: "larder_master_mounts", Help: "Mounts of the namespace."},
	{Name: "larder_master_store_up", Help: "Whether etcd answers: 0 if it does not, and most others are missing, else 1."},
	{Name: "larder_master_store_bytes", Help: "Size of etcd's data base."},
}

// gatherer adds what the embedded etcd, and the process, tell about themselves: they use
// the default registry, whether we like it or not.
func (m *Master) gatherer() prometheus.Gatherer {
	return prometheus.Gatherers{m.cfg.Metrics, prometheus.DefaultGatherer}
}

// calls are timed, by method and code.
type calls struct{ took telemetry.Latencies }

func (c *calls) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	start := time.Now()
	resp, err := handle(ctx, req)
	c.took.With(path.Base(info.FullMethod), status.Code(err).String()).Since(start)
	return resp, err
}

// collector asks the store at each scrape.
func collector(reg *registry.Registry, c *calls) prometheus.Collector {
	return telemetry.NewCollector(Metrics, func(s telemetry.Scrape) {
		s.Latencies("larder_master_call_seconds", &c.took)
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		st, err := reg.Status(ctx)
		s.Is("larder_master_store_up", err == nil)
		if err != nil {
			return
		}
		s.Set("larder_master_workers", float64(st.Workers))
		s.Set("larder_master_volumes", float64(st.Volumes))
		s.Set("larder_master_mounts", float64(st.Mounts))
		s.Set("larder_master_store_bytes", float64(st.StoreBytes))
	})
}
