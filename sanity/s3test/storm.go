package s3test

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"
)

// Storm makes a share of all requests fail, each in one of several ways, as drawn from a seed.
type Storm struct {
	share  float64
	faults []Fault

	mu       sync.Mutex // guards the fields below
	rnd      *rand.Rand
	injected map[string]int
	total    int
}

// Fault is one way to fail.
type Fault struct {
	Name  string
	Kinds []Kind // of requests that it can happen to; nil is all
	Hook  Hook
}

// NewStorm has each request fail with that probability.
func NewStorm(seed uint64, share float64, faults ...Fault) *Storm {
	return &Storm{share: share, faults: faults, rnd: rand.New(rand.NewPCG(seed, 0)), injected: map[string]int{}}
}

// Hook is the storm; it ends with SetHook(nil).
func (s *Storm) Hook() Hook {
	return func(w http.ResponseWriter, r *http.Request, req Request, next http.Handler) {
		if h := s.draw(req.Kind); h != nil {
			h(w, r, req, next)
			return
		}
		next.ServeHTTP(w, r)
	}
}

func (s *Storm) draw(kind Kind) Hook {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rnd.Float64() >= s.share {
		return nil
	}
	var may []Fault
	for _, f := range s.faults {
		if f.Kinds == nil {
			may = append(may, f)
		}
		for _, k := range f.Kinds {
			if k == kind {
				may = append(may, f)
			}
		}
	}
	if len(may) == 0 {
		return nil
	}
	f := may[s.rnd.IntN(len(may))]
	s.injected[f.Name]++
	s.total++
	return f.Hook
}

// Injected is how often each fault happened, and all together.
func (s *Storm) Injected() (byName map[string]int, total int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	byName = map[string]int{}
	for name, n := range s.injected {
		byName[name] = n
	}
	return byName, s.total
}

// AllFaults are those of stores and of what lies before them. Slow ones are slower than a client that waits
// for the timeout.
func AllFaults(timeout time.Duration) []Fault {
	bodies := []Kind{Get, List}
	return []Fault{
		{"500", nil, Refuse(500, "InternalError")},
		{"503", nil, Refuse(503, "SlowDown")},
		{"503 with Retry-After", nil, RefuseFor("1", 503, "SlowDown")},
		{"502 of a proxy", nil, Refuse(502, "")},
		{"429", nil, Refuse(429, "TooManyRequests")},
		{"reset", nil, Reset()},
		{"no answer", nil, Stall(-1)},
		{"reset in the body", []Kind{Get}, ResetBehind(10_000)},
		{"truncated", bodies, Truncate(300)},
		{"truncated further on", []Kind{Get}, Truncate(100_000)},
		{"stalled", bodies, Stall(200)},
		{"trickling", []Kind{Get}, Trickle(timeout / 4)},
		{"another etag", []Kind{Get}, SetHeader("ETag", `"00000000000000000000000000000000"`)},
		{"no etag", []Kind{Get}, SetHeader("ETag", "")},
		{"another range", []Kind{Get}, SetHeader("Content-Range", "bytes 1-2/3")},
		{"no XML", []Kind{List}, Garble()},
	}
}

// RefuseFor is Refuse with a Retry-After.
func RefuseFor(retryAfter string, status int, code string) Hook {
	refuse := Refuse(status, code)
	return func(w http.ResponseWriter, r *http.Request, req Request, next http.Handler) {
		w.Header().Set("Retry-After", retryAfter)
		refuse(w, r, req, next)
	}
}

// ResetBehind sends n bytes of the body, then resets the connection.
func ResetBehind(n int64) Hook {
	reset := Reset()
	return func(w http.ResponseWriter, r *http.Request, req Request, next http.Handler) {
		cut := &cutWriter{ResponseWriter: w, left: n, atEnd: func() {
			reset(w, r, req, next)
			panic(http.ErrAbortHandler) // there is no connection any more
		}}
		next.ServeHTTP(cut, r)
	}
}

// Trickle sends the answer's body byte by byte.
func Trickle(interval time.Duration) Hook {
	return func(w http.ResponseWriter, r *http.Request, _ Request, next http.Handler) {
		next.ServeHTTP(&trickleWriter{ResponseWriter: w, r: r, interval: interval}, r)
	}
}

type trickleWriter struct {
	http.ResponseWriter
	r        *http.Request
	interval time.Duration
}

func (w *trickleWriter) Write(p []byte) (n int, err error) {
	for n < len(p) {
		m, err := w.ResponseWriter.Write(p[n : n+1])
		if n += m; err != nil {
			return n, err
		}
		http.NewResponseController(w.ResponseWriter).Flush()
		select {
		case <-time.After(w.interval):
		case <-w.r.Context().Done():
			return n, errCut
		}
	}
	return n, nil
}

func (w *trickleWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Garble answers with 200 and something that is no XML.
func Garble() Hook {
	return func(w http.ResponseWriter, _ *http.Request, _ Request, _ http.Handler) {
		fmt.Fprint(w, "<html>sign in to the network<br>")
	}
}
