package fusefs

import (
	"sync"
	"time"
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

// Trouble is what last went wrong for a reader, if that was in the time before now that is given; else "".
func (m *Mount) Trouble(within time.Duration) string {
	m.trouble.mu.Lock()
	defer m.trouble.mu.Unlock()
	if m.trouble.text == "" || time.Since(m.trouble.when) > within {
		return ""
	}
	return m.trouble.text
}
