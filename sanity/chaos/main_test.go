package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/larderfs/larder/sanity/leak"
)

// A reader is this program again.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "read" {
		readMain()
	}
	os.Exit(leak.Run(m))
}

// The short form of `make chaos`: each way to die, twice.
func TestNoReaderSeesADeath(t *testing.T) {
	seed := uint64(time.Now().UnixNano()) % 1e6
	o := chaosTest(t, config{scale: short, seed: seed, plan: func(ctx context.Context, k *killer) error {
		for _, part := range []string{workerPart, brokerPart, workerPart, brokerPart} {
			for _, w := range deaths[part] {
				if err := k.do(ctx, part, w.how, w.do); err != nil {
					return err
				}
			}
		}
		return nil
	}})
	for _, text := range append(o.wrong, o.errs...) {
		t.Error(text)
	}
	for _, part := range []string{workerPart, brokerPart} {
		if all, counted, _ := o.of(part); counted < len(deaths[part]) || all < 2*len(deaths[part]) {
			t.Errorf("%d of %d kills of the %s count", counted, all, part)
		}
	}
	if o.rounds == 0 || o.bytes == 0 || o.passing == 0 {
		t.Errorf("%d volumes made, %d bytes read, %d past the worker; want some of each", o.rounds, o.bytes, o.passing)
	}
	t.Log(o.summary())
}

// Where the parts are processes of their own the master dies too.
func TestNoReaderNeedsTheMaster(t *testing.T) {
	o := chaosTest(t, config{scale: short, seed: 1, apart: true, plan: func(ctx context.Context, k *killer) error {
		for i, part := range []string{masterPart, controllerPart, workerPart, brokerPart, masterPart} {
			if part == workerPart || part == brokerPart {
				if err := k.do(ctx, part, "kill", (*killer).kill); err != nil {
					return err
				}
				continue
			}
			if err := k.beat(ctx, part); err != nil {
				return fmt.Errorf("kill %d: %w", i, err)
			}
		}
		return nil
	}})
	for _, text := range append(o.wrong, o.errs...) {
		t.Error(text)
	}
	if o.others != 3 {
		t.Errorf("%d kills of master and controller, want 3", o.others)
	}
}

// What no mount survives has to be found: this is the test of the test.
func TestReadersSeeTheDeathOfBoth(t *testing.T) {
	o := chaosTest(t, config{scale: short, seed: 1, plan: func(ctx context.Context, k *killer) error {
		if err := k.both(ctx); err != nil {
			return err
		}
		return eventually(ctx, "a reader sees an error", func() bool { errs, _ := k.fleet.faults(); return len(errs) > 0 })
	}})
	if o.good() {
		t.Error("worker and broker died together and no reader saw an error")
	}
}

func chaosTest(t *testing.T, c config) *outcome {
	t.Helper()
	var said strings.Builder
	c.say, c.kills = &said, 20
	o, err := run(t.Context(), c)
	if err != nil || o == nil {
		t.Fatalf("%v\n%s", err, &said)
	}
	if t.Failed() {
		t.Log(said.String())
	}
	return o
}

func TestAWrongByteIsFound(t *testing.T) {
	f := file{"a/b", 5000}
	for _, size := range []int{1, 7, 8, 9, 4096, 5000} {
		b := make([]byte, size)
		for _, off := range []int64{0, 8, 4096} {
			f.fill(b, off)
			if at := f.check(b, off); at != -1 {
				t.Fatalf("%d bytes at %d: the right byte %d is called wrong", size, off, at)
			}
			for _, i := range []int{0, size / 2, size - 1} {
				b[i] ^= 4
				if at := f.check(b, off); at != off+int64(i) {
					t.Errorf("%d bytes at %d: byte %d is wrong, found %d", size, off, off+int64(i), at)
				}
				b[i] ^= 4
			}
		}
	}
	b := make([]byte, 64)
	f.fill(b, 0)
	for name, other := range map[string]file{"another file": {"a/c", 5000}, "another place": f} {
		off := int64(0)
		if name == "another place" {
			off = 64
		}
		if other.check(b, off) < 0 {
			t.Errorf("bytes of %s are called right", name)
		}
	}
	if f.check(make([]byte, 4096), 0) < 0 {
		t.Error("zeros are called right")
	}
}

func TestPiecesAreOfOneFile(t *testing.T) {
	f := file{"x", 1000}
	whole := make([]byte, f.Size)
	f.fill(whole, 0)
	for off := int64(0); off < f.Size; off += 8 {
		piece := make([]byte, min(100, f.Size-off))
		f.fill(piece, off)
		if !slices.Equal(piece, whole[off:off+int64(len(piece))]) {
			t.Fatalf("the piece at %d differs", off)
		}
	}
}

func TestDatasetHasNoNameTwice(t *testing.T) {
	for _, s := range []scale{short, long} {
		d := s.dataset()
		seen := map[string]bool{}
		for _, f := range slices.Concat(d.Cold, d.Hot, d.Tree, d.Many) {
			if seen[f.Path] || f.Size <= 0 {
				t.Errorf("%+v", f)
			}
			seen[f.Path] = true
		}
		if total := int64(len(d.Cold)) * s.ColdSize; total < s.TierBytes*5/4 {
			t.Errorf("%d bytes of cold files fit into a tier of %d", total, s.TierBytes)
		}
	}
}

func TestGapIsTheLongestOperationWithoutTheStops(t *testing.T) {
	ms := int64(time.Millisecond)
	op := func(from, to int64, needs bool) operation {
		return operation{span: span{from * ms, to * ms}, By: fmt.Sprint(from), Needs: needs}
	}
	call := operation{span: span{90 * ms, 190 * ms}, Call: true}
	for name, c := range map[string]struct {
		target  string
		held    bool
		ops     []operation
		stops   []span
		counted bool
		gap     int64
	}{
		"nothing was read":                   {target: workerPart},
		"in flight":                          {workerPart, false, []operation{op(90, 160, true)}, nil, true, 70},
		"in flight, but from the page cache": {workerPart, false, []operation{op(90, 160, false)}, nil, false, 70},
		"begun after the signal":             {workerPart, false, []operation{op(101, 160, true)}, nil, false, 59},
		"ended before the process":           {workerPart, false, []operation{op(90, 105, true)}, nil, false, 15},
		"over before":                        {workerPart, false, []operation{op(50, 99, true)}, nil, false, 0},
		"begun when all was back":            {workerPart, false, []operation{op(201, 900, true)}, nil, false, 0},
		"the longest counts":                 {workerPart, false, []operation{op(90, 160, true), op(120, 300, true), op(95, 130, true)}, nil, true, 180},
		"stops are taken out":                {workerPart, false, []operation{op(90, 190, true)}, []span{{100 * ms, 120 * ms}, {110 * ms, 130 * ms}, {80 * ms, 92 * ms}, {185 * ms, 300 * ms}}, true, 63},
		"a call is not a reader":             {workerPart, false, []operation{call}, nil, false, 0},
		"broker, call under way":             {brokerPart, false, []operation{call}, nil, true, 0},
		"broker, handle open":                {brokerPart, true, nil, nil, true, 0},
		"broker, neither":                    {brokerPart, false, []operation{op(90, 160, true)}, nil, false, 70},
	} {
		k := kill{Target: c.target, Held: c.held, At: 100 * ms, Dead: 110 * ms, Back: 200 * ms}
		k.evaluate(c.ops, c.stops)
		if k.Counted != c.counted || int64(k.Gap) != c.gap*ms {
			t.Errorf("%s: counts %v, gap %v; want %v, %d ms", name, k.Counted, k.Gap, c.counted, c.gap)
		}
	}
}

func TestQuantiles(t *testing.T) {
	var hundred []time.Duration
	for i := range 100 {
		hundred = append(hundred, time.Duration(i+1))
	}
	for _, c := range []struct {
		of   []time.Duration
		q    float64
		want time.Duration
	}{{nil, .5, 0}, {hundred[:1], .5, 1}, {hundred[:1], 1, 1}, {hundred, .5, 50}, {hundred, .99, 99}, {hundred, 1, 100}, {hundred[:3], .5, 2}} {
		if got := quantile(c.of, c.q); got != c.want {
			t.Errorf("quantile %v of %d values is %d, want %d", c.q, len(c.of), got, c.want)
		}
	}
}

func TestDifferenceNamesDuplicatesAndGaps(t *testing.T) {
	for _, c := range []struct{ got, want, diff string }{
		{"a b c", "a b c", ""}, {"a b b c", "a b c", "+b"}, {"a c", "a b c", "-b"}, {"", "a", "-a"}, {"a d", "a b", "-b +d"},
	} {
		if d := difference(strings.Fields(c.got), strings.Fields(c.want)); d != c.diff {
			t.Errorf("%q against %q: %q, want %q", c.got, c.want, d, c.diff)
		}
	}
}
