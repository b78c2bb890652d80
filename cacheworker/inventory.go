package cacheworker

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source/s3"
	"github.com/larderfs/larder/master/client"
	"github.com/larderfs/larder/master/inventory"
	"github.com/larderfs/larder/master/record"
)

// shelf is what this worker tells masters over the network: see package inventory.
type shelf struct {
	w    *Worker
	pass chan struct{} // one place: one pass over the index at a time
}

// Counters implements inventory.Worker.
func (s shelf) Counters() client.Stats { return s.w.counts() }

// Held implements inventory.Worker.
func (s shelf) Held(ctx context.Context, at record.Location) (record.Held, error) {
	host, err := hostOf(at)
	if err != nil {
		return record.Held{}, err
	}
	select {
	case s.pass <- struct{}{}:
		defer func() { <-s.pass }()
	case <-ctx.Done():
		return record.Held{}, context.Cause(ctx)
	}
	sum, err := s.w.store.Sum(ctx, func(o object.Store) func([]byte) bool { return keysAt(at, host, string(o)) })
	if err != nil {
		if ctx.Err() == nil {
			err = fmt.Errorf("%w: %w", record.ErrUnavailable, err)
		}
		return record.Held{}, err
	}
	return record.Held{CachedBytes: sum.PresentBytes, Objects: sum.Objects, CompleteObjects: sum.CompleteObjects, Stores: sum.Stores}, nil
}

// Volume implements inventory.Worker.
func (s shelf) Volume(ctx context.Context, id string) (record.MountedVolume, error) {
	ms := s.w.mounts
	h := ms.get(id)
	if h == nil {
		return record.MountedVolume{}, fmt.Errorf("volume %.128q is not served here: %w", id, record.ErrNotFound)
	}
	ms.mu.Lock()
	v, u := h.volume, countsOf(h.meter.usage())
	ms.mu.Unlock()
	_, open := h.Stats()
	out := record.MountedVolume{
		Inline: v.Inline, Namespace: v.Namespace, Claim: v.Claim, Trouble: h.Trouble(troubleFresh), Without: h.without(), OpenFiles: uint64(open),
		Counted: h.since, DiskBytes: u.diskBytes, MemoryBytes: u.memoryBytes, StoreBytes: u.storeBytes, PassedBytes: u.passedBytes,
		FetchedBytes: u.fetchedBytes, HitChunks: u.hits, MissChunks: u.misses,
	}
	if err := json.Unmarshal([]byte(v.Attributes), &out.Parameters); err != nil {
		return out, fmt.Errorf("attributes of volume %s: %w", id, err)
	}
	for _, m := range ms.ofBroker(ctx) {
		if m.VolumeID == id {
			out.Mounted, out.Takeovers, out.LongestStall = m.Since, int64(m.Takeovers), m.LongestStall
		}
	}
	return out, nil
}

// keysAt says which keys of a store are at a location; nil if none can be. host is that of the
// location's endpoint; "" for any.
func keysAt(at record.Location, host, store string) func(key []byte) bool {
	key, ok := keyAt(at, host, store)
	if !ok {
		return nil
	}
	if key == "" {
		return func([]byte) bool { return true }
	}
	folder := []byte(key + "/")
	return func(k []byte) bool {
		return bytes.HasPrefix(k, folder) || !at.Below && string(k) == key
	}
}

// keyAt is the location's key in a store, without a slash at its end; "" for all keys. ok is false where the
// location is not in the store.
func keyAt(at record.Location, host, store string) (key string, ok bool) {
	scheme, rest, _ := strings.Cut(store, "://")
	if scheme != at.Scheme {
		return "", false
	}
	switch scheme {
	case "s3": // host/bucket
		where, bucket, _ := strings.Cut(rest, "/")
		return at.Path, bucket == at.Bucket && (host == "" || where == host)
	case "file": // an absolute path, the root of all keys
		if key, ok = below(rest, at.Path); ok {
			return key, true
		}
		_, ok = below(at.Path, rest)
		return "", ok
	}
	return "", false
}

// hostOf is the host of a location's endpoint; "" for any.
func hostOf(at record.Location) (string, error) {
	if at.Endpoint == "" {
		return "", nil
	}
	host, err := s3.EndpointHost(at.Endpoint, "")
	if err != nil {
		return "", fmt.Errorf("%w: %w", record.ErrInvalid, err)
	}
	return host, nil
}

// network is where masters reach this worker.
type network struct {
	l         net.Listener // nil without Config.Listen
	key       string       // of this process
	advertise string       // host; "" to find out
	masters   string
}

func (w *Worker) openNetwork() (network, error) {
	n := network{key: inventory.NewKey(), advertise: w.cfg.Advertise, masters: w.cfg.Master}
	if w.cfg.Listen == "" {
		return n, nil
	}
	var err error
	if n.l, err = net.Listen("tcp", w.cfg.Listen); err != nil {
		return n, fmt.Errorf("listen for masters: %w", err)
	}
	return n, nil
}

func (w *Worker) serveNetwork(ctx context.Context) error {
	if w.network.l == nil {
		return nil
	}
	s := shelf{w: w, pass: make(chan struct{}, 1)}
	return inventory.Serve(ctx, w.network.l, w.store.UUID().String(), w.network.key, s)
}

// addresses are for the registration; none while the address of this host is not known.
func (n network) addresses() []string {
	if n.l == nil {
		return nil
	}
	at := n.l.Addr().(*net.TCPAddr).AddrPort()
	host := at.Addr().Unmap()
	switch {
	case n.advertise != "":
		host = netip.MustParseAddr(n.advertise) // Validate has seen it
	case host.IsUnspecified():
		var ok bool
		if host, ok = towards(n.masters); !ok {
			return nil
		}
	}
	return []string{netip.AddrPortFrom(host, at.Port()).String()}
}

// towards is the address that this host has for one of the masters, as far as it can be told
// without sending anything.
func towards(masters string) (netip.Addr, bool) {
	for m := range strings.SplitSeq(masters, ",") {
		if strings.HasPrefix(m, "unix:") {
			continue
		}
		c, err := net.DialTimeout("udp", m, time.Second)
		if err != nil {
			continue // its name is not known yet, say
		}
		defer c.Close()
		return c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(), true
	}
	return netip.Addr{}, false
}
