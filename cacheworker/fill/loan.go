package fill

import (
	"context"
	"fmt"
)

// Loan is bytes that were read and not copied: pieces of chunks in memory, and of the buffer that was there for the rest.
type Loan struct {
	f      *Fills
	pieces [][]byte
	chunks []*chunk // held

	room [2][]byte // for pieces: there are rarely more
}

// Lend reads as ReadAt does, but leaves bytes where they are if they are in memory; the others it reads into p. What it
// returns is valid until Return, which has to come soon: until then no other chunk can have the memory. Hence p is short.
func (r *Reader) Lend(ctx context.Context, p []byte, off int64) (*Loan, error) {
	l := &Loan{f: r.f}
	l.pieces = l.room[:0]
	if _, err := r.readAt(ctx, p, off, l); err != nil {
		l.Return()
		return nil, fmt.Errorf("read %v at %d: %w", r.obj, off, err)
	}
	return l, nil
}

// Pieces are the bytes, in their order.
func (l *Loan) Pieces() [][]byte { return l.pieces }

// Size is how many they are.
func (l *Loan) Size() (n int) {
	for _, p := range l.pieces {
		n += len(p)
	}
	return n
}

// Return gives the memory back, once.
func (l *Loan) Return() {
	for _, c := range l.chunks {
		l.f.done(c, true)
	}
}

// add notes a piece, of chunk c if that is not nil, whose hold becomes the loan's. A nil loan takes none.
func (l *Loan) add(p []byte, c *chunk) {
	if l == nil {
		return
	}
	l.pieces = append(l.pieces, p)
	if c != nil {
		l.chunks = append(l.chunks, c)
	}
}

// end is the last n bytes of what was read into p, or lent instead.
func (l *Loan) end(p []byte, n int) []byte {
	if l == nil {
		return p[max(0, len(p)-n):]
	}
	var end []byte
	for i := len(l.pieces) - 1; i >= 0 && len(end) < n; i-- {
		last := l.pieces[i]
		end = append(last[max(0, len(last)-(n-len(end))):len(last):len(last)], end...)
	}
	return end
}
