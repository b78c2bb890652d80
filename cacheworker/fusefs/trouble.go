package fusefs

import (
	"log/slog"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// trouble is the last failure that a reader was told of and that is not of its own making.
type trouble struct {
	mu   sync.Mutex // guards the fields below
	text string
	when time.Time
}

func (t *trouble) note(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text, t.when = err.Error(), time.Now()
}

// quietFor is how long a failure of one kind is only counted after one of them was logged: a store that is away fails
// every read.
const quietFor = 10 * time.Second

// rows are failures of one kind each, by operation and errno.
type rows struct {
	mu   sync.Mutex // guards last
	last map[string]*row
}

type row struct {
	logged time.Time
	kept   int // back since
}

// next reports whether a failure is to be logged, and how many were not since the last one that was.
func (r *rows) next(kind string, now time.Time) (log bool, kept int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	w := r.last[kind]
	if w == nil {
		if r.last == nil {
			r.last = map[string]*row{}
		}
		w = &row{}
		r.last[kind] = w
	}
	if now.Sub(w.logged) < quietFor {
		w.kept++
		return false, 0
	}
	kept, w.logged, w.kept = w.kept, now, 0
	return true, kept
}

// logFailure writes one line for failures of one kind within a while.
func (m *Mount) logFailure(level slog.Level, message, op string, errno syscall.Errno, err error) {
	if log, kept := m.rows.next(op+" "+unix.ErrnoName(errno), time.Now()); log {
		m.cfg.Log.Log(m.closed, level, message, "op", op, "volume", m.cfg.Volume.ID, "errno", unix.ErrnoName(errno), "err", err, "unlogged", kept)
	}
}

// Trouble is what last went wrong for a reader, if that was in the time before now that is given; else "".
func (m *Mount) Trouble(within time.Duration) string {
	m.trouble.mu.Lock()
	defer m.trouble.mu.Unlock()
	if m.trouble.text == "" || time.Since(m.trouble.when) > within {
		return ""
	}
	return m.trouble.text
}
