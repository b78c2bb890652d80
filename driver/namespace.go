package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/workerpb"
	"github.com/larderfs/larder/master/client"
	"github.com/larderfs/larder/master/namespace"
)

// Mounted is what the node service has to bring for a volume of a path of the namespace.
type Mounted struct {
	Secrets   []string // of the mounts that it shows: "secret:namespace/name"
	OwnSecret string   // the one of them without which nothing can be read; "" if there is none
}

// Who wants to use what is mounted.
type Who struct {
	Inline    bool   // by a volume whose attributes a user wrote
	Namespace string // Kubernetes namespace of the pod; "" if it is not known
	Undecided bool   // because it will be known later: nobody is refused yet
}

// Mounted implements [Stats].
func (w WorkerStats) Mounted(ctx context.Context, path string, who Who) (Mounted, error) {
	r, err := workerpb.NewWorkerClient(w.Conn).Mounted(ctx, &workerpb.MountedRequest{
		Path: path, Inline: who.Inline, Namespace: who.Namespace, Undecided: who.Undecided,
	})
	text := status.Convert(err).Message()
	switch status.Code(err) {
	case codes.OK:
		return Mounted{Secrets: r.GetSecrets(), OwnSecret: r.GetOwnSecret()}, nil
	case codes.PermissionDenied:
		return Mounted{}, &refusal{text, object.ErrDenied}
	case codes.NotFound:
		return Mounted{}, &refusal{text, object.ErrNotFound}
	case codes.Unimplemented:
		text = "it is of an older version, which knows no paths of the namespace; update the worker of this node"
	}
	return Mounted{}, fmt.Errorf("ask the worker what is mounted at %s: %s: %w", path, text, object.ErrUnavailable)
}

// refusal has a text that says all.
type refusal struct {
	text string
	is   error
}

func (r *refusal) Error() string { return r.text }
func (r *refusal) Unwrap() error { return r.is }

// secretLife is how long a Secret is believed to be what it was: the kubelet publishes every volume of
// every pod again each minute or so.
const secretLife = 30 * time.Second

// mountSecrets reads the Secrets that mounts name. Safe for concurrent use.
type mountSecrets struct {
	read func(ctx context.Context, namespace, name string) (map[string]string, error) // nil outside of a cluster

	mu    sync.Mutex // guards known; held across reads, so that a hundred pods make one
	known map[string]knownSecret
}

type knownSecret struct {
	brokerwire.Credentials
	at time.Time
}

// get is the credential that a mount names. One that was read before is kept if the cluster cannot be
// asked now.
func (s *mountSecrets) get(ctx context.Context, where string) (brokerwire.Credentials, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	had, ok := s.known[where]
	if ok && time.Since(had.at) < secretLife {
		return had.Credentials, nil
	}
	c, err := s.ask(ctx, where)
	switch {
	case err == nil:
		if s.known == nil {
			s.known = map[string]knownSecret{}
		}
		s.known[where] = knownSecret{c, time.Now()}
	case ok && !errors.Is(err, object.ErrInvalid) && !errors.Is(err, object.ErrNotFound):
		return had.Credentials, nil
	}
	return c, err
}

func (s *mountSecrets) ask(ctx context.Context, where string) (c brokerwire.Credentials, err error) {
	space, name, ok := strings.Cut(strings.TrimPrefix(where, "secret:"), "/")
	switch {
	case !ok:
		return c, fmt.Errorf("credential %s: want secret:namespace/name: %w", quote(where), object.ErrInvalid)
	case s.read == nil:
		return c, fmt.Errorf("credential %s: there is no Kubernetes cluster here; use file: or env: (larder mount set PATH --credential …): %w", where, object.ErrInvalid)
	}
	data, err := s.read(ctx, space, name)
	if err != nil {
		return c, fmt.Errorf("credential %s: %w", where, err)
	}
	p := parser{}
	if c = p.credentials(data); p.err() == nil && c.IsZero() {
		p.add("the Secret has no %s", secretID)
	}
	if err := p.err(); err != nil {
		return c, fmt.Errorf("credential %s: %w", where, err)
	}
	return c, nil
}

// mounted adds to a volume of a path whose it is, and the Secrets of what is mounted there. It is
// refused if the mount is not for the pod's Kubernetes namespace; that is not known when it is staged.
func (n *node) mounted(ctx context.Context, want brokerwire.Volume, attrs map[string]string, staging bool) (brokerwire.Volume, error) {
	if want.Path == "" {
		return want, nil
	}
	if p, ok := podOf(attrs); ok && !staging {
		want.Tenant = p.Namespace
	}
	m, err := n.stats.Mounted(ctx, want.Path, Who{Inline: want.Inline, Namespace: want.Tenant, Undecided: staging})
	if err != nil {
		return want, fmt.Errorf("volume %s: %w", quote(want.ID), err)
	}
	want.Secrets, err = n.secretsOf(ctx, want, m)
	return want, err
}

// secretsOf reads the Secrets of what a volume shows. Without that of a mount below its path the rest of
// it can be read all the same.
func (n *node) secretsOf(ctx context.Context, v brokerwire.Volume, m Mounted) (brokerwire.Secrets, error) {
	found := map[string]brokerwire.Credentials{}
	for _, where := range m.Secrets {
		c, err := n.secrets.get(ctx, where)
		switch {
		case err == nil:
			found[where] = c
		case where == m.OwnSecret:
			return brokerwire.Secrets{}, fmt.Errorf("volume %s: what is mounted at %s cannot be read: %w", quote(v.ID), v.Path, err)
		default:
			n.log.Warn("a mount below the path of a volume cannot be read", "volume", v.ID, "path", v.Path, "err", err)
		}
	}
	return brokerwire.NewSecrets(found)
}

// checkTenant refuses to show a volume to a second Kubernetes namespace: what mounts show depends on
// that, and there is one connection.
func checkTenant(v view, m brokerwire.Mount, want brokerwire.Volume, target string) error {
	if m.Volume.Tenant == "" || want.Tenant == m.Volume.Tenant || want.Path == "" {
		return nil
	}
	if others := v.targets(m, target); len(others) > 0 {
		return fmt.Errorf("volume %s is published to Kubernetes namespace %s on this node; a volume of a path is for one of them: use a claim in each: %w",
			quote(want.ID), quote(m.Volume.Tenant), errPrecondition)
	}
	return nil
}

// decided checks the source of a volume whose Kubernetes namespace has become known: when it was staged
// it could not be.
func (n *node) decided(ctx context.Context, m brokerwire.Mount, want brokerwire.Volume) error {
	if want.ServiceAccount == m.Volume.ServiceAccount && (want.Path == "" || want.Tenant == m.Volume.Tenant) {
		return nil
	}
	s, err := n.stats.VolumeStats(ctx, want.ID)
	if err != nil {
		return err
	}
	if !s.Healthy {
		return fmt.Errorf("volume %s: %s cannot be read: %s: %w", quote(want.ID), cmp.Or(want.Path, want.Source), s.Condition, object.ErrUnavailable)
	}
	return nil
}

// refreshMounts hands over the tenant of a volume of a path and the secrets of its mounts, with the
// volume's own credentials if there are any.
func (n *node) refreshMounts(ctx context.Context, m brokerwire.Mount, want brokerwire.Volume) error {
	v := m.Volume
	v.Tenant, v.Secrets, v.Credentials = cmp.Or(want.Tenant, v.Tenant), want.Secrets, want.Credentials
	hand := n.broker.Refresh
	if v.Credentials.IsZero() {
		hand = n.broker.RefreshMounts
	}
	if err := hand(ctx, v); err != nil {
		return fmt.Errorf("refresh what volume %s has of its mounts: %w", quote(m.VolumeID), err)
	}
	return nil
}

// secretsEvery is how often mounts are looked for that came since their volume was published.
const secretsEvery = 5 * time.Second

// bringSecrets brings the Secrets of mounts that appear below the paths of volumes, until ctx ends.
func (n *node) bringSecrets(ctx context.Context) error {
	if n.secrets.read == nil {
		return nil
	}
	tick := time.NewTicker(secretsEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := n.bringMissing(ctx); err != nil && ctx.Err() == nil {
			n.log.Debug("bring the Secrets of new mounts; it will be tried again", "err", err)
		}
	}
}

func (n *node) bringMissing(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, usersTimeout)
	defer cancel()
	held, err := n.broker.Mounts(ctx)
	if err != nil {
		return err
	}
	for _, m := range held {
		if m.Volume.Path == "" {
			continue
		}
		who := Who{Inline: m.Volume.Inline, Namespace: m.Volume.Tenant, Undecided: true} // what it was published for it keeps
		now, err := n.stats.Mounted(ctx, m.Volume.Path, who)
		if errors.Is(err, object.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		missing := slices.ContainsFunc(now.Secrets, func(s string) bool { return !slices.Contains(m.Secrets, s) })
		if !missing {
			continue
		}
		want := m.Volume
		if want.Secrets, err = n.secretsOf(ctx, want, now); err != nil {
			n.log.Log(ctx, slog.LevelWarn, "a mount cannot be read", "volume", m.VolumeID, "err", err)
			continue
		}
		if err := n.refreshMounts(ctx, m, want); err != nil {
			return err
		}
	}
	return nil
}

// checkMounted is for volumes that are made: something has to be mounted at their path, and for the claim's
// Kubernetes namespace, where the provisioner says that.
func (c *controller) checkMounted(ctx context.Context, path string, parameters map[string]string) error {
	if path == "" {
		return nil
	}
	mounts, err := c.volumes.Mounts(ctx)
	if err != nil {
		return fmt.Errorf("ask the master what is mounted: %w", err)
	}
	view, ok := namespace.At(mounts, path)
	if !ok {
		return &refusal{namespace.Nothing(path), client.ErrNotFound}
	}
	claim := parameters[keyClaimNamespace]
	if claim == "" {
		return nil
	}
	if why := view.Refused(namespace.Who{Namespace: claim}); why != "" {
		return &refusal{why, object.ErrDenied}
	}
	return nil
}
