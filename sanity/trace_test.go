package sanity

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	spans "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"

	"github.com/larderfs/larder/sanity/s3test"
)

// receiver is a collector of OpenTelemetry.
type receiver struct {
	collector.UnimplementedTraceServiceServer

	mu  sync.Mutex
	all map[string]hop // by span id
}

type hop struct {
	process string
	*spans.Span
}

func (r *receiver) Export(_ context.Context, req *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, rs := range req.GetResourceSpans() {
		process := ""
		for _, a := range rs.GetResource().GetAttributes() {
			if a.GetKey() == "service.name" {
				process = a.GetValue().GetStringValue()
			}
		}
		for _, ss := range rs.GetScopeSpans() {
			for _, s := range ss.GetSpans() {
				r.all[string(s.GetSpanId())] = hop{process, s}
			}
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

// receive starts one and returns its address.
func receive(t *testing.T) (*receiver, string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &receiver{all: map[string]hop{}}
	s := grpc.NewServer()
	collector.RegisterTraceServiceServer(s, r)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return r, l.Addr().String()
}

// ways are those from the roots to all hops that have ended with this name, as "process name > process name".
func (r *receiver) ways(name string) (all []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, h := range r.all {
		if h.GetName() != name {
			continue
		}
		way := []string{h.process + " " + h.GetName()}
		for up := h; len(up.GetParentSpanId()) > 0; {
			parent, ok := r.all[string(up.GetParentSpanId())]
			if !ok {
				way = append(way, "?")
				break
			}
			up = parent
			way = append(way, up.process+" "+up.GetName())
		}
		slices.Reverse(way)
		all = append(all, strings.Join(way, " > "))
	}
	return all
}

// A cold read is one trace, whose hops say where its time went; a CSI call is one, through the processes that it needs.
func TestATraceNamesEachHop(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"ds/f": pattern(3<<20, 7)})
	got, addr := receive(t)
	s := up(t, "--trace-endpoint", addr, "--trace-sample", "1")
	_, target := publish(t, s.Kubelet, bucket(store, "v", "ds"))
	mustShell(t, "cat "+target+"/data/f >/dev/null")

	for name, way := range map[string]string{
		"store.request":                        "larder-worker fuse.read > larder-worker fill > larder-worker store.get > larder-worker store.request",
		"cache.write":                          "larder-worker fuse.read > larder-worker fill > larder-worker cache.write",
		"fuse.open":                            "larder-worker fuse.open",
		"larder.master.v1.Master/CreateVolume": "larder-up csi.v1.Controller/CreateVolume > larder-up larder.master.v1.Master/CreateVolume > larder-up larder.master.v1.Master/CreateVolume",
		"csi.v1.Node/NodePublishVolume":        "larder-up csi.v1.Node/NodePublishVolume",
	} {
		if !within(func() bool { return slices.Contains(got.ways(name), way) }) {
			t.Errorf("%s: the ways to it are\n%s\nwant\n%s", name, strings.Join(got.ways(name), "\n"), way)
		}
	}
	said := map[string]string{}
	got.mu.Lock()
	for _, h := range got.all {
		for _, a := range h.GetAttributes() {
			said[h.GetName()+" "+a.GetKey()] = fmt.Sprint(a.GetValue())
		}
	}
	got.mu.Unlock()
	for attr, want := range map[string]string{"fuse.read key": "ds/f", "fill key": "ds/f", "fill for": "", "store.request kind": "", "store.request status": "", "cache.write chunk": ""} {
		if !strings.Contains(said[attr], want) || said[attr] == "" {
			t.Errorf("%s is %q", attr, said[attr])
		}
	}
}

// within reports whether cond becomes true: spans are sent after a second.
func within(cond func() bool) bool {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); !cond(); <-tick.C {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}
