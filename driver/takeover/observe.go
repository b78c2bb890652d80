package takeover

import (
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/telemetry"
)

// Metrics are a broker's.
var Metrics = []telemetry.Metric{
	{Name: "larder_broker_mounts", Help: "FUSE mounts held."},
	{Name: "larder_broker_served_mounts", Help: "Mounts that a worker answers now."},
	{Name: "larder_broker_takeover_stall_seconds", Help: "Time that a mount was without a worker before one took it over.", Histogram: true},
	{Name: "larder_broker_given_up_mounts_total", Help: "Mounts that no worker took over in time: their pods had to be started again."},
}

// observed is what is counted since the start.
type observed struct {
	stalls  telemetry.Latency // one observation a take-over
	givenUp atomic.Int64
}

// Collector has the metrics of the mounts.
func (ms *Mounts) Collector() prometheus.Collector {
	return telemetry.NewCollector(Metrics, func(s telemetry.Scrape) {
		held, served := ms.All(), 0
		for _, m := range held {
			if m.served() {
				served++
			}
		}
		s.Set("larder_broker_mounts", float64(len(held)))
		s.Set("larder_broker_served_mounts", float64(served))
		s.Latency("larder_broker_takeover_stall_seconds", &ms.stalls)
		s.Set("larder_broker_given_up_mounts_total", float64(ms.givenUp.Load()))
	})
}

// tookOver notes that a worker serves a mount that another one served.
func (ms *Mounts) tookOver(m *Mount, s *brokerwire.Session, stall time.Duration) error {
	ms.stalls.Observe(stall)
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
	secrets := st.Volume.Secrets.Names()
	st.Volume.Credentials, st.Volume.Secrets = brokerwire.Credentials{}, brokerwire.Secrets{}
	out := brokerwire.Mount{VolumeID: m.ID, Path: m.Path, Volume: st.Volume, Since: st.Since, Takeovers: st.Takeovers,
		Socket: st.Socket, LongestStall: st.LongestStall, Secrets: secrets}
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
