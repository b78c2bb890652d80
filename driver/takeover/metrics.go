package takeover

import "github.com/prometheus/client_golang/prometheus"

var (
	descHeld      = prometheus.NewDesc("larder_broker_mounts", "FUSE mounts held.", nil, nil)
	descServed    = prometheus.NewDesc("larder_broker_served_mounts", "Mounts that a worker answers now.", nil, nil)
	descTakeovers = prometheus.NewDesc("larder_broker_takeovers_total", "Mounts given to a worker after the first.", nil, nil)
	descStall     = prometheus.NewDesc("larder_broker_takeover_stall_seconds_total", "Time that mounts were without a worker before it.", nil, nil)
)

// Describe implements prometheus.Collector.
func (ms *Mounts) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(ms, ch) }

// Collect implements prometheus.Collector.
func (ms *Mounts) Collect(ch chan<- prometheus.Metric) {
	held := ms.All()
	served := 0
	for _, m := range held {
		if m.served() {
			served++
		}
	}
	ms.mu.Lock()
	takeovers, stalled := ms.takeovers, ms.stalled
	ms.mu.Unlock()
	ch <- prometheus.MustNewConstMetric(descHeld, prometheus.GaugeValue, float64(len(held)))
	ch <- prometheus.MustNewConstMetric(descServed, prometheus.GaugeValue, float64(served))
	ch <- prometheus.MustNewConstMetric(descTakeovers, prometheus.CounterValue, float64(takeovers))
	ch <- prometheus.MustNewConstMetric(descStall, prometheus.CounterValue, stalled.Seconds())
}
