package cachestore

import (
	"testing"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
)

func principal(n byte) object.Principal { return object.Principal{n} }

func TestGrants(t *testing.T) {
	cfg := testConfig(t, t.TempDir(), 16*chunk)
	s := open(t, cfg)
	a, b := obj("a", chunk), obj("b", chunk)
	b.Store = "s3://host/other"
	fill(t, s, a, b)
	alice, bob, carol := principal(1), principal(2), principal(3)
	now := time.Now()
	s.Grant(a, alice, now)
	s.Grant(b, alice, now)
	s.Grant(a, bob, now.Add(-25*time.Hour))
	s.Grant(a, carol, now)
	s.Grant(a, object.Principal{}, now)
	s.Grant(obj("never cached", 5), alice, now)
	check := func(when string, o object.Object, p object.Principal, want bool) {
		t.Helper()
		if got := s.Granted(o.ID(), p); got != want {
			t.Errorf("%s: granted(%s, %d) = %v", when, o.Key, p[0], got)
		}
	}
	for _, when := range []string{"at once", "after a restart"} {
		check(when, a, alice, true)
		check(when, b, alice, true)
		check(when, a, bob, false) // too old
		check(when, a, carol, true)
		check(when, b, carol, false)
		check(when, a, object.Principal{}, false)
		check(when, obj("never cached", 5), alice, false)
		if when == "at once" {
			s = reopen(t, s, cfg, "boot-1")
		}
	}
	s.Revoke(alice, a.Store)
	s.Revoke(bob, b.Store) // had none
	for _, when := range []string{"revoked", "revoked, after a restart"} {
		check(when, a, alice, false)
		check(when, b, alice, true) // another store
		check(when, a, carol, true) // another principal
		if when == "revoked" {
			s = reopen(t, s, cfg, "boot-1")
		}
	}
	s.Grant(a, alice, time.Now())
	check("granted again", a, alice, true)
	s = reopen(t, s, cfg, "boot-1")
	check("granted again, after a restart", a, alice, true)
	s.Grant(a, bob, time.Now())
	check("renewed", a, bob, true)

	s.Evict(a.ID())
	fill(t, s, a)
	check("cached again after eviction", a, alice, false)
}
