package cacheworker

import (
	"cmp"
	"slices"
	"sync"

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

// account is guarded by accounts.mu.
type account struct {
	past counts            // of meters while they counted for it
	now  map[*meter]counts // those that do, with what each had counted before
}

// counts are a [fill.Usage] at one moment.
type counts struct {
	diskBytes, memoryBytes, storeBytes, fetchedBytes, hits, misses, passedBytes uint64
}

func countsOf(u *fill.Usage) counts {
	return counts{u.DiskBytes.Load(), u.MemoryBytes.Load(), u.StoreBytes.Load(), u.Fetched.Load(), u.Hits.Load(), u.Misses.Load(), u.Passed.Load()}
}

// plus adds what has been counted from one moment to another.
func (c counts) plus(from, to counts) counts {
	return counts{
		c.diskBytes + to.diskBytes - from.diskBytes, c.memoryBytes + to.memoryBytes - from.memoryBytes, c.storeBytes + to.storeBytes - from.storeBytes,
		c.fetchedBytes + to.fetchedBytes - from.fetchedBytes, c.hits + to.hits - from.hits, c.misses + to.misses - from.misses, c.passedBytes + to.passedBytes - from.passedBytes,
	}
}

func (a *account) sum() counts {
	sum := a.past
	for m, before := range a.now {
		sum = sum.plus(before, countsOf(&m.use))
	}
	return sum
}

// leave requires accounts.mu.
func (a *account) leave(m *meter) {
	a.past = a.past.plus(a.now[m], countsOf(&m.use))
	delete(a.now, m)
}

// maxAccounts of a worker: each has a dozen time series.
const maxAccounts = 100

func newAccounts(max int) *accounts { return &accounts{max: max, of: map[claim]*account{}} }

// open counts for one more volume. The meter has to be closed.
func (a *accounts) open(c claim) *meter {
	a.mu.Lock()
	defer a.mu.Unlock()
	m := &meter{a: a}
	a.join(m, c)
	return m
}

// join has a meter count for the claim's account, or for that of all others. Requires a.mu.
func (a *accounts) join(m *meter, c claim) {
	acc := a.of[c]
	if acc == nil && len(a.of) >= a.max {
		for k, old := range a.of {
			if len(old.now) == 0 {
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
	if acc.now == nil {
		acc.now = map[*meter]counts{}
	}
	acc.now[m] = countsOf(&m.use)
	m.claim, m.at = c, acc
}

type namedAccount struct {
	claim
	counts
}

// all are by claim; that of all others is there if it was ever needed.
func (a *accounts) all() []namedAccount {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []namedAccount
	for c, acc := range a.of {
		out = append(out, namedAccount{c, acc.sum()})
	}
	slices.SortFunc(out, func(x, y namedAccount) int {
		return cmp.Or(cmp.Compare(x.namespace, y.namespace), cmp.Compare(x.name, y.name))
	})
	if sum := a.other.sum(); len(a.other.now) > 0 || sum.hits+sum.misses > 0 {
		out = append(out, namedAccount{otherClaims, sum})
	}
	return out
}

// meter is where one volume is counted. What is counted after it was closed, nobody is charged with.
type meter struct {
	a   *accounts
	use fill.Usage

	claim  claim // guarded by a.mu, as are the fields below
	at     *account
	closed bool
}

func (m *meter) usage() *fill.Usage { return &m.use }

// name has it counted for another claim from now on.
func (m *meter) name(c claim) {
	m.a.mu.Lock()
	defer m.a.mu.Unlock()
	if m.closed || c == m.claim {
		return
	}
	m.at.leave(m)
	m.a.join(m, c)
}

func (m *meter) close() {
	m.a.mu.Lock()
	defer m.a.mu.Unlock()
	if !m.closed {
		m.closed = true
		m.at.leave(m)
	}
}
