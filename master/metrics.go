package master

import (
	"context"
	"path"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/larderfs/larder/master/registry"
)

// gatherer adds what the embedded etcd, and the process, tell about themselves: they use
// the default registry, whether we like it or not.
func (m *Master) gatherer() prometheus.Gatherer {
	return prometheus.Gatherers{m.cfg.Metrics, prometheus.DefaultGatherer}
}

type callMetrics struct {
	total   *prometheus.CounterVec
	seconds *prometheus.HistogramVec
}

func newCallMetrics() callMetrics {
	return callMetrics{
		total: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "larder_master_calls_total", Help: "Calls answered, by method and gRPC code.",
		}, []string{"method", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "larder_master_call_seconds", Help: "Duration of calls.", Buckets: prometheus.ExponentialBuckets(0.0005, 4, 8),
		}, []string{"method"}),
	}
}

func (c callMetrics) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	start := time.Now()
	resp, err := handle(ctx, req)
	method := path.Base(info.FullMethod)
	c.total.WithLabelValues(method, status.Code(err).String()).Inc()
	c.seconds.WithLabelValues(method).Observe(time.Since(start).Seconds())
	return resp, err
}

// stateCollector asks the store at each scrape.
type stateCollector struct{ reg *registry.Registry }

var (
	workersDesc = prometheus.NewDesc("larder_master_workers", "Workers whose lease holds.", nil, nil)
	volumesDesc = prometheus.NewDesc("larder_master_volumes", "Volumes provisioned.", nil, nil)
	mountsDesc  = prometheus.NewDesc("larder_master_mounts", "Mounts of the namespace.", nil, nil)
	storeDesc   = prometheus.NewDesc("larder_master_store_bytes", "Size of etcd's data base.", nil, nil)
	upDesc      = prometheus.NewDesc("larder_master_store_up", "Whether etcd answers.", nil, nil)
)

func (stateCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{workersDesc, volumesDesc, mountsDesc, storeDesc, upDesc} {
		ch <- d
	}
}

func (s stateCollector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	st, err := s.reg.Status(ctx)
	up := 0.0
	if err == nil {
		up = 1
		ch <- prometheus.MustNewConstMetric(workersDesc, prometheus.GaugeValue, float64(st.Workers))
		ch <- prometheus.MustNewConstMetric(volumesDesc, prometheus.GaugeValue, float64(st.Volumes))
		ch <- prometheus.MustNewConstMetric(mountsDesc, prometheus.GaugeValue, float64(st.Mounts))
		ch <- prometheus.MustNewConstMetric(storeDesc, prometheus.GaugeValue, float64(st.StoreBytes))
	}
	ch <- prometheus.MustNewConstMetric(upDesc, prometheus.GaugeValue, up)
}
