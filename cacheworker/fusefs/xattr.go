package fusefs

import (
	"strconv"
	"strings"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
)

const xattrPrefix = "user.larder."

// xattrs are those of a file: its version, how many bytes of it are cached, where it comes from.
func (m *Mount) xattrs(n *node) map[string]string {
	if n == nil || n.kind != fileKind {
		return nil
	}
	obj := m.table.objectOf(n)
	return map[string]string{
		xattrPrefix + "version": obj.Version,
		xattrPrefix + "cached":  strconv.FormatInt(m.data.Load().Peek(obj.ID()).PresentBytes, 10),
		xattrPrefix + "source":  string(obj.Store) + "/" + obj.Key,
	}
}

// GetXAttr implements fuse.RawFileSystem.
func (m *Mount) GetXAttr(_ <-chan struct{}, h *fuse.InHeader, attr string, dest []byte) (uint32, fuse.Status) {
	if !strings.HasPrefix(attr, "user.") {
		return 0, fuse.Status(syscall.EOPNOTSUPP) // then ls asks no other file for its ACL and its label
	}
	v, ok := m.xattrs(m.table.get(h.NodeId))[attr]
	if !ok {
		return 0, fuse.Status(syscall.ENODATA)
	}
	return give(v, dest)
}

// ListXAttr implements fuse.RawFileSystem.
func (m *Mount) ListXAttr(_ <-chan struct{}, h *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	if len(m.xattrs(m.table.get(h.NodeId))) == 0 {
		return 0, fuse.OK
	}
	return give(xattrPrefix+strings.Join([]string{"cached", "source", "version"}, "\x00"+xattrPrefix)+"\x00", dest)
}

func give(v string, dest []byte) (uint32, fuse.Status) {
	if len(dest) < len(v) {
		return uint32(len(v)), fuse.ERANGE
	}
	return uint32(copy(dest, v)), fuse.OK
}
