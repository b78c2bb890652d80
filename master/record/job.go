package record

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"
)

// JobKind is what a job does with the objects below its URIs.
type JobKind string

// The kinds of jobs.
const (
	Load JobKind = "load" // caches them, each with the credential of a volume of the node that has it
	Free JobKind = "free" // evicts them, pinned ones too

	Pin   JobKind = "pin" // caches them, and has them stay
	Unpin JobKind = "unpin"
)

// JobState is how far a job is on one node, or in all.
type JobState string

// The states of jobs. Those behind Running are the last ones.
const (
	JobWaiting  JobState = "waiting" // for its worker
	JobRunning  JobState = "running"
	JobDone     JobState = "done"
	JobSkipped  JobState = "skipped" // the node has nothing to do with it: no volume of it there
	JobFailed   JobState = "failed"
	JobCanceled JobState = "canceled"
)

// Ended reports whether nothing more happens.
func (s JobState) Ended() bool { return s != "" && s != JobWaiting && s != JobRunning }

// JobSpec asks for a job.
type JobSpec struct {
	Kind     JobKind
	URIs     []string // as for [ParseLocation]; at least one
	Endpoint string   // of an S3 store; "" for all that have such a bucket
	Nodes    []string // none for all nodes with a worker
	All      bool     // of all nodes without a name none is skipped because it has no volume of a URI
	Object   string   // uid of the Kubernetes object that asks for it, which has one job however often it does; "" for none
}

// Job is work on what nodes have cached.
type Job struct {
	ID       string    `json:"id"`
	Kind     JobKind   `json:"kind"`
	URIs     []string  `json:"uris"`
	Endpoint string    `json:"endpoint,omitempty"`
	Named    bool      `json:"named,omitempty"` // the nodes were, or all are meant: to be unable to read a URI is a failure there
	Canceled bool      `json:"canceled,omitempty"`
	Object   string    `json:"object,omitempty"` // uid of the Kubernetes object that asked for it
	Created  time.Time `json:"created"`
	Targets  []string  `json:"nodes"`

	Nodes []JobNode `json:"-"` // by node
}

// JobNode is how far a job is on one node. Files and bytes are those of objects.
type JobNode struct {
	Node  string   `json:"node"`
	State JobState `json:"state"`

	URI   int    `json:"uri,omitempty"`   // index of the one being worked on
	After string `json:"after,omitempty"` // the last key in order up to which all is done

	Files        int64  `json:"files,omitempty"` // done, with those that were there already
	Bytes        int64  `json:"bytes,omitempty"`
	PresentFiles int64  `json:"present,omitempty"` // files that were there already
	FailedFiles  int64  `json:"failed,omitempty"`
	Error        string `json:"error,omitempty"` // of the node, or of the first file that failed

	Started time.Time `json:"started,omitzero"`
	Updated time.Time `json:"updated,omitzero"`
}

const (
	maxURIs  = 256
	maxNodes = 10_000
)

// Validate names all that is wrong, as ErrInvalid.
func (s JobSpec) Validate() error {
	var errs []error
	if !slices.Contains([]JobKind{Load, Free, Pin, Unpin}, s.Kind) {
		errs = append(errs, fmt.Errorf("kind %.40q: want load, free, pin or unpin", s.Kind))
	}
	if len(s.URIs) == 0 || len(s.URIs) > maxURIs {
		errs = append(errs, fmt.Errorf("%d URIs: want 1 to %d", len(s.URIs), maxURIs))
	}
	for _, uri := range s.URIs[:min(len(s.URIs), maxURIs)] {
		if _, err := ParseLocation(uri, s.Endpoint); err != nil {
			errs = append(errs, unwrapped(err))
		}
	}
	if len(s.Nodes) > maxNodes {
		errs = append(errs, fmt.Errorf("%d nodes; at most %d", len(s.Nodes), maxNodes))
	}
	for _, n := range s.Nodes {
		errs = append(errs, checkName("node", n))
	}
	if s.Object != "" {
		errs = append(errs, checkName("object", s.Object))
	}
	return invalid(errs)
}

// Validate names all that is wrong with a report, as ErrInvalid.
func (n JobNode) Validate() error {
	errs := []error{checkName("node", n.Node)}
	states := []JobState{JobWaiting, JobRunning, JobDone, JobSkipped, JobFailed, JobCanceled}
	if !slices.Contains(states, n.State) {
		errs = append(errs, fmt.Errorf("state %.40q", n.State))
	}
	if n.URI < 0 || n.URI > maxURIs || n.Files < 0 || n.Bytes < 0 || n.PresentFiles < 0 || n.FailedFiles < 0 {
		errs = append(errs, errors.New("a negative count, or no such URI"))
	}
	if len(n.After) > maxPath || len(n.Error) > maxPath {
		errs = append(errs, errors.New("key or error are too long"))
	}
	return invalid(errs)
}

// JobOf is the id of the job of a Kubernetes object with that uid.
func JobOf(kind JobKind, object string) string {
	sum := sha256.Sum256([]byte(object))
	return string(kind) + "-" + hex.EncodeToString(sum[:8])
}

// ValidJobID reports whether id can be a job's id.
func ValidJobID(id string) bool { return idShape.MatchString(id) }

// State sums up the nodes: running while one of them is at it, then the worst of their ends.
func (j Job) State() JobState {
	count := map[JobState]int{}
	for _, n := range j.Nodes {
		count[n.State]++
	}
	switch {
	case count[JobRunning] > 0, count[JobWaiting] > 0 && count[JobWaiting] < len(j.Nodes):
		return JobRunning
	case count[JobWaiting] > 0:
		return JobWaiting
	}
	for _, s := range []JobState{JobCanceled, JobFailed, JobDone} {
		if count[s] > 0 {
			return s
		}
	}
	if j.Canceled {
		return JobCanceled
	}
	return JobSkipped
}
