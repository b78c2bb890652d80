package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/sanity/leak"
)

const (
	oneReaderNode = csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER
	onePod        = csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
)

func secret(id string) map[string]string {
	return map[string]string{"AWS_ACCESS_KEY_ID": id, "AWS_SECRET_ACCESS_KEY": "canary-" + id}
}

func (b *bench) stage(t *testing.T, change ...func(*csi.NodeStageVolumeRequest)) error {
	t.Helper()
	req := &csi.NodeStageVolumeRequest{
		VolumeId: "v", StagingTargetPath: b.path("stage"), VolumeCapability: reader, VolumeContext: attrs{"source": "s3://bkt"},
	}
	for _, c := range change {
		c(req)
	}
	_, err := b.NodeStageVolume(t.Context(), req)
	return err
}

func (b *bench) publish(t *testing.T, target string, change ...func(*csi.NodePublishVolumeRequest)) error {
	t.Helper()
	req := &csi.NodePublishVolumeRequest{
		VolumeId: "v", StagingTargetPath: b.path("stage"), TargetPath: b.path(target), VolumeCapability: reader,
		VolumeContext: attrs{"source": "s3://bkt"},
	}
	for _, c := range change {
		c(req)
	}
	_, err := b.NodePublishVolume(t.Context(), req)
	return err
}

func inline(req *csi.NodePublishVolumeRequest) {
	req.StagingTargetPath = ""
	req.VolumeContext[keyEphemeral] = "true"
}

func (b *bench) unpublish(t *testing.T, target string) error {
	t.Helper()
	_, err := b.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: "v", TargetPath: b.path(target)})
	return err
}

func (b *bench) unstage(t *testing.T) error {
	t.Helper()
	_, err := b.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: "v", StagingTargetPath: b.path("stage")})
	return err
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func wantCode(t *testing.T, err error, code codes.Code, text string) {
	t.Helper()
	if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), text) {
		t.Fatalf("got %v; want %v with %q", err, code, text)
	}
	if m := status.Convert(err).Message(); strings.Contains(m, "canary") || strings.Contains(m, "\n") {
		t.Fatalf("text: %q", m)
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func TestAVolumeGoesThroughItsLife(t *testing.T) {
	b := start(t)
	must(t, b.stage(t), b.publish(t, "target"), b.publish(t, "other"))
	if got, err := os.ReadFile(b.path("target/data/file")); string(got) != "v" {
		t.Fatalf("read %q, %v", got, err)
	}
	if err := os.WriteFile(b.path("target/data/new"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Fatalf("write to a target: %v", err)
	}
	must(t, b.unpublish(t, "target"))
	if exists(b.path("target")) || !exists(b.path("other/data/file")) {
		t.Fatal("unpublish took the wrong target")
	}
	must(t, b.unpublish(t, "other"), b.unstage(t))
	if !exists(b.path("stage")) || b.mountsOf("") != 0 {
		t.Fatalf("left: %v", leak.Mounts(b.dir))
	}
}

func TestLayoutDataShowsTheDatasetItself(t *testing.T) {
	b := start(t)
	data := attrs{"source": "s3://bkt", "layout": "data"}
	must(t, b.stage(t, func(r *csi.NodeStageVolumeRequest) { r.VolumeContext = data }))
	for range 3 {
		must(t, b.publish(t, "target", func(r *csi.NodePublishVolumeRequest) { r.VolumeContext = data }))
	}
	if !exists(b.path("target/file")) || exists(b.path("target/domain")) || b.broker.count("bind") != 1 {
		t.Errorf("target does not show data/, or was bound %d times", b.broker.count("bind"))
	}
	must(t, b.unpublish(t, "target"), b.unstage(t))
}

func TestRepeatedCallsChangeNothing(t *testing.T) {
	b := start(t)
	for range 5 {
		must(t, b.stage(t))
	}
	for range 5 {
		must(t, b.publish(t, "target"))
	}
	if m, n := b.broker.count("mount"), b.broker.count("bind"); m != 1 || n != 1 || b.mountsOf("") != 2 {
		t.Errorf("%d mounts, %d binds; want one each", m, n)
	}
	for range 5 {
		must(t, b.unpublish(t, "target"))
	}
	for range 5 {
		must(t, b.unstage(t))
	}
}

func TestARepeatedPublishRefreshesCredentialsOnly(t *testing.T) {
	b := start(t)
	must(t,
		b.stage(t, func(r *csi.NodeStageVolumeRequest) { r.Secrets = secret("one") }),
		b.publish(t, "target", func(r *csi.NodePublishVolumeRequest) { r.Secrets = secret("one") }))
	before := leak.Mounts(b.dir)
	must(t, b.publish(t, "target", func(r *csi.NodePublishVolumeRequest) { r.Secrets = secret("two") }))
	if got := b.broker.credentials("v").AccessKeyID; got != "two" {
		t.Errorf("credentials of %q; want those of the last call", got)
	}
	must(t, b.publish(t, "target")) // without a Secret: keeps them
	if got := b.broker.credentials("v").AccessKeyID; got != "two" {
		t.Errorf("credentials of %q after a call without a Secret", got)
	}
	must(t, b.stage(t, func(r *csi.NodeStageVolumeRequest) { r.Secrets = secret("three") }))
	if got := b.broker.credentials("v").AccessKeyID; got != "three" {
		t.Errorf("credentials of %q; want those of the last stage", got)
	}
	if after := leak.Mounts(b.dir); fmt.Sprint(after) != fmt.Sprint(before) || b.broker.count("mount") != 1 || b.broker.count("bind") != 1 {
		t.Errorf("mounted anew: %v, was %v", after, before)
	}
	must(t, b.unpublish(t, "target"), b.unstage(t))
}

func TestInlineVolumesArePublishedOnly(t *testing.T) {
	b := start(t)
	for range 3 {
		must(t, b.publish(t, "target", inline, func(r *csi.NodePublishVolumeRequest) { r.Secrets = secret("pod") }))
	}
	if !exists(b.path("target/data/file")) || b.mountsOf("run/inline") != 1 || b.broker.count("mount") != 1 {
		t.Fatalf("mounts: %v", leak.Mounts(b.dir))
	}
	if got := b.broker.credentials("v").AccessKeyID; got != "pod" {
		t.Errorf("credentials of %q", got)
	}
	wantCode(t, b.publish(t, "second", inline), codes.FailedPrecondition, "has one pod")
	wantCode(t, b.publish(t, "target", inline, func(r *csi.NodePublishVolumeRequest) { r.VolumeContext["source"] = "s3://other" }),
		codes.AlreadyExists, "other values of source")
	must(t, b.unpublish(t, "second")) // never was there
	if !exists(b.path("target/data/file")) {
		t.Error("unpublishing another target took the volume")
	}
	for range 3 {
		must(t, b.unpublish(t, "target"))
	}
	if left, _ := os.ReadDir(b.path("run/inline")); len(left) != 0 || exists(b.path("target")) {
		t.Errorf("left %v", left)
	}
}

func TestInlineIdsNeverReachAPath(t *testing.T) {
	b := start(t)
	for _, id := range []string{"../../etc", "/", strings.Repeat("x", 1024), "a b\tc"} {
		change := func(r *csi.NodePublishVolumeRequest) { r.VolumeId = id }
		must(t, b.publish(t, "target", inline, change))
		if entries, _ := os.ReadDir(b.path("run/inline")); len(entries) != 1 || len(entries[0].Name()) != 32 {
			t.Errorf("%q is mounted at %v", id, entries)
		}
		_, err := b.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: b.path("target")})
		must(t, err)
	}
}

// A failed call leaves nothing: not by a failure before the step, and not by one after it.
func TestFailedCallsUndoThemselves(t *testing.T) {
	calls := map[string]func(b *bench) error{
		"stage":   func(b *bench) error { return b.stage(t) },
		"publish": func(b *bench) error { return b.publish(t, "target") },
		"inline":  func(b *bench) error { return b.publish(t, "target", inline) },
	}
	for _, c := range []struct {
		call, verb string
		staged     int // mounts there were before
	}{{"stage", "mount", 0}, {"publish", "bind", 1}, {"inline", "mount", 0}, {"inline", "bind", 0}} {
		for _, when := range []string{"before", "after"} {
			t.Run(c.call+" "+when+" "+c.verb, func(t *testing.T) {
				b := start(t)
				if c.staged > 0 {
					must(t, b.stage(t))
				}
				fault := func(verb string) error {
					if verb == c.verb {
						return fmt.Errorf("scripted: %w", object.ErrDenied)
					}
					return nil
				}
				if when == "before" {
					b.broker.script(func(_ context.Context, verb string) error { return fault(verb) }, nil)
				} else {
					b.broker.script(nil, fault)
				}
				wantCode(t, calls[c.call](b), codes.PermissionDenied, "scripted")
				b.broker.script(nil, nil)
				inlines, _ := os.ReadDir(b.path("run/inline"))
				if n := b.mountsOf(""); n != c.staged || exists(b.path("target")) || len(inlines) > 0 {
					t.Errorf("left: %v, target %v, inline %v", leak.Mounts(b.dir), exists(b.path("target")), inlines)
				}
				if c.call == "stage" && exists(b.path("stage")) {
					t.Error("left the staging directory that it made")
				}
				must(t, calls[c.call](b), b.unpublish(t, "target"), b.unstage(t)) // and then it works
			})
		}
	}
}

func TestAFailedCallLeavesTheOrchestratorsDirectories(t *testing.T) {
	b := start(t)
	must(t, os.Mkdir(b.path("stage"), 0o755))
	b.broker.script(func(_ context.Context, verb string) error {
		if verb == "mount" {
			return object.ErrUnavailable
		}
		return nil
	}, nil)
	wantCode(t, b.stage(t), codes.Unavailable, "mount volume")
	if !exists(b.path("stage")) {
		t.Error("the staging directory, made by the orchestrator, is gone")
	}
}

func TestAFailedInlinePublishTakesOldLeftoversAlong(t *testing.T) {
	b := start(t)
	must(t, b.publish(t, "target", inline))
	entries, _ := os.ReadDir(b.path("run/inline"))
	must(t, b.unpublish(t, "target"), os.Mkdir(filepath.Join(b.path("run/inline"), entries[0].Name()), 0o700))
	b.broker.script(nil, func(verb string) error {
		if verb == "mount" {
			return object.ErrUnavailable
		}
		return nil
	})
	wantCode(t, b.publish(t, "target", inline), codes.Unavailable, "mount volume")
	if entries, _ = os.ReadDir(b.path("run/inline")); len(entries) != 0 {
		t.Errorf("left %v", entries)
	}
}

func TestACallThatIsCancelledUndoesItself(t *testing.T) {
	b := start(t)
	ctx, cancel := context.WithCancel(t.Context())
	b.broker.script(func(ctx context.Context, verb string) error {
		if verb != "bind" {
			return nil
		}
		cancel()
		<-ctx.Done()
		return ctx.Err()
	}, nil)
	_, err := b.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId: "v", TargetPath: b.path("target"), VolumeCapability: reader, VolumeContext: attrs{"source": "s3://bkt", keyEphemeral: "true"},
	})
	wantCode(t, err, codes.Canceled, "")
	// The answer overtakes the handler: as long as that undoes, the volume is locked.
	for err = codesAborted; status.Code(err) == codes.Aborted; {
		err = b.unpublish(t, "target")
	}
	must(t, err)
	if n := b.broker.count("unmount"); n != 2 || b.mountsOf("") != 0 {
		t.Errorf("left %v after %d unmounts by the call itself", leak.Mounts(b.dir), n)
	}
}

// TestWhatCannotBeUndoneIsNotTouched: the mount may be one that nobody serves.
func TestWhatCannotBeUndoneIsNotTouched(t *testing.T) {
	b := start(t)
	path := b.path("stage")
	must(t, os.MkdirAll(path, 0o750))
	gone := fmt.Errorf("the broker was killed: %w", object.ErrUnavailable)
	b.broker.script(func(_ context.Context, verb string) error {
		if verb == "unmount" {
			return gone
		}
		return nil
	}, func(verb string) error {
		if verb == "mount" {
			return gone
		}
		return nil
	})
	wantCode(t, b.stage(t), codes.Unavailable, "mount volume")
	b.broker.script(nil, nil)
	st, err := os.Stat(path)
	if err != nil || b.mountsOf("stage") != 1 {
		t.Errorf("%d mounts: %v", b.mountsOf("stage"), err)
	} else if st.Mode().Perm() == unstagedMode {
		t.Error("the root of the mount has got the directory's permissions")
	}
	must(t, b.unstage(t))
}

var codesAborted = status.Error(codes.Aborted, "")

func TestCallsAtOnceMountOnce(t *testing.T) {
	b := start(t)
	parallel := func(call func(i int) error) {
		var wg sync.WaitGroup
		for i := range 16 {
			wg.Go(func() {
				err := codesAborted
				for status.Code(err) == codes.Aborted {
					err = call(i)
				}
				if err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	parallel(func(int) error { return b.stage(t) })
	parallel(func(i int) error { return b.publish(t, fmt.Sprint("target", i%4)) })
	if m, n := b.broker.count("mount"), b.broker.count("bind"); m != 1 || n != 4 || b.mountsOf("") != 5 {
		t.Errorf("%d mounts and %d binds; want 1 and 4", m, n)
	}
	parallel(func(i int) error { return b.unpublish(t, fmt.Sprint("target", i%4)) })
	parallel(func(int) error { return b.unstage(t) })
}

func TestASecondCallIsAbortedWhileOneIsUnderWay(t *testing.T) {
	b := start(t)
	reached, release := make(chan struct{}), make(chan struct{})
	b.broker.script(func(_ context.Context, verb string) error {
		if verb == "mount" {
			close(reached)
			<-release
		}
		return nil
	}, nil)
	first := make(chan error, 1)
	go func() { first <- b.stage(t) }()
	<-reached
	wantCode(t, b.stage(t), codes.Aborted, "in progress")
	wantCode(t, b.unstage(t), codes.Aborted, "in progress")
	wantCode(t, b.publish(t, "target"), codes.Aborted, "in progress")
	if err := b.stage(t, func(r *csi.NodeStageVolumeRequest) { r.VolumeId = "w" }); status.Code(err) != codes.Aborted {
		t.Errorf("another volume at the same path: %v", err)
	}
	close(release)
	must(t, <-first, b.unstage(t))
}

func TestPublishNeedsAStagedVolume(t *testing.T) {
	b := start(t)
	must(t, os.Mkdir(b.path("stage"), 0o755))
	wantCode(t, b.publish(t, "target"), codes.FailedPrecondition, "NodeStageVolume first")
	wantCode(t, b.publish(t, "target", func(r *csi.NodePublishVolumeRequest) { r.StagingTargetPath = "" }), codes.FailedPrecondition, "staging_target_path")
	must(t, b.stage(t))
	wantCode(t, b.publish(t, "target", func(r *csi.NodePublishVolumeRequest) { r.StagingTargetPath = b.path("stage2") }), codes.FailedPrecondition, "is staged at")
	wantCode(t, b.publish(t, "target", func(r *csi.NodePublishVolumeRequest) { r.VolumeContext = attrs{"source": "s3://other"} }),
		codes.FailedPrecondition, "other values of source")
	wantCode(t, b.publish(t, "no/target"), codes.FailedPrecondition, "does not exist")
	if exists(b.path("target")) {
		t.Error("a refused publish left its target")
	}
	must(t, b.unstage(t))
}

func TestStagedDifferentlyIsAnError(t *testing.T) {
	b := start(t)
	must(t, b.stage(t))
	wantCode(t, b.stage(t, func(r *csi.NodeStageVolumeRequest) { r.StagingTargetPath = b.path("stage2") }), codes.FailedPrecondition, "unstage it there first")
	wantCode(t, b.stage(t, func(r *csi.NodeStageVolumeRequest) {
		r.VolumeContext = attrs{"source": "s3://bkt", "uid": "5", "region": "r"}
	}),
		codes.AlreadyExists, "other values of uid, region")
	wantCode(t, b.stage(t, func(r *csi.NodeStageVolumeRequest) { r.VolumeId = "w" }), codes.AlreadyExists, `volume "v" is mounted`)
	must(t, b.publish(t, "target"))
	wantCode(t, b.publish(t, "target", inline), codes.AlreadyExists, "not inline")
	wantCode(t, b.publish(t, "target", inline, func(r *csi.NodePublishVolumeRequest) { r.VolumeId = "w" }), codes.AlreadyExists, `volume "v" is published`)
	_, err := b.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: "w", TargetPath: b.path("target")})
	must(t, err)
	_, err = b.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: "w", StagingTargetPath: b.path("stage")})
	must(t, err)
	if !exists(b.path("target/data/file")) || b.mountsOf("") != 2 {
		t.Error("another volume's call took this one's mounts")
	}
	must(t, b.unpublish(t, "target"), b.unstage(t))
}

func TestOneConnectionHasOneGroup(t *testing.T) {
	for _, c := range []struct {
		name, fileMode, staged, published string
		code                              codes.Code
	}{
		{"the same", "0440", "1000", "1000", codes.OK},
		{"another", "0440", "1000", "2000", codes.FailedPrecondition},
		{"none was staged", "0440", "", "2000", codes.FailedPrecondition},
		{"none is asked for", "0440", "1000", "", codes.OK},
		{"readable for all", "0444", "1000", "2000", codes.OK},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := start(t)
			context := attrs{"source": "s3://bkt", "fileMode": c.fileMode}
			must(t, b.stage(t, func(r *csi.NodeStageVolumeRequest) {
				r.VolumeContext, r.VolumeCapability = context, capability(oneReaderNode, c.staged)
			}))
			if m, _ := b.broker.Mounts(t.Context()); c.staged != "" && (m[0].Volume.GID != 1000 || m[0].Volume.FileMode&0o040 == 0) {
				t.Errorf("staged as %+v", m[0].Volume)
			}
			err := b.publish(t, "target", func(r *csi.NodePublishVolumeRequest) {
				r.VolumeContext, r.VolumeCapability, r.Secrets = context, capability(oneReaderNode, c.published), secret("pod")
			})
			if status.Code(err) != c.code {
				t.Errorf("got %v; want %v", err, c.code)
			}
			must(t, b.unpublish(t, "target"), b.unstage(t))
		})
	}
}

func TestAVolumeForOnePodHasOneTarget(t *testing.T) {
	b := start(t)
	single := func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability = capability(onePod) }
	must(t, b.stage(t, func(r *csi.NodeStageVolumeRequest) { r.VolumeCapability = capability(onePod) }))
	must(t, b.publish(t, "target", single), b.publish(t, "target", single))
	wantCode(t, b.publish(t, "other", single), codes.FailedPrecondition, "single pod")
	sub := b.path("subpath") // what the kubelet binds for a subPath is no publish
	must(t, os.Mkdir(sub, 0o755), unix.Mount(b.path("target/domain"), sub, "", unix.MS_BIND, ""), b.unpublish(t, "target"))
	must(t, b.publish(t, "target", single), unix.Unmount(sub, 0))
	must(t, b.unpublish(t, "target"), b.publish(t, "other", single), b.unpublish(t, "other"), b.unstage(t))
}

// Both holders of the descriptors died: the mounts are in the kernel, dead, and the broker
// knows of none.
func TestWhatDiedIsStagedAgainByTheNextPublish(t *testing.T) {
	b := start(t)
	must(t, b.stage(t), b.publish(t, "target"))
	b.broker.forget()
	leak.Unmount(b.dir)
	for _, name := range []string{"stage", "target"} {
		deadFUSE(t, b.path(name))
	}
	wantCode(t, b.publish(t, "target"), codes.Unavailable, "yet to give it back")
	wantCode(t, b.stage(t), codes.Unavailable, "yet to give it back")
	b.stats.err = object.ErrUnavailable
	wantCode(t, b.publish(t, "target"), codes.Unavailable, "may be mounted still")
	if b.mountsOf("") != 2 {
		t.Fatal("a mount was taken away that a worker may hold")
	}
	b.stats.err = fmt.Errorf("ask: %w", object.ErrNotFound)
	must(t, b.publish(t, "target", func(r *csi.NodePublishVolumeRequest) { r.Secrets = secret("again") }))
	if !exists(b.path("target/data/file")) || b.mountsOf("") != 2 || b.broker.credentials("v").AccessKeyID != "again" {
		t.Errorf("mounts: %v", leak.Mounts(b.dir))
	}
	must(t, b.unpublish(t, "target"), b.unstage(t))
}

func TestTheStagingDirectoryTellsThatAVolumeWasStaged(t *testing.T) {
	b := start(t)
	wantCode(t, b.publish(t, "target"), codes.FailedPrecondition, "NodeStageVolume first")
	must(t, b.stage(t))
	b.broker.forget()
	leak.Unmount(b.dir) // its mount was removed because nobody held it any more
	must(t, b.publish(t, "target"))
	must(t, b.unpublish(t, "target"), b.unstage(t))
}

func TestDeadMountsAreUnpublishedAndUnstaged(t *testing.T) {
	b := start(t)
	must(t, os.Mkdir(b.path("stage"), 0o755), os.Mkdir(b.path("target"), 0o755))
	deadFUSE(t, b.path("stage"))
	deadFUSE(t, b.path("target"))
	deadFUSE(t, b.path("target")) // one on top of the other
	must(t, b.unpublish(t, "target"), b.unstage(t))
	if exists(b.path("target")) {
		t.Error("the target is left")
	}
}

func TestADeadInlineVolumeIsUnpublished(t *testing.T) {
	b := start(t)
	must(t, b.publish(t, "target", inline))
	b.broker.forget()
	leak.Unmount(b.dir)
	entries, _ := os.ReadDir(b.path("run/inline"))
	deadFUSE(t, filepath.Join(b.path("run/inline"), entries[0].Name()))
	deadFUSE(t, b.path("target"))
	must(t, b.unpublish(t, "target"))
	if entries, _ = os.ReadDir(b.path("run/inline")); len(entries) > 0 {
		t.Errorf("left %v", entries)
	}
}

func TestForeignMountsAreNotTouched(t *testing.T) {
	b := start(t)
	for _, name := range []string{"stage", "target"} {
		must(t, os.Mkdir(b.path(name), 0o755), unix.Mount("foreign", b.path(name), "tmpfs", 0, "size=64k"))
		t.Cleanup(func() { unix.Unmount(b.path(name), unix.MNT_DETACH) })
	}
	wantCode(t, b.stage(t), codes.FailedPrecondition, "not Larder's")
	wantCode(t, b.unstage(t), codes.FailedPrecondition, "not Larder's")
	wantCode(t, b.publish(t, "target", inline), codes.FailedPrecondition, "not Larder's")
	wantCode(t, b.unpublish(t, "target"), codes.FailedPrecondition, "not Larder's")
	if b.mountsOf("") != 2 {
		t.Errorf("mounts: %v", leak.Mounts(b.dir))
	}
}

func TestFilesOfOthersAreNotRemoved(t *testing.T) {
	b := start(t)
	must(t, os.Mkdir(b.path("target"), 0o755), os.WriteFile(b.path("target/precious"), nil, 0o600), os.WriteFile(b.path("file"), nil, 0o600),
		os.Symlink(b.path("target"), b.path("link")))
	wantCode(t, b.unpublish(t, "target"), codes.FailedPrecondition, "move it away")
	wantCode(t, b.unpublish(t, "file"), codes.FailedPrecondition, "move it away")
	wantCode(t, b.publish(t, "file", inline), codes.FailedPrecondition, "not a directory")
	wantCode(t, b.publish(t, "link", inline), codes.FailedPrecondition, "not a directory")
	if !exists(b.path("target/precious")) || !exists(b.path("file")) {
		t.Error("removed")
	}
}

func TestPathsMayHaveSymlinksInThem(t *testing.T) {
	b := start(t)
	must(t, os.Mkdir(b.path("real"), 0o755), os.Symlink("real", b.path("link")))
	viaLink := func(r *csi.NodeStageVolumeRequest) { r.StagingTargetPath = b.path("link/stage") }
	must(t, b.stage(t, viaLink), b.stage(t, viaLink))
	must(t, b.publish(t, "link/target", func(r *csi.NodePublishVolumeRequest) { r.StagingTargetPath = b.path("link/stage") }))
	must(t, b.publish(t, "real/target", func(r *csi.NodePublishVolumeRequest) { r.StagingTargetPath = b.path("real/stage") }))
	if b.broker.count("mount") != 1 || b.broker.count("bind") != 1 {
		t.Errorf("calls: %v", b.broker.calls)
	}
	must(t, b.unpublish(t, "link/target"))
	_, err := b.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: "v", StagingTargetPath: b.path("link/stage")})
	must(t, err)
}

func TestWhatSomebodyElseUnmountedIsMountedAgain(t *testing.T) {
	b := start(t)
	must(t, b.stage(t))
	must(t, unix.Unmount(b.path("stage"), 0))
	must(t, b.stage(t), b.publish(t, "target"))
	if !exists(b.path("target/data/file")) {
		t.Error("nothing is published")
	}
	must(t, b.unpublish(t, "target"), b.unstage(t))
}

func TestAHalfMadeBindIsMadeAgain(t *testing.T) {
	b := start(t)
	must(t, b.stage(t), os.Mkdir(b.path("target"), 0o755))
	must(t, unix.Mount(b.path("stage"), b.path("target"), "", unix.MS_BIND, "")) // a crash before it was made read-only
	must(t, b.publish(t, "target"))
	if err := os.WriteFile(b.path("target/data/new"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("write: %v", err)
	}
	must(t, b.unpublish(t, "target"), b.unstage(t))
}

func TestBadNodeRequestsAreInvalid(t *testing.T) {
	b := start(t)
	for text, err := range map[string]error{
		"volume_id: missing":                             b.stage(t, func(r *csi.NodeStageVolumeRequest) { r.VolumeId = "" }),
		"volume_id: over-long":                           b.stage(t, func(r *csi.NodeStageVolumeRequest) { r.VolumeId = "a\x00" }),
		"staging_target_path: missing":                   b.stage(t, func(r *csi.NodeStageVolumeRequest) { r.StagingTargetPath = "" }),
		`staging_target_path: "rel/x" is not`:            b.stage(t, func(r *csi.NodeStageVolumeRequest) { r.StagingTargetPath = "rel/x" }),
		"has a segment":                                  b.stage(t, func(r *csi.NodeStageVolumeRequest) { r.StagingTargetPath = b.dir + "/../x" }),
		"volume_capability: missing":                     b.stage(t, func(r *csi.NodeStageVolumeRequest) { r.VolumeCapability = nil }),
		"volume_capability: its access mode":             b.stage(t, func(r *csi.NodeStageVolumeRequest) { r.VolumeCapability = capability(0) }),
		"volume_mount_group":                             b.stage(t, func(r *csi.NodeStageVolumeRequest) { r.VolumeCapability = capability(onePod, "staff") }),
		"inline volumes are published without":           b.stage(t, func(r *csi.NodeStageVolumeRequest) { r.VolumeContext[keyEphemeral] = "true" }),
		"nearest known one is source":                    b.stage(t, func(r *csi.NodeStageVolumeRequest) { r.VolumeContext = attrs{"sourc": "x"} }),
		"volume_id: missing; target_path: missing":       b.publish(t, "x", func(r *csi.NodePublishVolumeRequest) { r.VolumeId, r.TargetPath = "", "" }),
		`target_path: "/" is not an absolute path below`: b.publish(t, "x", func(r *csi.NodePublishVolumeRequest) { r.TargetPath = "/" }),
		"file:// is not for inline":                      b.publish(t, "x", inline, func(r *csi.NodePublishVolumeRequest) { r.VolumeContext["source"] = "file:///srv/x" }),
		"endpoint: not allowed":                          b.publish(t, "x", inline, func(r *csi.NodePublishVolumeRequest) { r.VolumeContext["endpoint"] = "http://10.0.0.1" }),
		"use volumeMode: Filesystem": b.publish(t, "x", func(r *csi.NodePublishVolumeRequest) {
			r.VolumeCapability = &csi.VolumeCapability{AccessType: &csi.VolumeCapability_Block{}, AccessMode: reader.AccessMode}
		}),
		"mount options": b.publish(t, "x", func(r *csi.NodePublishVolumeRequest) {
			r.VolumeCapability = capability(onePod)
			r.VolumeCapability.GetMount().MountFlags = []string{"ro", "password=canary"}
		}),
	} {
		wantCode(t, err, codes.InvalidArgument, text)
	}
	if calls := b.broker.calls; len(calls) != 0 {
		t.Errorf("the broker was asked: %v", calls)
	}
}

func TestStatsAreOfAVolumeAtAPath(t *testing.T) {
	b := start(t)
	stats := func(id, path string) (*csi.NodeGetVolumeStatsResponse, error) {
		return b.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: path})
	}
	must(t, b.stage(t), b.publish(t, "target"), os.Mkdir(b.path("empty"), 0o755))
	for _, path := range []string{"target", "stage"} {
		r, err := stats("v", b.path(path))
		if err != nil || len(r.Usage) != 1 || r.Usage[0].Unit != csi.VolumeUsage_BYTES || r.Usage[0].Used != 5 || r.Usage[0].Total != 10 {
			t.Errorf("%s: %v, %v", path, r, err)
		}
	}
	for _, c := range [][2]string{{"v", "some/path"}, {"v", b.path("empty")}, {"v", b.path("no/such")}, {"w", b.path("target")}, {"v", "/"}} {
		_, err := stats(c[0], c[1])
		wantCode(t, err, codes.NotFound, "is not at")
	}
	_, err := stats("v", "")
	wantCode(t, err, codes.InvalidArgument, "volume_path")
	b.stats.err = fmt.Errorf("ask: %w", object.ErrNotFound)
	_, err = stats("v", b.path("target"))
	wantCode(t, err, codes.Unavailable, "has not taken it yet")
	must(t, b.unpublish(t, "target"), b.unstage(t))
}

// A FUSE file system that answers nothing hangs whoever touches it.
func TestStatsAndUnpublishNeverTouchTheFileSystem(t *testing.T) {
	b := start(t)
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd)
	must(t, os.Mkdir(b.path("stage"), 0o755), os.Mkdir(b.path("target"), 0o755))
	must(t, unix.Mount("hung", b.path("stage"), "fuse.larder", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)))
	must(t, unix.Mount(b.path("stage"), b.path("target"), "", unix.MS_BIND, ""))
	q, err := testRules(t).parse("v", attrs{"source": "s3://bkt"}, nil)
	must(t, err)
	b.broker.mounts["v"] = brokerwire.Mount{VolumeID: "v", Path: b.path("stage"), Volume: q.Volume}

	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_, err = b.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: "v", VolumePath: b.path("target")})
	must(t, err)
	_, err = b.NodeGetVolumeHealth(ctx, &csi.NodeGetVolumeHealthRequest{VolumeId: "v"})
	must(t, err)
	_, err = b.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: "v", StagingTargetPath: b.path("stage"), VolumeCapability: reader, VolumeContext: attrs{"source": "s3://bkt"}})
	must(t, err)
	_, err = b.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: "v", TargetPath: b.path("target")})
	must(t, err)
	_, err = b.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: "v", StagingTargetPath: b.path("stage")})
	must(t, err)
}

func TestNodeHealthNamesWhatIsWrong(t *testing.T) {
	b := start(t)
	health := func() string {
		r, err := b.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: "v"})
		must(t, err)
		text := ""
		for _, s := range r.GetVolumeHealth().GetHealthStatuses() {
			text += s.GetStatus().String() + " " + s.GetReason()
		}
		return text
	}
	must(t, b.stage(t))
	if got := health(); got != "" {
		t.Errorf("healthy: %s", got)
	}
	b.stats.stats = VolumeStats{Condition: "access denied"}
	if got := health(); got != "DEGRADED SourceFailing" {
		t.Errorf("ill source: %q", got)
	}
	b.broker.update("v", func(m *brokerwire.Mount) { m.Served = false })
	if got := health(); got != "DEGRADED WorkerAway" {
		t.Errorf("no worker: %q", got)
	}
	must(t, unix.Unmount(b.path("stage"), 0))
	if got := health(); got != "INACCESSIBLE Unmounted" {
		t.Errorf("unmounted: %q", got)
	}
	must(t, b.unstage(t))
	_, err := b.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: "v"})
	wantCode(t, err, codes.NotFound, "not on this node")
}

// Outside of a cluster nobody but the caller says where a lost volume was.
func TestALostMountIsToldByItsPath(t *testing.T) {
	b := start(t)
	must(t, b.stage(t), b.publish(t, "target"))
	b.broker.forget()
	leak.Unmount(b.dir)
	deadFUSE(t, b.path("target"))
	says := func(want string, code codes.Code, text string) {
		t.Helper()
		r, err := b.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: "v", VolumePublishPath: b.path("target")})
		must(t, err)
		if hs := r.VolumeHealth.HealthStatuses; len(hs) != 1 || hs[0].Status.String()+" "+hs[0].Reason != want {
			t.Errorf("health %v, want %s", hs, want)
		}
		_, err = b.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: "v", VolumePath: b.path("target")})
		wantCode(t, err, code, text)
	}
	b.stats.err = object.ErrUnavailable
	says("DEGRADED WorkerAway", codes.Unavailable, "has given the mount at")
	b.stats.err = object.ErrNotFound
	says("INACCESSIBLE MountLost", codes.NotFound, "must be started again")
	b.stats.err = nil
	must(t, b.stage(t))
	says("INACCESSIBLE MountLost", codes.NotFound, "must be started again")
	must(t, b.unpublish(t, "target"), b.unstage(t))
}

func TestStorageIsIllWhereNothingCanBePublished(t *testing.T) {
	b := start(t)
	for _, ready := range []error{nil, errors.New("no worker")} {
		b.ready = ready
		r, err := b.NodeGetStorageHealth(t.Context(), &csi.NodeGetStorageHealthRequest{})
		if err != nil || (len(r.BackendHealth) == 0) != (ready == nil) {
			t.Errorf("%v, %v with %v", r, err, ready)
		}
	}
}

func TestNodeInfoNamesTheNode(t *testing.T) {
	b := start(t)
	r, err := b.NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})
	if err != nil || r.NodeId != "node-a" || r.MaxVolumesPerNode != 0 || r.AccessibleTopology.Segments["topology.csi.larder.dev/node"] != "node-a" {
		t.Errorf("got %v, %v", r, err)
	}
}
