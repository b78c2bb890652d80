package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/larderfs/larder/cacheworker/tiers"
)

func TestTiersAreParsed(t *testing.T) {
	for text, want := range map[string]tier{
		"/var/cache/larder:10GiB": {dir: "/var/cache/larder", bytes: 10 << 30},
		"/dev/shm/larder:1GB:MEM": {dir: "/dev/shm/larder", bytes: 1e9, kind: tiers.Memory},
		"/mnt/a:b:2TiB:HDD":       {dir: "/mnt/a:b", bytes: 2 << 40, kind: tiers.HDD},
		"/mnt/SSD:4096:SSD":       {dir: "/mnt/SSD", bytes: 4096},
	} {
		got, err := parseTier(text)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", text, got, err, want)
		}
		if again, err := parseTier(got.String()); err != nil || again != got {
			t.Errorf("%s: written %s, read %+v, %v", text, got, again, err)
		}
	}
	for _, text := range []string{"", "/a", "/a:", ":1GiB", "/a:MEM", "/a:1GiB:RAM", ":MEM", "/a:0:SSD", "/a:1GiB:ssd"} {
		if got, err := parseTier(text); err == nil {
			t.Errorf("%q is %+v", text, got)
		}
	}
}

func TestTheTierFlagIsRepeatedAndReplacesTheDefault(t *testing.T) {
	f := tierFlag{tiers: []tier{{dir: "/default"}}}
	f.Set("/a:1GiB")
	f.Set("/b:2GiB:MEM")
	if f.check() != nil || f.String() != "/a:1073741824,/b:2147483648:MEM" {
		t.Errorf("%s, %v", &f, f.check())
	}
	f.Set("/a:3GiB")
	f.Set("nonsense")
	if err := f.check(); err == nil || !strings.Contains(err.Error(), "already") || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("not all mistakes are told: %v", err)
	}
}

func TestOneOfSeveralTiersMayBeBroken(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "no-folder")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	given, err := giveTiers([]string{file, filepath.Join(dir, "tier")}, os.Geteuid(), logger(t))
	if err != nil || len(given) != 1 || given[0] != 1 {
		t.Errorf("%v, %v", given, err)
	}
	if _, err := giveTiers([]string{file}, os.Geteuid(), logger(t)); err == nil {
		t.Error("the only one is broken, and that is no error")
	}
}
