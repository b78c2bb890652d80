package source

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/sanity/leak"
)

func TestMain(m *testing.M) { os.Exit(leak.Run(m)) }

func TestSplitTakesTheNameBelowThePrefix(t *testing.T) {
	long := strings.Repeat("n", 255)
	for _, c := range []struct {
		prefix, key, name string
		folder, ok        bool
	}{
		{"", "a", "a", false, true},
		{"", "a/", "a", true, true},
		{"", "a/b/c", "a", true, true},
		{"a/", "a/b", "b", false, true},
		{"a/", "a/b/c", "b", true, true},
		{"a/", "a/b//c", "b", true, true}, // seen when b is listed
		{"", long, long, false, true},
		{"", "...", "...", false, true},
		{"", "\xff", "\xff", false, true},
		{"", long + "n", long + "n", false, false},
		{"", ".", ".", false, false},
		{"", "../a", "..", true, false},
		{"", "/a", "", true, false},
		{"a/", "a//b", "", true, false},
		{"a/", "a/", "", false, false},
		{"", "a\x00", "a\x00", false, false},
		{"b/", "a/b", "", false, false},
	} {
		name, folder, ok := Split(c.prefix, c.key)
		if name != c.name || folder != c.folder || ok != c.ok {
			t.Errorf("%q below %q: %q %v %v", c.key, c.prefix, name, folder, ok)
		}
	}
}

func TestPrincipalIsTheWholeCredentialOnThisNode(t *testing.T) {
	seen := map[object.Principal]string{}
	for name, p := range map[string]object.Principal{
		"a":           PrincipalOf([]byte("k"), "id", "secret", "token"),
		"other node":  PrincipalOf([]byte("l"), "id", "secret", "token"),
		"secret":      PrincipalOf([]byte("k"), "id", "other", "token"),
		"token":       PrincipalOf([]byte("k"), "id", "secret", ""),
		"shifted":     PrincipalOf([]byte("k"), "idsecret", "", "token"),
		"anonymous":   PrincipalOf([]byte("k"), "", "", ""),
		"ambient":     Ambient([]byte("k")),
		"called that": PrincipalOf([]byte("k"), "ambient", "", ""),
		"nobody":      {},
	} {
		if other, ok := seen[p]; ok {
			t.Errorf("%s is %s", name, other)
		}
		seen[p] = name
	}
	if p := PrincipalOf([]byte("k"), "id", "secret", "token"); seen[p] != "a" {
		t.Error("one credential is two principals")
	}
}

// FuzzSplit: whatever the key, a name that is accepted is one path segment, leads back to
// the key, and is accepted by whoever asks for it next.
func FuzzSplit(f *testing.F) {
	for _, key := range []string{"a/b/c", "a//b", "../x", "a/", "/", "", "a/./b", "a\x00b", strings.Repeat("n", 256), "\xff/\xfe", "a/\U0010FFFF"} {
		f.Add("a/", key)
		f.Add("", key)
	}
	f.Fuzz(func(t *testing.T, prefix, key string) {
		name, folder, ok := Split(prefix, key)
		if !ok {
			return
		}
		if name == "" || name == "." || name == ".." || len(name) > 255 || strings.ContainsAny(name, "/\x00") {
			t.Fatalf("%q is no path segment", name)
		}
		rest, found := strings.CutPrefix(key, prefix+name)
		if !found || folder != strings.HasPrefix(rest, "/") || !folder && rest != "" {
			t.Fatalf("%q below %q is %q, folder %v", key, prefix, name, folder)
		}
		if err := CheckKey(name); err != nil {
			t.Fatal(err)
		}
		if err := CheckPrefix(name + "/"); err != nil {
			t.Fatal(err)
		}
		behind := AfterName(name, folder)
		if shown := key[len(prefix):]; !folder && behind < shown || folder && behind < name+"/" {
			t.Fatalf("%q does not lie behind %q", behind, shown)
		}
	})
}

// FuzzCheckKey: an accepted key is the walk of its own segments, and only that.
func FuzzCheckKey(f *testing.F) {
	for _, key := range []string{"a/b/c", "a//b", "../x", "a/", "/", "", "a/./b", "a\x00b", strings.Repeat("n/", 256) + "n"} {
		f.Add(key)
	}
	f.Fuzz(func(t *testing.T, key string) {
		err := CheckKey(key)
		if err != nil && !errors.Is(err, object.ErrInvalid) {
			t.Fatal(err)
		}
		prefix, walked := "", err == nil
		for {
			name, folder, ok := Split(prefix, key)
			if !ok {
				walked = false
			}
			if !ok || !folder {
				break
			}
			prefix += name + "/"
		}
		if walked != (err == nil) || walked && CheckPrefix(key+"/") != nil {
			t.Fatalf("%q: check says %v, walking it %v", key, err, walked)
		}
	})
}
