package source

import (
	"sync/atomic"
	"time"
)

// Kind is what a request asks for.
type Kind string

// The kinds of requests that a source makes.
const (
	List Kind = "list"
	Head Kind = "head"
	Get  Kind = "get"
)

// Observer is told of every request that really goes to a store, retries and resumed bodies
// included. Its methods are called concurrently and must not block.
type Observer interface {
	// Requested is called when the answer's header, or no answer, has come: err is the
	// network's, nil for every answer.
	Requested(kind Kind, took time.Duration, err error)

	// Received is called with the number of bytes of a GET that have come.
	Received(bytes int)
}

// Counter is an Observer that counts. The zero value is ready.
type Counter struct {
	Lists, Heads, Gets, Failures, Bytes atomic.Int64
}

// Requested counts one request.
func (c *Counter) Requested(kind Kind, _ time.Duration, err error) {
	switch kind {
	case List:
		c.Lists.Add(1)
	case Head:
		c.Heads.Add(1)
	case Get:
		c.Gets.Add(1)
	}
	if err != nil {
		c.Failures.Add(1)
	}
}

// Received counts bytes.
func (c *Counter) Received(bytes int) { c.Bytes.Add(int64(bytes)) }

// Unobserved is the Observer of those who do not care.
type Unobserved struct{}

// Requested does nothing.
func (Unobserved) Requested(Kind, time.Duration, error) {}

// Received does nothing.
func (Unobserved) Received(int) {}
