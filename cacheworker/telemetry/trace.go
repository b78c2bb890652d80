package telemetry

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/url"
	"strings"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
)

// TraceConfig says where spans go. The zero value is off.
type TraceConfig struct {
	Endpoint string  // of an OTLP/gRPC collector: host:port, http://host:port, or https://host:port for TLS; "" for none
	Sample   float64 // share of the requests that are traced whose caller says nothing about it
	Process  string
	Version  string
	Node     string // "" for none
}

// Validate says what is wrong with it.
func (c TraceConfig) Validate() error {
	var errs []error
	if _, err := c.url(); c.Endpoint != "" && err != nil {
		errs = append(errs, err)
	}
	if c.Sample < 0 || c.Sample > 1 || math.IsNaN(c.Sample) {
		errs = append(errs, fmt.Errorf("a share of %v of the requests: want 0 to 1", c.Sample))
	}
	return errors.Join(errs...)
}

func (c TraceConfig) url() (string, error) {
	if _, _, err := net.SplitHostPort(c.Endpoint); err == nil && !strings.Contains(c.Endpoint, "://") {
		return "http://" + c.Endpoint, nil
	}
	u, err := url.Parse(c.Endpoint)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return "", fmt.Errorf("%q: want host:port, http://host:port or https://host:port", c.Endpoint)
	}
	return c.Endpoint, nil
}

// Tracer begins traces. A nil one is off, which costs a comparison.
type Tracer struct {
	provider *sdktrace.TracerProvider
	tracer   trace.Tracer
}

const scope = "github.com/larderfs/larder"

// NewTracer returns nil if the configuration is off. It connects to nobody before there is a span.
func NewTracer(ctx context.Context, c TraceConfig) (*Tracer, error) {
	if c.Endpoint == "" {
		return nil, nil
	}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	to, err := c.url()
	if err != nil {
		return nil, err
	}
	exporter, err := otlptracegrpc.New(ctx, otlptracegrpc.WithEndpointURL(to))
	if err != nil {
		return nil, err
	}
	attrs := []attribute.KeyValue{attribute.String("service.name", "larder-"+c.Process), attribute.String("service.version", c.Version)}
	if c.Node != "" {
		attrs = append(attrs, attribute.String("k8s.node.name", c.Node))
	}
	p := sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter, sdktrace.WithBatchTimeout(time.Second)),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(c.Sample))),
		sdktrace.WithResource(resource.NewSchemaless(attrs...)),
	)
	return &Tracer{p, p.Tracer(scope)}, nil
}

// closeTimeout is how long the end of a process waits for spans to be sent.
const closeTimeout = time.Second

// Close sends what is left.
func (t *Tracer) Close() error {
	if t == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	return t.provider.Shutdown(ctx)
}

// Start begins a trace, or goes on with that of ctx.
func (t *Tracer) Start(ctx context.Context, name string) (context.Context, Span) {
	if t == nil {
		return ctx, Span{}
	}
	ctx, s := t.tracer.Start(ctx, name)
	return ctx, recording(s)
}

// ServerOptions trace the calls of a gRPC server.
func (t *Tracer) ServerOptions() []grpc.ServerOption {
	if t == nil {
		return nil
	}
	return []grpc.ServerOption{grpc.StatsHandler(otelgrpc.NewServerHandler(t.options()...))}
}

// DialOptions trace the calls of a gRPC client, and have the server go on with the trace.
func (t *Tracer) DialOptions() []grpc.DialOption {
	if t == nil {
		return nil
	}
	return []grpc.DialOption{grpc.WithStatsHandler(otelgrpc.NewClientHandler(t.options()...))}
}

func (t *Tracer) options() []otelgrpc.Option {
	return []otelgrpc.Option{otelgrpc.WithTracerProvider(t.provider), otelgrpc.WithPropagators(propagation.TraceContext{})}
}

// Span is one hop. The zero value is none: of a request that is not traced.
type Span struct{ s trace.Span }

func recording(s trace.Span) Span {
	if !s.IsRecording() {
		return Span{}
	}
	return Span{s}
}

// Child begins a hop of the trace that ctx is in, if it is in one, whose last hop may have ended.
func Child(ctx context.Context, name string) (context.Context, Span) {
	parent := trace.SpanFromContext(ctx)
	if !parent.SpanContext().IsSampled() {
		return ctx, Span{}
	}
	ctx, s := parent.TracerProvider().Tracer(scope).Start(ctx, name)
	return ctx, recording(s)
}

// Current is the hop that ctx is in.
func Current(ctx context.Context) Span { return recording(trace.SpanFromContext(ctx)) }

// Text and Int say something of a hop.
func (s Span) Text(key, value string) {
	if s.s != nil {
		s.s.SetAttributes(attribute.String(key, value))
	}
}

func (s Span) Int(key string, value int64) {
	if s.s != nil {
		s.s.SetAttributes(attribute.Int64(key, value))
	}
}

// Event notes a moment.
func (s Span) Event(name string) {
	if s.s != nil {
		s.s.AddEvent(name)
	}
}

// WaitsFor notes that s waits for a hop of another trace.
func (s Span) WaitsFor(other Span) {
	if s.s != nil && other.s != nil && other.s.SpanContext().TraceID() != s.s.SpanContext().TraceID() {
		s.s.AddLink(trace.Link{SpanContext: other.s.SpanContext()})
	}
}

// Recorded reports whether there is a span: what is said of it may cost something.
func (s Span) Recorded() bool { return s.s != nil }

// End ends the hop, as *err says, unless err is nil.
func (s Span) End(err *error) {
	if s.s == nil {
		return
	}
	if err != nil && *err != nil {
		s.s.SetStatus(codes.Error, (*err).Error())
	}
	s.s.End()
}
