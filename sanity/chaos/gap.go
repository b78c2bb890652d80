package main

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// span is a stretch of CLOCK_MONOTONIC, in nanoseconds.
type span struct{ From, To int64 }

func (s span) overlaps(o span) bool { return s.From < o.To && o.From < s.To }

// operation is one of a reader that took long, or a call to the node service.
type operation struct {
	span
	By    string
	Needs bool // could not be answered without the worker
	Call  bool // a mount call, which is not a read
}

// kill is one of the worker or the broker, and what came of it.
type kill struct {
	Target, How string
	At          int64 // just before the signal
	Dead        int64 // when the process had ended
	Back        int64 // when every mount was held and served again

	Held    bool // a passthrough handle was open
	Counted bool
	Gap     time.Duration
	By      string // the reader that saw the gap
}

func (k *kill) String() string {
	ms := func(ns int64) time.Duration { return time.Duration(ns).Round(time.Millisecond) }
	return fmt.Sprintf("%8.3f s  %s, %s: dead after %v, back after %v, gap %v (%s), counts: %v",
		seconds(k.At), k.Target, k.How, ms(k.Dead-k.At), ms(k.Back-k.At), ms(int64(k.Gap)), k.By, k.Counted)
}

// evaluate says whether a kill counts, and the longest gap that any reader saw: how long one
// operation that overlaps the time without the process took, from its own beginning to its own
// end, without the time in which a process was stopped on purpose.
func (k *kill) evaluate(ops []operation, stops []span) {
	away := span{k.At, max(k.Back, k.Dead)}
	k.Counted = k.Target == brokerPart && k.Held
	k.Gap, k.By = 0, ""
	for _, op := range ops {
		if !op.overlaps(away) {
			continue
		}
		// It began before the signal and ended after the end of the process.
		inFlight := op.From < k.At && op.To > k.Dead
		if inFlight && (k.Target == workerPart && op.Needs || k.Target == brokerPart && op.Call) {
			k.Counted = true
		}
		if gap := without(op.span, stops); !op.Call && gap > k.Gap {
			k.Gap, k.By = gap, op.By
		}
	}
}

// without is the length of s outside of the stops, which may overlap each other.
func without(s span, stops []span) time.Duration {
	length, covered := s.To-s.From, s.From
	stops = slices.SortedFunc(slices.Values(stops), func(a, b span) int { return cmp.Compare(a.From, b.From) })
	for _, o := range stops {
		from, to := max(o.From, covered), min(o.To, s.To)
		if from < to {
			length -= to - from
			covered = to
		}
	}
	return time.Duration(length)
}

// quantile of sorted values: the least one that at least the share q of them does not exceed.
func quantile(sorted []time.Duration, q float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	i := int(q*float64(len(sorted)) + 0.999999)
	return sorted[min(max(i, 1), len(sorted))-1]
}
