package cachestore

import (
	"testing"
	"time"
)

func TestMuchEvictionIsOneStorm(t *testing.T) {
	var st storm
	now := time.Now()
	var bytes int64
	said := func(d time.Duration, perSecond int64) (n int) {
		for range int(d / time.Second) {
			now = now.Add(time.Second)
			bytes += perSecond
			if _, begins := st.note(now, bytes, 1000); begins {
				n++
			}
		}
		return n
	}
	if n := said(time.Hour, 1); n != 0 { // less than a third in each window
		t.Errorf("%d storms while little is evicted", n)
	}
	if n := said(time.Hour, 5); n != 1 {
		t.Errorf("%d lines for one storm", n)
	}
	if n := said(10*time.Minute, 0) + said(time.Hour, 100); n != 1 {
		t.Errorf("%d lines for the next", n)
	}
}

func TestARefusingDiskIsToldAndItsReturnToo(t *testing.T) {
	s := open(t, testConfig(t, t.TempDir(), 8*chunk))
	s.trouble(errRefused)
	s.trouble(errRefused)
	if s.Stats().Healthy {
		t.Error("healthy right after a refusal")
	}
	s.wellAgain()
	s.mu.Lock()
	if s.troubled != 2 {
		t.Error("told to be well again right after a refusal")
	}
	s.troubleAt = time.Now().Add(-2 * troubleOver)
	s.mu.Unlock()
	if !s.Stats().Healthy {
		t.Error("not healthy after a while without a refusal")
	}
	s.wellAgain()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.troubled != 0 {
		t.Error("its return is not told")
	}
}
