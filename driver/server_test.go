package driver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/master/client"
)

func TestTheIdentityIsOurs(t *testing.T) {
	b := start(t)
	info, err := b.GetPluginInfo(t.Context(), &csi.GetPluginInfoRequest{})
	if err != nil || info.Name != "csi.larder.dev" || info.VendorVersion != "test" {
		t.Errorf("info %v, %v", info, err)
	}
	caps, err := b.GetPluginCapabilities(t.Context(), &csi.GetPluginCapabilitiesRequest{})
	if err != nil || len(caps.Capabilities) != 2 {
		t.Errorf("capabilities %v, %v", caps, err)
	}
}

func TestProbeSaysWhetherAVolumeCanBePublished(t *testing.T) {
	b := start(t)
	for _, err := range []error{nil, errors.New("no worker")} {
		b.ready = err
		r, perr := b.Probe(t.Context(), &csi.ProbeRequest{})
		if perr != nil || r.GetReady().GetValue() != (err == nil) {
			t.Errorf("ready=%v, %v with %v", r.GetReady(), perr, err)
		}
	}
}

// Whatever a request has in it, the log tells no secret of it.
func TestNoSecretReachesTheLog(t *testing.T) {
	b := start(t)
	leaky := attrs{
		"source": "s3://bkt", "AWS_SECRET_ACCESS_KEY": "canary-1", "csi.storage.k8s.io/serviceAccount.tokens": `{"a":"canary-2"}`,
		"csi.storage.k8s.io/pod.name": "the-pod",
	}
	b.publish(t, "target", func(r *csi.NodePublishVolumeRequest) { r.VolumeContext, r.Secrets = leaky, secret("canary-3") })
	b.publish(t, "target", inline, func(r *csi.NodePublishVolumeRequest) {
		r.Secrets = secret("canary-4")
		r.VolumeContext["csi.storage.k8s.io/serviceAccount.tokens"] = "canary-2"
		r.VolumeCapability = capability(oneReaderNode)
		r.PublishContext = attrs{"x": "canary-8"}
	})
	b.publish(t, "target2", func(r *csi.NodePublishVolumeRequest) {
		r.VolumeCapability = capability(oneReaderNode)
		r.VolumeCapability.GetMount().MountFlags = []string{"password=canary-5"}
	})
	b.create(t, "n", func(r *csi.CreateVolumeRequest) {
		r.Parameters = attrs{"source": "s3://user:canary-6@bkt", "endpoint": "http://user:canary-7@host", "password": "canary-8"}
		r.Secrets = secret("canary-9")
		r.MutableParameters = attrs{"x": "canary-10"}
	})
	b.create(t, "n", func(r *csi.CreateVolumeRequest) {
		r.Secrets = secret("canary-11")
		c := capability(oneReaderNode)
		c.GetMount().MountFlags = []string{"canary-12"}
		r.VolumeCapabilities = append(r.VolumeCapabilities, c)
	})
	must(t, b.unpublish(t, "target"))
	log := b.log.String()
	if strings.Contains(log, "canary") {
		t.Errorf("the log tells a secret:\n%s", log)
	}
	for _, want := range []string{"method=NodePublishVolume", "code=InvalidArgument", "the-pod", "s3://bkt", "method=CreateVolume"} {
		if !strings.Contains(log, want) {
			t.Errorf("the log has no %q:\n%s", want, log)
		}
	}
}

func TestAPanicEndsItsCallOnly(t *testing.T) {
	b := start(t)
	b.broker.script(func(context.Context, string) error { panic("scripted") }, nil)
	wantCode(t, b.stage(t), codes.Internal, "NodeStageVolume panicked")
	b.broker.script(nil, nil)
	must(t, b.stage(t), b.unstage(t)) // the volume is not locked for ever
	if !strings.Contains(b.log.String(), "node.go") {
		t.Error("the log has no stack")
	}
}

func TestUnknownMethodsStayUnimplemented(t *testing.T) {
	b := start(t)
	_, err := b.ControllerPublishVolume(t.Context(), &csi.ControllerPublishVolumeRequest{VolumeId: "v"})
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("got %v", err)
	}
}

func TestPartsAreServedAloneBehindALongPath(t *testing.T) {
	for _, part := range []string{"controller", "node"} {
		t.Run(part, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), strings.Repeat("long", 30))
			must(t, os.Mkdir(dir, 0o700))
			socket := filepath.Join(dir, "csi.sock")
			must(t, os.WriteFile(socket, nil, 0o600)) // left by an earlier life
			s, err := New(Config{
				Endpoint: "unix://" + socket, Controller: part == "controller", Node: part == "node", NodeID: "n", RunDir: dir,
				Ready: func(context.Context) error { return nil },
			}, newFakeVolumes(), newFakeBroker(), &fakeStats{})
			must(t, err)
			ctx, stop := context.WithCancel(context.Background())
			done := make(chan error, 1)
			go func() { done <- s.Run(ctx) }()
			folder, err := os.Open(dir)
			must(t, err)
			defer folder.Close()
			conn := dial(t, fmt.Sprintf("/proc/self/fd/%d/csi.sock", folder.Fd()))
			defer conn.Close()
			_, err = csi.NewIdentityClient(conn).GetPluginInfo(t.Context(), &csi.GetPluginInfoRequest{})
			must(t, err)
			_, cerr := csi.NewControllerClient(conn).ControllerGetCapabilities(t.Context(), &csi.ControllerGetCapabilitiesRequest{})
			_, nerr := csi.NewNodeClient(conn).NodeGetCapabilities(t.Context(), &csi.NodeGetCapabilitiesRequest{})
			if (cerr == nil) != (part == "controller") || (nerr == nil) != (part == "node") {
				t.Errorf("controller %v, node %v", cerr, nerr)
			}
			if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
				t.Errorf("socket: %v, %v", st.Mode(), err)
			}
			stop()
			must(t, <-done)
			if exists(socket) {
				t.Error("the socket is left")
			}
		})
	}
}

func TestAllMistakesOfAConfigurationAreReported(t *testing.T) {
	_, err := New(Config{Endpoint: "tcp://x", Node: true, RunDir: "rel", FileRoot: "rel", InlineEndpoints: []string{"x"}}, nil, nil, nil)
	for _, want := range []string{"tcp://x", "readiness", "name is missing", "run directory", "file root", "inline endpoint"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in %v", want, err)
		}
	}
	if _, err := New(Config{Endpoint: "unix:///x", Ready: func(context.Context) error { return nil }}, nil, nil, nil); err == nil {
		t.Error("a server of nothing")
	}
}

func TestVolumesArePrintedWithoutCredentials(t *testing.T) {
	var out logBuffer
	q, err := testRules(t).parse("v", attrs{"source": "s3://bkt"}, secret("canary"))
	must(t, err)
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", "request", q, "volume", q.Volume, "pointer", &q, "mount", brokerwire.Mount{Volume: q.Volume})
	if strings.Contains(out.String(), "canary") {
		t.Errorf("printed: %s", out.String())
	}
}

func TestEverySentinelHasItsCode(t *testing.T) {
	for err, want := range map[error]codes.Code{
		object.ErrNotFound: codes.NotFound, object.ErrDenied: codes.PermissionDenied, object.ErrUnavailable: codes.Unavailable,
		object.ErrBusy: codes.Unavailable, object.ErrInvalid: codes.InvalidArgument, brokerwire.ErrExists: codes.AlreadyExists,
		context.DeadlineExceeded: codes.DeadlineExceeded, context.Canceled: codes.Canceled, object.ErrCorrupt: codes.Internal,
		client.ErrBadToken: codes.Aborted, client.ErrExhausted: codes.ResourceExhausted, errNoParent: codes.FailedPrecondition,
	} {
		if got := status.Code(toStatus(fmt.Errorf("mount: %w", fmt.Errorf("open: %w", err)))); got != want {
			t.Errorf("%v: %v; want %v", err, got, want)
		}
	}
	if toStatus(nil) != nil {
		t.Error("nil is an error")
	}
	inner := fmt.Errorf("callee: %w", status.Error(codes.NotFound, "its own"))
	if got := status.Code(toStatus(inner)); got != codes.Internal {
		t.Errorf("a callee's code leaks out as ours: %v", got)
	}
}
