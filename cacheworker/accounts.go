package cacheworker

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/fill"
	"github.com/larderfs/larder/master/client"
)

// claim is who has a volume, in a cluster: an inline one has a namespace only, and outside of a cluster nobody does.
type claim struct{ namespace, name string }

// otherClaims are those that have no account of their own.
var otherClaims = claim{"other", "other"}

// claimOf is known when the volume is mounted, or when the kubelet has told which pods use it.
func claimOf(v brokerwire.Volume, pods []client.Pod) claim {
	c := claim{v.Namespace, v.Claim}
	if c.namespace == "" && len(pods) > 0 {
		c.namespace = pods[0].Namespace
	}
	return c
}

// accounts are what the volumes of each claim read, of at most so many claims; all others are one account. An
// account outlives its volumes, so that it only grows, until its place is needed.
type accounts struct {
	max int

	mu    sync.Mutex // guards the fields below
	of    map[claim]*account
	other account
}

type account struct {
	fill.Usage
	volumes int // that are mounted; guarded by accounts.mu
}

// maxAccounts of a worker: each has a dozen time series.
const maxAccounts = 100

func newAccounts(max int) *accounts { return &accounts{max: max, of: map[claim]*account{}} }

// open counts for one more volume. The meter has to be closed.
func (a *accounts) open(c claim) *meter {
	a.mu.Lock()
	defer a.mu.Unlock()
	m := &meter{a: a, claim: c}
	m.at.Store(a.join(c))
	return m
}

// join returns the claim's account, or that of all others. Requires a.mu.
func (a *accounts) join(c claim) *account {
	acc := a.of[c]
	if acc == nil && len(a.of) >= a.max {
		for k, old := range a.of {
			if old.volumes == 0 {
				delete(a.of, k)
				break
			}
		}
	}
	switch {
	case acc != nil:
	case len(a.of) >= a.max || c == otherClaims:
		acc = &a.other
	default:
		acc = &account{}
		a.of[c] = acc
	}
	acc.volumes++
	return acc
}

type namedAccount struct {
	claim
	*account
}

// all are by claim; that of all others is there if it was ever needed.
func (a *accounts) all() []namedAccount {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []namedAccount
	for c, acc := range a.of {
		out = append(out, namedAccount{c, acc})
	}
	slices.SortFunc(out, func(x, y namedAccount) int {
		return cmp.Or(cmp.Compare(x.namespace, y.namespace), cmp.Compare(x.name, y.name))
	})
	if u := &a.other; u.volumes > 0 || u.Hits.Load()+u.Misses.Load() > 0 {
		out = append(out, namedAccount{otherClaims, u})
	}
	return out
}

// meter is where one volume is counted.
type meter struct {
	a  *accounts
	at atomic.Pointer[account]

	claim  claim // guarded by a.mu, as is closed
	closed bool
}

func (m *meter) usage() *fill.Usage { return &m.at.Load().Usage }

// name has it counted for another claim from now on.
func (m *meter) name(c claim) {
	m.a.mu.Lock()
	defer m.a.mu.Unlock()
	if m.closed || c == m.claim {
		return
	}
	m.at.Load().volumes--
	m.claim = c
	m.at.Store(m.a.join(c))
}

func (m *meter) close() {
	m.a.mu.Lock()
	defer m.a.mu.Unlock()
	if !m.closed {
		m.closed = true
		m.at.Load().volumes--
	}
}
