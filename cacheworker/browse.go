package cacheworker

import (
	"context"
	"errors"
	"io"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/dataset"
	"github.com/larderfs/larder/cacheworker/domainsocket"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/workerpb"
	"github.com/larderfs/larder/master/record"
)

// browser is the whole namespace, for an administrator: each mount is read with its own credential, as far as
// this worker has that. What it reads is counted by m.
func (w *Worker) browser(m *meter) (socketVolume, error) {
	t, known := w.namespace.last()
	if !known {
		return socketVolume{}, errNoTable
	}
	have := map[string]brokerwire.Credentials{} // that volumes brought
	for _, h := range w.mounts.all() {
		w.mounts.mu.Lock()
		secrets := h.volume.Secrets
		w.mounts.mu.Unlock()
		for _, name := range secrets.Names() {
			have[name], _ = secrets.Get(name)
		}
	}
	secrets, err := brokerwire.NewSecrets(have)
	if err != nil {
		return socketVolume{}, err
	}
	v := brokerwire.Volume{ID: "larder fs", Path: "/", Complete: brokerwire.CompleteNever, Secrets: secrets}
	return socketVolume{w.mounts, &held{data: dataset.OpenAll(v, t.Mounts, w.deps(m)), volume: v}}, nil
}

// browse checks who asks, and for what, and calls f with the path below the root.
func (c control) browse(ctx context.Context, path string, f func(v socketVolume, rel string) error) error {
	if p, ok := peer.FromContext(ctx); !ok || !mayAsk(p.Addr) {
		return status.Error(codes.PermissionDenied, "only the worker's own user and root may")
	}
	path, err := record.ParsePath(path)
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	m := c.w.accounts.open(claim{})
	defer m.close()
	v, err := c.w.browser(m)
	if err == nil {
		err = f(v, strings.TrimPrefix(path, "/"))
	}
	return browseStatus(err)
}

// browseCodes is the whole mapping; what it does not list is Unavailable: a store's trouble.
var browseCodes = []struct {
	err  error
	code codes.Code
}{
	{context.Canceled, codes.Canceled},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{object.ErrNotFound, codes.NotFound},
	{object.ErrDenied, codes.PermissionDenied},
	{object.ErrInvalid, codes.InvalidArgument},
	{object.ErrChanged, codes.Aborted},
}

func browseStatus(err error) error {
	if err == nil {
		return nil
	}
	for _, row := range browseCodes {
		if errors.Is(err, row.err) {
			return status.Error(row.code, err.Error())
		}
	}
	return status.Error(codes.Unavailable, err.Error())
}

const browsePage = 1000 // entries of an answer at most

// ListFolder implements workerpb.WorkerServer.
func (c control) ListFolder(ctx context.Context, req *workerpb.ListFolderRequest) (*workerpb.ListFolderReply, error) {
	reply := &workerpb.ListFolderReply{}
	return reply, c.browse(ctx, req.GetPath(), func(v socketVolume, rel string) error {
		es, more, err := v.List(ctx, rel, req.GetAfter(), browsePage)
		if err != nil {
			return err
		}
		for _, e := range es {
			reply.Entries = append(reply.Entries, pathEntry(e))
		}
		if more {
			last := es[len(es)-1]
			if reply.Next = last.Name; last.Folder {
				reply.Next += "/"
			}
		}
		return nil
	})
}

func pathEntry(e domainsocket.Entry) *workerpb.PathEntry {
	out := &workerpb.PathEntry{Name: e.Name, Folder: e.Folder, Size: e.Size, Version: e.Version, CachedBytes: e.CachedBytes}
	if !e.Folder {
		out.Modified = timestamppb.New(e.ModTime)
	}
	return out
}

// StatPath implements workerpb.WorkerServer.
func (c control) StatPath(ctx context.Context, req *workerpb.StatPathRequest) (reply *workerpb.PathEntry, err error) {
	err = c.browse(ctx, req.GetPath(), func(v socketVolume, rel string) error {
		e, err := v.Stat(ctx, rel)
		reply = pathEntry(e)
		return err
	})
	return reply, err
}

const browsePiece = 256 << 10 // bytes of a message

// ReadFile implements workerpb.WorkerServer.
func (c control) ReadFile(req *workerpb.ReadFileRequest, stream grpc.ServerStreamingServer[workerpb.FileBytes]) error {
	ctx := stream.Context()
	return c.browse(ctx, req.GetPath(), func(v socketVolume, rel string) error {
		f, err := v.Open(ctx, rel)
		if err != nil {
			return err
		}
		defer f.Close()
		buf := make([]byte, browsePiece)
		for off := int64(0); off < f.Object().Size; {
			n, err := f.ReadAt(ctx, buf, off)
			if err != nil && !(errors.Is(err, io.EOF) && n > 0) {
				return err
			}
			if err := stream.Send(&workerpb.FileBytes{Data: buf[:n]}); err != nil {
				return err
			}
			off += int64(n)
		}
		return nil
	})
}
