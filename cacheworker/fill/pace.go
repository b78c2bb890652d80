package fill

import (
	"time"

	"github.com/larderfs/larder/cacheworker/object"
)

// pace is how a store answers when nothing else is in the way: the shortest wait for a first byte and the
// greatest speed of a connection, both slowly forgotten. The zero value knows nothing.
type pace struct {
	wait time.Duration
	rate float64 // bytes a second
}

// forget is how many GETs it takes to believe that a store has become slower.
const forget = 256

func (p pace) saw(wait time.Duration, rate float64) pace {
	if p.rate == 0 {
		return pace{wait, rate}
	}
	if p.wait += (wait - p.wait) / forget; wait < p.wait {
		p.wait = wait
	}
	p.rate = max(rate, p.rate+(rate-p.rate)/forget)
	return p
}

// inFlight is how many bytes have to be on their way at any time, in GETs of that size, for a
// rate. It is taken from the pace of an idle store: on a link that is full everything takes longer, and asking
// for more would only make that longer still.
func (p pace) inFlight(rate float64, get int64) int64 {
	if p.rate == 0 {
		return 0
	}
	return int64(rate * (p.wait.Seconds() + float64(get)/p.rate))
}

// timed notes how the store has answered a GET of n bytes. Short ones tell too little.
func (f *Fills) timed(store object.Store, n int64, asked, began, ended time.Time) {
	if n < object.ChunkSize || ended.Equal(began) {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.paces[store] = f.paces[store].saw(began.Sub(asked), float64(n)/ended.Sub(began).Seconds())
}

// arrival is how fast bytes come. The zero value knows nothing.
type arrival struct {
	rate  float64 // bytes a second
	bytes int64   // that came since
	since time.Time
}

// rateOver is the time over which a speed is taken.
const rateOver = 50 * time.Millisecond

// note believes at once that it has become faster, and slowly that it has become slower. A time in which next to nothing was
// asked for tells nothing.
func (a *arrival) note(n int64, now time.Time) {
	if a.since.IsZero() {
		a.since = now
	}
	a.bytes += n
	d := now.Sub(a.since)
	if d < rateOver {
		return
	}
	if d < 4*rateOver {
		rate := float64(a.bytes) / d.Seconds()
		a.rate = max(rate, a.rate+(rate-a.rate)/8)
	}
	a.bytes, a.since = 0, now
}
