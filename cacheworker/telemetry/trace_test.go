package telemetry

import (
	"context"
	"errors"
	"testing"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

func TestTracesThatAreOffCostNothing(t *testing.T) {
	var off *Tracer
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	err := errors.New("some")
	allocs := testing.AllocsPerRun(100, func() {
		ctx, span := off.Start(ctx, "fuse.read")
		span.Int("offset", 1)
		ctx, child := Child(ctx, "fill")
		child.Text("key", "k")
		Current(ctx).WaitsFor(child)
		child.End(&err)
		span.End(nil)
	})
	if allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
	if len(off.ServerOptions())+len(off.DialOptions()) != 0 || off.Close() != nil {
		t.Error("a tracer that is off does something")
	}
}

func TestEndpointsOfTraces(t *testing.T) {
	for endpoint, want := range map[string]string{
		"collector:4317": "http://collector:4317", "http://c:4317": "http://c:4317", "https://c": "https://c",
		"collector": "", "ftp://c:1": "", "unix:///x": "",
	} {
		got, err := TraceConfig{Endpoint: endpoint}.url()
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v", endpoint, got, err)
		}
	}
	for _, share := range []float64{-0.1, 1.1} {
		if (TraceConfig{Sample: share}).Validate() == nil {
			t.Errorf("a share of %v is taken", share)
		}
	}
	if tr, err := NewTracer(t.Context(), TraceConfig{Sample: 1}); tr != nil || err != nil {
		t.Errorf("without an endpoint: %v, %v", tr, err)
	}
}

// Chunks are written when the fetch that brought them may be over.
func TestAHopMayBeginWhenItsParentHasEnded(t *testing.T) {
	p := sdktrace.NewTracerProvider()
	on := &Tracer{p, p.Tracer(scope)}
	defer on.Close()
	ctx, parent := on.Start(t.Context(), "fill")
	parent.End(nil)
	_, child := Child(ctx, "cache.write")
	if !child.Recorded() || child.s.SpanContext().TraceID() != parent.s.SpanContext().TraceID() {
		t.Error("no hop of its trace")
	}
}

// BenchmarkColdReadUntraced asks what the hooks of a cold read cost while traces are off.
func BenchmarkColdReadUntraced(b *testing.B) {
	var off *Tracer
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	for b.Loop() {
		ctx, span := off.Start(ctx, "fuse.read")
		for range 3 {
			_, child := Child(ctx, "fill")
			child.End(nil)
		}
		span.End(nil)
	}
}
