package cacheworker

import (
	"fmt"
	"testing"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/master/client"
)

// read is what the accounts say was read from disk, by claim.
func read(a *accounts) map[claim]uint64 {
	out := map[claim]uint64{}
	for _, acc := range a.all() {
		out[acc.claim] += acc.diskBytes
	}
	return out
}

func TestVolumesOfOneClaimAreOneAccountThatOnlyGrows(t *testing.T) {
	a := newAccounts(2)
	sales := claim{"prod", "sales"}
	first, second := a.open(sales), a.open(sales)
	first.usage().DiskBytes.Add(3)
	second.usage().DiskBytes.Add(4)
	first.close()
	first.close() // once is enough
	if got := read(a)[sales]; got != 7 {
		t.Errorf("%d bytes of 7", got)
	}
	second.close()
	again := a.open(sales)
	again.usage().DiskBytes.Add(1)
	if got := read(a)[sales]; got != 8 {
		t.Errorf("%d bytes of 8 after its volumes had ended and came back", got)
	}
}

func TestAccountsAreBounded(t *testing.T) {
	const most = 3
	a := newAccounts(most)
	var meters []*meter
	for i := range 2 * most {
		m := a.open(claim{"ns", fmt.Sprint(i)})
		m.usage().DiskBytes.Add(1)
		meters = append(meters, m)
	}
	if got := read(a); len(got) != most+1 || got[otherClaims] != most {
		t.Errorf("%v: want %d claims with one byte each, and %d of others", got, most, most)
	}
	meters[0].close() // its place is given to the next one
	a.open(claim{"ns", "new"}).usage().DiskBytes.Add(5)
	if got := read(a); len(got) != most+1 || got[claim{"ns", "new"}] != 5 || got[claim{"ns", "0"}] != 0 {
		t.Errorf("%v", got)
	}
	if m := a.open(otherClaims); m.at != &a.other {
		t.Error("a claim that is called other is not among the others")
	}
}

func TestAVolumeIsCountedForItsClaimFromWhenThatIsKnown(t *testing.T) {
	a := newAccounts(9)
	pods := []client.Pod{{Namespace: "prod", Name: "reader"}}
	static := brokerwire.Volume{ID: "static"}
	m := a.open(claimOf(static, nil))
	m.usage().DiskBytes.Add(1)
	m.name(claimOf(static, pods))
	m.usage().DiskBytes.Add(2)
	if got := read(a); got[claim{}] != 1 || got[claim{"prod", ""}] != 2 {
		t.Errorf("%v", got)
	}
	if got := claimOf(brokerwire.Volume{Namespace: "sales", Claim: "orders"}, pods); got != (claim{"sales", "orders"}) {
		t.Errorf("a claim is taken for %v", got)
	}
	if got := m.usage().DiskBytes.Load(); got != 3 {
		t.Errorf("the volume itself has %d bytes of 3", got)
	}
	m.close()
	m.name(claim{"late", ""})
	if _, there := read(a)[claim{"late", ""}]; there {
		t.Error("a volume that has gone was named")
	}
}
