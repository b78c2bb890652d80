// Package record holds what the master remembers: volumes, workers and mounts.
//
// No record holds a credential: [Volume.Validate], [Registration.Validate] and
// [Mount.Validate] refuse what looks like one, and nothing is stored that they refuse. A
// volume's id is made from its name, so a master that lost everything names it alike. The
// package is a leaf: the master, its client and the wire between them use it.
package record

import (
	"cmp"
	"errors"
	"maps"
	"time"
)

// The decisions callers make. Everything else is wrapped with what was being done to what.
var (
	ErrInvalid     = errors.New("invalid argument")
	ErrNotFound    = errors.New("not found")
	ErrExists      = errors.New("already exists and differs")
	ErrExhausted   = errors.New("not enough capacity")
	ErrBadToken    = errors.New("bad page token")
	ErrUnavailable = errors.New("unavailable") // the store, or no worker on the node: try again
	ErrRefused     = errors.New("refused")     // as things are now: the text says what to do first
)

// Volume is what CSI provisions.
type Volume struct {
	ID            string            `json:"id"`
	Name          string            `json:"name,omitempty"` // "" if remembered from a worker that did not know it
	Parameters    map[string]string `json:"parameters,omitempty"`
	CapacityBytes int64             `json:"capacityBytes,omitempty"`
	Node          string            `json:"node,omitempty"` // bound to it, reserving its capacity; "" for all nodes
	Created       time.Time         `json:"created"`

	PublishedNodes []string `json:"-"` // set by the master, from the workers whose lease holds
}

// VolumeSpec asks for a volume.
type VolumeSpec struct {
	Name          string
	Parameters    map[string]string
	CapacityBytes int64
	LimitBytes    int64    // an existing volume may have at most this; 0 for no limit
	Nodes         []string // bind to the first that has room; none for all nodes
}

// Matches reports whether v is what the spec asks for, so that creating it again is no error.
func (s VolumeSpec) Matches(v Volume) bool {
	fits := v.CapacityBytes >= s.CapacityBytes && (s.LimitBytes == 0 || v.CapacityBytes <= s.LimitBytes)
	if v.Name == "" { // remembered from a worker: its capacity may not be known either
		fits = fits || v.CapacityBytes == 0
	}
	return fits && (v.Name == "" || v.Name == s.Name) && s.bindsTo(v.Node) && maps.Equal(s.Parameters, v.Parameters)
}

func (s VolumeSpec) bindsTo(node string) bool {
	if len(s.Nodes) == 0 {
		return node == ""
	}
	for _, n := range s.Nodes {
		if n == node {
			return true
		}
	}
	return false
}

// Registration is what a worker tells about itself.
type Registration struct {
	UUID          string      `json:"uuid"`
	Node          string      `json:"node"` // one worker per node: the last to register
	Version       string      `json:"version,omitempty"`
	CapacityBytes int64       `json:"capacityBytes"`
	Addresses     []string    `json:"addresses,omitempty"` // ip:port; the first serves the master's questions
	Key           string      `json:"key,omitempty"`       // what it wants to be shown with them; for masters only
	Volumes       []Published `json:"volumes,omitempty"`
}

// Published is a volume that is published on a node, as far as its attributes tell: at
// least the id. Inline ones never become volumes of the master.
type Published struct {
	Volume Volume `json:"volume"`
	Inline bool   `json:"inline,omitempty"`
	Pods   []Pod  `json:"pods,omitempty"`
}

// Pod is one that a volume is published to, as far as the kubelet told: the UID at least.
type Pod struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid"`
}

// Beat is what a worker tells with a heartbeat. It is kept in memory only.
type Beat struct {
	Stats    Stats
	Holdings []Holding
}

// Stats count since Started, except for the first three and the mounts, which are as of now.
type Stats struct {
	CachedBytes     int64
	Objects         int64
	CompleteObjects int64
	ReadRequests    uint64
	ReadBytes       uint64
	FetchedBytes    uint64
	HitChunks       uint64
	MissChunks      uint64
	EvictedBytes    uint64
	Mounts          int64
	Started         time.Time // the worker's process
}

// Holding sums up what a worker has cached of one volume's source.
type Holding struct {
	VolumeID    string
	CachedBytes int64
	Objects     int64
}

// Worker is a worker whose lease holds, or one that is gone and not forgotten. Of its
// Volumes only the ids and pods are kept, and its Key is not told.
type Worker struct {
	Registration
	Beat
	Registered    time.Time
	Seen          time.Time // last heartbeat; zero if none since the master started
	ReservedBytes int64     // by volumes bound to its node
	Gone          bool      // its lease has ended
	Unanswered    string    // why it did not answer, where it was asked
	Drained       time.Time // since when its node gets nothing new; zero if it does
}

// MountedVolume is what a worker says of a volume on its node.
type MountedVolume struct {
	Parameters   map[string]string
	Inline       bool
	Namespace    string        // of its claim, or of the pod that named it itself; "" outside of a cluster
	Claim        string        // "" for none
	Mounted      time.Time     // zero while its broker is away, as are the two below
	Takeovers    int64         // by workers after the first
	LongestStall time.Duration // without a worker
	Trouble      string        // what readers were told lately; "" for nothing
	Without      []string      // features that its mount does without
	OpenFiles    uint64        // now; a hint after a take-over

	Counted      time.Time // since when what is below is, which is since the worker took the mount
	DiskBytes    uint64    // given to readers from cache files
	MemoryBytes  uint64    // from memory
	StoreBytes   uint64    // that they waited for
	PassedBytes  uint64    // sizes of files whose reading the kernel was given
	FetchedBytes uint64    // from under stores
	HitChunks    uint64
	MissChunks   uint64
}

// VolumeOnNode is a volume on one node.
type VolumeOnNode struct {
	Node, UUID string
	Pods       []Pod
	Volume     MountedVolume
	Unanswered string // why it is not known; "" if it is
}

// Held sums up what a worker has cached at a location.
type Held struct {
	CachedBytes     int64
	Objects         int64
	CompleteObjects int64
	Stores          int64 // how many under stores have such a bucket or folder
}

// Located is what one worker holds.
type Located struct {
	Node       string
	UUID       string
	Addresses  []string
	Held       Held
	Unanswered string // why it is not known; "" if it is
}

// Add adds what the same worker holds elsewhere.
func (l *Located) Add(o Located) {
	h := &l.Held
	h.CachedBytes, h.Objects = h.CachedBytes+o.Held.CachedBytes, h.Objects+o.Held.Objects
	h.CompleteObjects, h.Stores = h.CompleteObjects+o.Held.CompleteObjects, h.Stores+o.Held.Stores
	l.Unanswered = cmp.Or(l.Unanswered, o.Unanswered)
}

// Capacity is that of one node or of all.
type Capacity struct {
	CapacityBytes  int64
	ReservedBytes  int64
	AvailableBytes int64
	LargestBytes   int64 // the most that one volume can reserve
}

// Status is the master's own.
type Status struct {
	Version       string
	PID           int
	Started       time.Time
	Embedded      bool  // the store is in the master's process
	StoreBytes    int64 // on disk
	StoreRevision int64
	Workers       int64
	Volumes       int64
	Mounts        int64
}
