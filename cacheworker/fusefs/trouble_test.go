package fusefs

import (
	"testing"
	"time"
)

func TestFailuresOfOneKindAreLoggedNowAndThen(t *testing.T) {
	var r rows
	now := time.Now()
	lines, told := 0, 0
	for range 1000 { // in 25 s
		if log, kept := r.next("read EIO", now); log {
			lines++
			told += 1 + kept
		}
		now = now.Add(25 * time.Millisecond)
	}
	if lines != 3 {
		t.Errorf("%d lines in 25 s", lines)
	}
	if log, _ := r.next("open EACCES", now); !log {
		t.Error("a failure of another kind is not logged")
	}
	if log, kept := r.next("read EIO", now.Add(time.Hour)); !log || told+1+kept != 1001 {
		t.Errorf("logged %v; the lines tell of %d failures of 1001", log, told+1+kept)
	}
}
