package takeover

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/larderfs/larder/cacheworker/brokerwire"
)

// observed is what is counted since the start.
type observed struct {
	stalls  prometheus.Histogram // one observation a take-over
	givenUp prometheus.Counter
}

func observe() observed {
	return observed{
		prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "larder_broker_takeover_stall_seconds", Help: "Time that a mount was without a worker before one took it over.",
			Buckets: []float64{.001, .01, .03, .1, .3, 1, 3, 10, 30, 100, 300},
		}),
		prometheus.NewCounter(prometheus.CounterOpts{
			Name: "larder_broker_given_up_mounts_total", Help: "Mounts that no worker took over in time: their pods had to be restarted.",
		}),
	}
}

var (
	descHeld   = prometheus.NewDesc("larder_broker_mounts", "FUSE mounts held.", nil, nil)
	descServed = prometheus.NewDesc("larder_broker_served_mounts", "Mounts that a worker answers now.", nil, nil)
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
	ch <- prometheus.MustNewConstMetric(descHeld, prometheus.GaugeValue, float64(len(held)))
	ch <- prometheus.MustNewConstMetric(descServed, prometheus.GaugeValue, float64(served))
	ms.stalls.Collect(ch)
	ms.givenUp.Collect(ch)
}

// tookOver notes that a worker serves a mount that another one served.
func (ms *Mounts) tookOver(m *Mount, s *brokerwire.Session, stall time.Duration) error {
	ms.stalls.Observe(stall.Seconds())
	ms.cfg.Log.Info("take-over", "volume", m.ID, "worker", s.UUID, "pid", s.PID, "stall", stall)
	return m.Record.Update(func(st *brokerwire.State) {
		st.Takeovers++
		st.LongestStall = max(st.LongestStall, stall)
	})
}

// takenBy notes who serves the mount now, and says how long nobody did. Requires m.mu.
func (m *Mount) takenBy(s *brokerwire.Session) (stall time.Duration) {
	now := time.Now()
	if m.server == nil && !m.lost.IsZero() {
		stall = now.Sub(m.lost)
	}
	m.server, m.since = s, now
	return stall
}

func (m *Mount) info() brokerwire.Mount {
	st := m.Record.State()
	st.Volume.Credentials = brokerwire.Credentials{}
	out := brokerwire.Mount{VolumeID: m.ID, Path: m.Path, Volume: st.Volume, Since: st.Since, Takeovers: st.Takeovers,
		Socket: st.Socket, LongestStall: st.LongestStall}
	if st.Negotiated() {
		out.Without = st.Without()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if out.WorkerSince = m.lost; m.server != nil {
		out.Served, out.Worker, out.WorkerPID, out.WorkerSince = true, m.server.UUID, m.server.PID, m.since
	}
	return out
}
