package source

import (
	"net/http"
	"sync/atomic"
	"time"

	"github.com/larderfs/larder/cacheworker/telemetry"
)

// Kind is what a request asks for.
type Kind string

// The kinds of requests that a source makes.
const (
	List Kind = "list"
	Head Kind = "head"
	Get  Kind = "get"
)

// Outcome is how a request ended.
type Outcome string

// The outcomes of requests.
const (
	OK       Outcome = "ok"
	Absent   Outcome = "absent"   // it is not there, or not in that version
	Refused  Outcome = "refused"  // the credential, or the request as such
	Trouble  Outcome = "trouble"  // the store cannot answer now: 5xx, 429
	NoAnswer Outcome = "noanswer" // none came, or not in time
)

// Kinds and Outcomes are all that there are.
var (
	Kinds    = [...]Kind{List, Head, Get}
	Outcomes = [...]Outcome{OK, Absent, Refused, Trouble, NoAnswer}
)

// OutcomeOf is that of an HTTP answer.
func OutcomeOf(status int) Outcome {
	switch {
	case status < 400:
		return OK
	case status == http.StatusNotFound || status == http.StatusPreconditionFailed || status == http.StatusRequestedRangeNotSatisfiable:
		return Absent
	case status >= 500 || status == http.StatusTooManyRequests || status == http.StatusRequestTimeout:
		return Trouble
	}
	return Refused
}

// Observer is told of every request that really goes to a store, retries and resumed bodies
// included. Its methods are called concurrently and must not block.
type Observer interface {
	// Requested is called when the answer's header, or no answer, has come.
	Requested(kind Kind, took time.Duration, how Outcome)

	// Received is called with the number of bytes of a GET that have come.
	Received(bytes int)
}

// Counter is an Observer that counts. The zero value is ready.
type Counter struct {
	Lists, Heads, Gets, Failures, Bytes atomic.Int64 // Failures are those without an answer

	took [len(Kinds)][len(Outcomes)]telemetry.Latency
}

// Requested counts one request.
func (c *Counter) Requested(kind Kind, took time.Duration, how Outcome) {
	switch kind {
	case List:
		c.Lists.Add(1)
	case Head:
		c.Heads.Add(1)
	case Get:
		c.Gets.Add(1)
	}
	if how == NoAnswer {
		c.Failures.Add(1)
	}
	if l := c.Took(kind, how); l != nil {
		l.Observe(took)
	}
}

// Took is the time to the answers of one kind that ended so; nil if there is no such.
func (c *Counter) Took(kind Kind, how Outcome) *telemetry.Latency {
	for i := range Kinds {
		for j := range Outcomes {
			if Kinds[i] == kind && Outcomes[j] == how {
				return &c.took[i][j]
			}
		}
	}
	return nil
}

// Received counts bytes.
func (c *Counter) Received(bytes int) { c.Bytes.Add(int64(bytes)) }

// Unobserved is the Observer of those who do not care.
type Unobserved struct{}

// Requested does nothing.
func (Unobserved) Requested(Kind, time.Duration, Outcome) {}

// Received does nothing.
func (Unobserved) Received(int) {}
