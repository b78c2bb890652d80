package driver

import (
	"context"
	"fmt"
	"log/slog"
	"path"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/kubernetes-csi/csi-lib-utils/protosanitizer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/larderfs/larder/cacheworker/brokerwire"
)

// calls is around every call: its deadline, its line in the log, its status code, and the
// end of a panic.
type calls struct {
	log     *slog.Logger
	timeout time.Duration
	*counters
}

func (c calls) serve(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (resp any, err error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.timeout)
		defer cancel()
	}
	start, method := time.Now(), path.Base(info.FullMethod)
	c.inFlight.Add(1)
	defer c.inFlight.Add(-1)
	defer func() {
		if p := recover(); p != nil {
			c.log.Error("panic in a call", "method", method, "panic", p, "stack", string(debug.Stack()))
			resp, err = nil, status.Errorf(codes.Internal, "%s panicked; see the log", method)
		}
		c.took.With(method, status.Code(err).String()).Since(start)
		c.done(ctx, method, req, err, time.Since(start))
	}()
	resp, err = handle(ctx, req)
	if err = toStatus(err); err != nil {
		return nil, err
	}
	return resp, nil
}

// done writes one line for what changed something or failed; the rest is for debugging.
func (c calls) done(ctx context.Context, method string, req any, err error, took time.Duration) {
	level := slog.LevelDebug
	switch {
	case err != nil:
		level = slog.LevelWarn
	case changes(method):
		level = slog.LevelInfo
	}
	if !c.log.Enabled(ctx, level) {
		return
	}
	attrs := []any{"method", method, "request", printable(req), "took", took}
	if err != nil {
		attrs = append(attrs, "code", status.Code(err).String(), "err", status.Convert(err).Message())
	}
	c.log.Log(ctx, level, "csi call", attrs...)
}

func changes(method string) bool {
	return slices.ContainsFunc([]string{"Create", "Delete", "NodeStage", "NodeUnstage", "NodePublish", "NodeUnpublish"},
		func(prefix string) bool { return strings.HasPrefix(method, prefix) })
}

const stripped = "***stripped***"

// printable is a request without secrets: those of secret fields, and those that users or
// kubelets (service account tokens) put where none belong.
func printable(req any) fmt.Stringer {
	m, ok := req.(proto.Message)
	if !ok {
		return protosanitizer.StripSecrets(req)
	}
	m = proto.Clone(m)
	stripMaps(m.ProtoReflect())
	return protosanitizer.StripSecrets(m)
}

// stripMaps strips, in m and all below it, the values of map entries that are no parameters
// of ours, and mount options.
func stripMaps(m protoreflect.Message) {
	if mount, ok := m.Interface().(*csi.VolumeCapability_MountVolume); ok && len(mount.MountFlags) > 0 {
		mount.MountFlags = []string{stripped}
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsMap() && f.MapKey().Kind() == protoreflect.StringKind && f.MapValue().Kind() == protoreflect.StringKind:
			stripMap(v.Map())
		case f.IsList() && f.Kind() == protoreflect.MessageKind:
			for i := range v.List().Len() {
				stripMaps(v.List().Get(i).Message())
			}
		case !f.IsMap() && !f.IsList() && f.Kind() == protoreflect.MessageKind:
			stripMaps(v.Message())
		}
		return true
	})
}

func stripMap(m protoreflect.Map) {
	m.Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
		url := k.String() == keySource || k.String() == keyEndpoint || k.String() == keySTSEndpoint
		word := k.String() == keyCredentials && !slices.Contains(credentialWords, brokerwire.CredentialsOf(v.String()))
		if !loggable(k.String()) || word || url && strings.ContainsAny(v.String(), "@?") {
			m.Set(k, protoreflect.ValueOfString(stripped))
		}
		return true
	})
}

// loggable keys are ours, topology, and what the orchestrator says of claim and pod.
func loggable(key string) bool {
	if slices.Contains(parameterNames, key) || key == TopologyKey || key == keyEphemeral {
		return true
	}
	return key == keyClaimNamespace || key == keyClaimName || strings.HasPrefix(key, "csi.storage.k8s.io/pod.") || key == "csi.storage.k8s.io/serviceAccount.name"
}
