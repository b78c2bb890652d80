package brokerwire

import (
	"os"
	"sync"
)

// Record is a mount's state together with the memfd that keeps it. The broker has it, and is the
// only one who writes it. Safe for concurrent use.
type Record struct {
	mu    sync.Mutex // guards the fields below; held across a write
	file  *os.File
	state State
}

// NewRecord makes the memfd.
func NewRecord(s State) (*Record, error) {
	f, err := NewState(s)
	if err != nil {
		return nil, err
	}
	return &Record{file: f, state: s}, nil
}

// OpenRecord reads a memfd that another process held; it is the record's unless there is an error.
func OpenRecord(f *os.File) (*Record, error) {
	s, err := ReadState(f)
	if err != nil {
		return nil, err
	}
	return &Record{file: f, state: s}, nil
}

// State is as last written.
func (r *Record) State() State {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state
}

// File is the memfd now; [Record.Replace] closes it.
func (r *Record) File() *os.File {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.file
}

// Update changes the state; an error leaves it as it was.
func (r *Record) Update(change func(*State)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.state
	change(&s)
	if err := WriteState(r.file, s); err != nil {
		return err
	}
	r.state = s
	return nil
}

// Replace goes on with another memfd, which a worker has compacted. Its header is written anew: a
// worker has no say in it. f is the record's unless there is an error.
func (r *Record) Replace(f *os.File) error {
	if _, err := ReadState(f); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := WriteState(f, r.state); err != nil {
		return err
	}
	r.file.Close()
	r.file = f
	return nil
}

// Close closes the memfd.
func (r *Record) Close() error { return r.File().Close() }
