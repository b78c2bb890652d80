// Package telemetry is what a process tells those who operate it: metrics, probes, profiles and traces.
//
// A metric exists only where a table of [Metric] has it, so that the reference of all of them is made from
// the tables. No label has more values than are written down here, or bounded by who sets it. A read that the
// cache answers adds to atomics, which a scrape reads, and does nothing else of all this.
package telemetry

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// Metric describes one: the row of a table.
type Metric struct {
	Name      string // that of a counter ends in _total
	Help      string // a sentence that says the unit, if the name does not
	Labels    []string
	Histogram bool // of durations, see [Latency]
}

// Kind is counter, gauge or histogram.
func (m Metric) Kind() string {
	switch {
	case m.Histogram:
		return "histogram"
	case strings.HasSuffix(m.Name, "_total"):
		return "counter"
	}
	return "gauge"
}

// Collector makes the metrics of a table when they are scraped.
type Collector struct {
	metrics map[string]*described
	collect func(Scrape)
}

type described struct {
	Metric
	desc *prometheus.Desc
}

// NewCollector calls collect for each scrape, at most one of which is under way.
func NewCollector(table []Metric, collect func(Scrape)) *Collector {
	c := &Collector{metrics: make(map[string]*described, len(table)), collect: collect}
	for _, m := range table {
		c.metrics[m.Name] = &described{m, prometheus.NewDesc(m.Name, m.Help, m.Labels, nil)}
	}
	return c
}

// Describe implements prometheus.Collector.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, m := range c.metrics {
		ch <- m.desc
	}
}

// Collect implements prometheus.Collector.
func (c *Collector) Collect(ch chan<- prometheus.Metric) { c.collect(Scrape{c, ch}) }

// Scrape takes the values of one scrape.
type Scrape struct {
	c  *Collector
	ch chan<- prometheus.Metric
}

// of panics for what no table has: the first scrape of any test finds that.
func (s Scrape) of(name string) *described {
	m := s.c.metrics[name]
	if m == nil {
		panic("metric " + name + " is in no table")
	}
	return m
}

// Set gives the value of a counter or gauge with these labels.
func (s Scrape) Set(name string, value float64, labels ...string) {
	m, kind := s.of(name), prometheus.GaugeValue
	if m.Kind() == "counter" {
		kind = prometheus.CounterValue
	}
	s.ch <- prometheus.MustNewConstMetric(m.desc, kind, value, labels...)
}

// Is sets 1 or 0.
func (s Scrape) Is(name string, yes bool, labels ...string) {
	value := 0.0
	if yes {
		value = 1
	}
	s.Set(name, value, labels...)
}

// Latency gives a histogram.
func (s Scrape) Latency(name string, l *Latency, labels ...string) {
	counts, count, sum := l.read()
	buckets := make(map[float64]uint64, len(bounds))
	for i, b := range bounds {
		buckets[b.Seconds()] = counts[i]
	}
	s.ch <- prometheus.MustNewConstHistogram(s.of(name).desc, count, sum.Seconds(), buckets, labels...)
}

// Latencies gives one histogram for each pair of labels.
func (s Scrape) Latencies(name string, ls *Latencies) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	for labels, l := range ls.of {
		s.Latency(name, l, labels[0], labels[1])
	}
}

// bounds of all histograms, so that any two can be compared.
var bounds = [...]time.Duration{
	30 * time.Microsecond, 100 * time.Microsecond, 300 * time.Microsecond,
	time.Millisecond, 3 * time.Millisecond, 10 * time.Millisecond, 30 * time.Millisecond, 100 * time.Millisecond, 300 * time.Millisecond,
	time.Second, 3 * time.Second, 10 * time.Second, 30 * time.Second, 100 * time.Second, 300 * time.Second,
}

// Latency is a histogram of durations. The zero value is ready; to observe takes no lock and no memory.
type Latency struct {
	counts [len(bounds) + 1]atomic.Uint64 // not cumulated
	nanos  atomic.Int64
}

// Observe counts one.
func (l *Latency) Observe(d time.Duration) {
	i := 0
	for i < len(bounds) && d > bounds[i] {
		i++
	}
	l.counts[i].Add(1)
	l.nanos.Add(int64(d))
}

// Since observes the time that has passed.
func (l *Latency) Since(start time.Time) { l.Observe(time.Since(start)) }

// read returns the cumulated counts by bound.
func (l *Latency) read() (counts [len(bounds)]uint64, count uint64, sum time.Duration) {
	sum = time.Duration(l.nanos.Load())
	for i := range l.counts {
		count += l.counts[i].Load()
		if i < len(bounds) {
			counts[i] = count
		}
	}
	return counts, count, sum
}

// Count is how many were observed.
func (l *Latency) Count() uint64 { _, n, _ := l.read(); return n }

// Latencies are histograms by two labels, whose values somebody else bounds. The zero value is ready.
type Latencies struct {
	mu sync.Mutex // guards of
	of map[[2]string]*Latency
}

// With is the histogram of these labels.
func (ls *Latencies) With(a, b string) *Latency {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	l := ls.of[[2]string{a, b}]
	if l == nil {
		if ls.of == nil {
			ls.of = map[[2]string]*Latency{}
		}
		l = &Latency{}
		ls.of[[2]string{a, b}] = l
	}
	return l
}

// NewRegistry is of a process: what Go and the kernel know of it, and collectors.
func NewRegistry(more ...prometheus.Collector) *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	r.MustRegister(more...)
	return r
}

// Check reports all that is wrong with a table, by Prometheus' conventions.
func Check(table []Metric) (wrong []string) {
	bad := func(m Metric, format string, args ...any) {
		wrong = append(wrong, m.Name+": "+fmt.Sprintf(format, args...))
	}
	units := []string{"_seconds", "_bytes", "_total"}
	seen := map[string]bool{}
	for _, m := range table {
		if seen[m.Name] {
			bad(m, "is there twice")
		}
		seen[m.Name] = true
		if !strings.HasPrefix(m.Name, "larder_") || strings.ToLower(m.Name) != m.Name {
			bad(m, "is no name in small letters that begins with larder_")
		}
		if m.Histogram && !strings.HasSuffix(m.Name, "_seconds") {
			bad(m, "a histogram of durations ends in _seconds")
		}
		for i, u := range units {
			if at := strings.Index(m.Name, u); at >= 0 && at+len(u) < len(m.Name) && !slices.Contains(units[i+1:], m.Name[at+len(u):]) {
				bad(m, "%s is not at its end", u)
			}
		}
		if !strings.HasSuffix(m.Help, ".") || m.Help[0] < 'A' || m.Help[0] > 'Z' {
			bad(m, "its help is no sentence")
		}
	}
	return wrong
}

// Buckets are the bounds of all histograms, in seconds.
func Buckets() []float64 {
	out := make([]float64, len(bounds))
	for i, b := range bounds {
		out[i] = math.Round(b.Seconds()*1e6) / 1e6
	}
	return out
}

// Metrics are those of every process.
var Metrics = []Metric{
	{Name: "larder_build_info", Help: "Always 1: which process this is, and of which version.", Labels: []string{"process", "version"}},
}

// Info is the one metric of Metrics.
func Info(process, version string) *Collector {
	return NewCollector(Metrics, func(s Scrape) { s.Set("larder_build_info", 1, process, version) })
}
