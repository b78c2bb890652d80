package cacheworker

import (
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"sync"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
	"github.com/larderfs/larder/cacheworker/source/file"
	"github.com/larderfs/larder/cacheworker/source/s3"
)

// sources opens under stores. Sources with the same store and credential are one, however
// many volumes read through them.
type sources struct {
	resolver
	cfg      Config
	nodeKey  []byte
	observer source.Observer

	mu         sync.Mutex // guards the fields below; held while opening, which asks no store
	s3s        map[s3Key]source.Source
	transports map[refusals]http.RoundTripper
	guards     map[string]*source.Guard // by the store's address, whoever asks it for which bucket
	root       source.Source
	gone       source.GuardStats // of guards that are not in the map any more
	sessions   map[sessionKey]*s3.Session
}

// transport is for an administrator's volume, or for one whose attributes a user wrote: that
// reaches no link-local address, and a loopback one only where the administrator's list
// names it literally (DESIGN §5.10). What is mounted in the namespace is an administrator's, who
// may not be the one who runs this process: it reaches no link-local address either.
func (s *sources) transport(v brokerwire.Volume) http.RoundTripper {
	var cfg refusals
	if v.Path != "" {
		cfg = refusals{linkLocal: true}
	}
	if v.Inline {
		cfg = refusals{linkLocal: true, loopback: !loopbackHost(v.Endpoint)}
	}
	if t := s.transports[cfg]; t != nil {
		return t
	}
	t := s3.NewTransport(s3.TransportConfig{RefuseLinkLocal: cfg.linkLocal, RefuseLoopback: cfg.loopback})
	if s.transports == nil {
		s.transports = map[refusals]http.RoundTripper{}
	}
	s.transports[cfg] = t
	return t
}

// guard is the one of a store.
func (s *sources) guard(v brokerwire.Volume) (*source.Guard, error) {
	host, err := s3.EndpointHost(v.Endpoint, v.Region)
	if err != nil {
		return nil, err
	}
	if g := s.guards[host]; g != nil {
		return g, nil
	}
	if s.guards == nil || len(s.guards) >= maxSources {
		for _, g := range s.guards {
			st := g.Stats()
			s.gone.Trips, s.gone.Retries = s.gone.Trips+st.Trips, s.gone.Retries+st.Retries
		}
		s.guards = map[string]*source.Guard{}
	}
	s.guards[host] = source.NewGuard(source.GuardConfig{Store: host, Log: s.cfg.Log})
	return s.guards[host], nil
}

// guardStats are those of all stores together; shut is how many of them are left alone now.
func (s *sources) guardStats() (sum source.GuardStats, shut int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sum = s.gone
	for _, g := range s.guards {
		st := g.Stats()
		sum.Trips, sum.Retries, sum.Waiting = sum.Trips+st.Trips, sum.Retries+st.Retries, sum.Waiting+st.Waiting
		if st.Shut {
			shut++
		}
	}
	return sum, shut
}

type refusals struct{ linkLocal, loopback bool }

func loopbackHost(endpoint string) bool {
	u, err := url.Parse(endpoint)
	if err != nil {
		return false
	}
	a, err := netip.ParseAddr(u.Hostname())
	return u.Hostname() == "localhost" || err == nil && a.Unmap().IsLoopback()
}

type s3Key struct {
	bucket, endpoint, region string
	pathStyle, ambient       bool
	inline, mount            bool
	credentials              brokerwire.Credentials
	session                  *s3.Session
	proven                   bool
}

// S3 implements dataset.Sources.
func (s *sources) S3(bucket string, v brokerwire.Volume, ambient bool) (source.Source, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s3Key{bucket, v.Endpoint, v.Region, v.PathStyle, ambient, v.Inline, v.Path != "", v.Credentials, nil, false}
	if v.CredentialsOf == brokerwire.CredentialsPod {
		session, err := s.session(v)
		if err != nil {
			return nil, err
		}
		k.credentials, k.session, k.proven = brokerwire.Credentials{}, session, v.Proven || session.Proven()
	}
	if src := s.s3s[k]; src != nil {
		return src, nil
	}
	guard, err := s.guard(v)
	if err != nil {
		return nil, err
	}
	src, err := s3.New(s3.Config{
		Bucket: bucket, Endpoint: v.Endpoint, Region: v.Region, PathStyle: v.PathStyle,
		Credentials: s3.Credentials{AccessKeyID: k.credentials.AccessKeyID, SecretAccessKey: k.credentials.SecretAccessKey,
			SessionToken: k.credentials.SessionToken},
		Session: k.session, Proven: k.proven, Volume: v.ID,
		Ambient: ambient, NodeKey: s.nodeKey, Transport: s.transport(v), Observer: s.observer, Guard: guard,
	})
	if err != nil {
		return nil, err
	}
	if s.s3s == nil || len(s.s3s) >= maxSources { // session tokens come and go
		s.s3s = map[s3Key]source.Source{}
	}
	s.s3s[k] = src
	return src, nil
}

const maxSources = 1024

// File implements dataset.Sources.
func (s *sources) File(path string) (source.Source, string, error) {
	rel, ok := below(s.cfg.FileRoot, path)
	if s.cfg.FileRoot == "" || !ok {
		return nil, "", fmt.Errorf("source file://%s is not below the worker's --file-root %q: %w", path, s.cfg.FileRoot, object.ErrInvalid)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.root == nil {
		open := s.cfg.FileRootPath
		if open == "" {
			open = s.cfg.FileRoot
		}
		src, err := file.New(file.Config{Root: open, Name: s.cfg.FileRoot, NodeKey: s.nodeKey, Observer: s.observer})
		if err != nil {
			return nil, "", err
		}
		s.root = src
	}
	return s.root, rel, nil
}
