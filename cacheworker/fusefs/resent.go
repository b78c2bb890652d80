package fusefs

import (
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// counted is a mount as the kernel asks it. It counts the requests that an earlier worker has left
// and this one has answered; those that only refuse are not counted. It takes the time of those that may wait
// for a store, but for READs, most of which do not.
type counted struct{ *Mount }

// resent reports whether the kernel delivers a request again, which may have been executed.
func resent(h *fuse.InHeader) bool { return h.Unique>>63 == 1 }

func (c counted) answered(h *fuse.InHeader) {
	if !resent(h) {
		return
	}
	c.cfg.Counters.Resent.Add(1)
	c.inherited.Do(func() { c.cfg.Log.Info("answers what an earlier worker left", "volume", c.cfg.Volume.ID) })
}

func (c counted) took(op int, since time.Time) { c.cfg.Counters.Took[op].Since(since) }

func (c counted) Lookup(cancel <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	defer c.answered(h)
	defer c.took(opLookup, time.Now())
	return c.Mount.Lookup(cancel, h, name, out)
}

func (c counted) GetAttr(cancel <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	defer c.answered(&in.InHeader)
	return c.Mount.GetAttr(cancel, in, out)
}

func (c counted) GetXAttr(cancel <-chan struct{}, h *fuse.InHeader, attr string, dest []byte) (uint32, fuse.Status) {
	defer c.answered(h)
	return c.Mount.GetXAttr(cancel, h, attr, dest)
}

func (c counted) ListXAttr(cancel <-chan struct{}, h *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	defer c.answered(h)
	return c.Mount.ListXAttr(cancel, h, dest)
}

func (c counted) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	defer c.answered(&in.InHeader)
	defer c.took(opOpen, time.Now())
	return c.Mount.Open(cancel, in, out)
}

func (c counted) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	defer c.answered(&in.InHeader)
	return c.Mount.Read(cancel, in, buf)
}

func (c counted) OpenDir(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	defer c.answered(&in.InHeader)
	return c.Mount.OpenDir(cancel, in, out)
}

func (c counted) ReadDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	defer c.answered(&in.InHeader)
	defer c.took(opReaddir, time.Now())
	return c.Mount.ReadDir(cancel, in, out)
}

func (c counted) ReadDirPlus(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	defer c.answered(&in.InHeader)
	defer c.took(opReaddir, time.Now())
	return c.Mount.ReadDirPlus(cancel, in, out)
}

func (c counted) StatFs(cancel <-chan struct{}, h *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	defer c.answered(h)
	return c.Mount.StatFs(cancel, h, out)
}

func (c counted) Mknod(cancel <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	defer c.answered(&in.InHeader)
	return c.Mount.Mknod(cancel, in, name, out)
}

func (c counted) Unlink(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	defer c.answered(h)
	return c.Mount.Unlink(cancel, h, name)
}
