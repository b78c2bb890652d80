package broker

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

var (
	descHeld      = prometheus.NewDesc("larder_broker_mounts", "FUSE mounts held.", nil, nil)
	descServed    = prometheus.NewDesc("larder_broker_served_mounts", "Mounts that a worker answers now.", nil, nil)
	descTakeovers = prometheus.NewDesc("larder_broker_takeovers_total", "Mounts given to a worker after the first.", nil, nil)
	descStall     = prometheus.NewDesc("larder_broker_takeover_stall_seconds_total", "Time that mounts were without a worker before it.", nil, nil)
)

// Describe implements prometheus.Collector.
func (b *Broker) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(b, ch) }

// Collect implements prometheus.Collector.
func (b *Broker) Collect(ch chan<- prometheus.Metric) {
	held, served := b.list(), 0
	for _, m := range held {
		if m.Served {
			served++
		}
	}
	ch <- prometheus.MustNewConstMetric(descHeld, prometheus.GaugeValue, float64(len(held)))
	ch <- prometheus.MustNewConstMetric(descServed, prometheus.GaugeValue, float64(served))
	ch <- prometheus.MustNewConstMetric(descTakeovers, prometheus.CounterValue, float64(b.takeovers.Load()))
	ch <- prometheus.MustNewConstMetric(descStall, prometheus.CounterValue, time.Duration(b.stalled.Load()).Seconds())
}
