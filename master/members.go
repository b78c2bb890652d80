package master

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/server/v3/embed"
)

// Member makes a master one of several that hold the store together: each embeds one member of
// an etcd cluster, and what they acknowledge is on the disks of most of them.
type Member struct {
	Name    string // of this one
	Cluster string // all of them, "name=http://host:port,…", alike on each
	Listen  string // "host:port" for the others

	CAFile   string // PEM files, for https; each proves to the others who it is
	CertFile string
	KeyFile  string
}

// set reports whether there are others.
func (m Member) set() bool { return m.Name+m.Cluster != "" }

// urls are those of all members by name.
func (m Member) urls() (map[string]string, error) {
	us := map[string]string{}
	var errs []error
	for entry := range strings.SplitSeq(m.Cluster, ",") {
		name, at, ok := strings.Cut(entry, "=")
		u, err := url.Parse(at)
		switch {
		case !ok || name == "" || err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Port() == "" || u.Hostname() == "" || strings.Trim(u.Path, "/") != "" || u.User != nil:
			errs = append(errs, fmt.Errorf("initial cluster: %q: want name=http://host:port", entry))
		case us[name] != "":
			errs = append(errs, fmt.Errorf("initial cluster: %q is named twice", name))
		default:
			us[name] = u.Scheme + "://" + u.Host
		}
	}
	return us, errors.Join(errs...)
}

func (m Member) validate() error {
	if !m.set() {
		if m.CAFile+m.CertFile+m.KeyFile != "" {
			return errors.New("peer certificates: set with an initial cluster only")
		}
		return nil
	}
	us, err := m.urls()
	errs := []error{err}
	if err == nil {
		secure := 0
		for _, u := range us {
			if strings.HasPrefix(u, "https://") {
				secure++
			}
		}
		if us[m.Name] == "" {
			errs = append(errs, fmt.Errorf("name %q is not in the initial cluster", m.Name))
		}
		if len(us)%2 == 0 {
			errs = append(errs, fmt.Errorf("initial cluster of %d: want an odd number, 3 for one that may be missing", len(us)))
		}
		if want := len(us); secure != 0 && secure != want || (secure == want) != (m.CertFile != "") {
			errs = append(errs, errors.New("initial cluster: want https:// for all, with certificates, or http:// for all, without"))
		}
	}
	if _, _, err := net.SplitHostPort(m.Listen); err != nil {
		errs = append(errs, fmt.Errorf("peer listen %q: want host:port", m.Listen))
	}
	if (m.CertFile == "") != (m.KeyFile == "") || (m.CertFile == "") != (m.CAFile == "") {
		errs = append(errs, errors.New("peer certificates: set the authority, the certificate and its key, or none"))
	}
	return errors.Join(errs...)
}

// apply makes the configuration of one of several members of that of a single one. The others
// are across a network, so the ticks are etcd's own.
func (m Member) apply(c *embed.Config) error {
	us, err := m.urls()
	if err != nil {
		return err
	}
	self, err := url.Parse(us[m.Name])
	if err != nil {
		return err
	}
	c.Name, c.InitialClusterToken = m.Name, "larder"
	var entries []string
	for name, u := range us {
		entries = append(entries, name+"="+u)
	}
	slices.Sort(entries)
	c.InitialCluster = strings.Join(entries, ",")
	host, port, err := net.SplitHostPort(m.Listen)
	if err != nil {
		return err
	}
	if host == "" { // etcd wants an address
		host = "0.0.0.0"
	}
	c.ListenPeerUrls = []url.URL{{Scheme: self.Scheme, Host: net.JoinHostPort(host, port)}}
	c.AdvertisePeerUrls = []url.URL{*self}
	c.AdvertiseClientUrls = []url.URL{*self} // for nobody; but by them etcd knows a member that has lost its disk, and must not vote again
	c.PeerTLSInfo = transport.TLSInfo{TrustedCAFile: m.CAFile, CertFile: m.CertFile, KeyFile: m.KeyFile, ClientCertAuth: m.CertFile != ""}
	c.TickMs, c.ElectionMs = 100, 1000
	c.SnapshotCount, c.SnapshotCatchUpEntries = 10_000, 5_000 // for one that was away
	return nil
}

// checkMembers holds what a store that was there before says of its members against the configuration:
// etcd believes the store.
func (m Member) checkMembers(etcd *embed.Etcd) error {
	want := 1
	if m.set() {
		us, err := m.urls()
		if err != nil {
			return err
		}
		want = len(us)
	}
	if have := len(etcd.Server.Cluster().Members()); have != want {
		return fmt.Errorf("the store there is of %d masters, the configuration of %d: start with an empty directory (workers tell their volumes again), or as before", have, want)
	}
	return nil
}
