package main

import (
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/larderfs/larder/cacheworker/tiers"
)

// tier is a --tier: a directory, how many bytes of it the cache may use (0 means nine tenths of its
// file system), and what it is.
type tier struct {
	dir   string
	bytes int64
	kind  tiers.Kind
}

func (t tier) String() string {
	s := t.dir + ":" + strconv.FormatInt(t.bytes, 10)
	if t.kind != tiers.SSD {
		s += ":" + t.kind.String()
	}
	return s
}

// tierFlag is --tier, which can be repeated.
type tierFlag struct {
	tiers []tier
	set   bool
	errs  []error // of the texts that were set: kept, so that all mistakes can be told at once
}

// String, Set and Type make a pflag.Value.
func (f *tierFlag) String() string {
	var all []string
	for _, t := range f.tiers {
		all = append(all, t.String())
	}
	return strings.Join(all, ",")
}

func (f *tierFlag) Type() string { return "DIR:SIZE[:KIND]" }

// Set adds a tier; the first one takes the default's place.
func (f *tierFlag) Set(s string) error {
	if !f.set {
		f.set, f.tiers = true, nil
	}
	t, err := parseTier(s)
	for _, other := range f.tiers {
		if err == nil && other.dir == t.dir {
			err = fmt.Errorf("%q: the directory is a tier already", s)
		}
	}
	if err != nil {
		f.errs = append(f.errs, err)
		return nil
	}
	f.tiers = append(f.tiers, t)
	return nil
}

func (f *tierFlag) check() error { return errors.Join(f.errs...) }

func parseTier(text string) (t tier, err error) {
	t.kind = tiers.SSD
	s := text
	if i := strings.LastIndexByte(s, ':'); i >= 0 {
		if kind, ok := tiers.ParseKind(s[i+1:]); ok {
			s, t.kind = s[:i], kind
		}
	}
	i := strings.LastIndexByte(s, ':')
	switch {
	case i < 0:
		return t, fmt.Errorf("%q: want DIR:SIZE, for example /var/cache/larder:10GiB, and :MEM, :SSD or :HDD behind it if it is one of several", text)
	case i == 0:
		return t, fmt.Errorf("%q: the directory is missing", text)
	}
	if t.dir, err = filepath.Abs(s[:i]); err != nil {
		return t, err
	}
	t.bytes, err = parseSize(s[i+1:])
	return t, err
}

var units = []struct {
	suffix string
	factor int64
}{
	{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40}, {"PiB", 1 << 50},
	{"Ki", 1 << 10}, {"Mi", 1 << 20}, {"Gi", 1 << 30}, {"Ti", 1 << 40}, {"Pi", 1 << 50},
	{"kB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12}, {"PB", 1e15},
	{"k", 1e3}, {"M", 1e6}, {"G", 1e9}, {"T", 1e12}, {"P", 1e15}, {"B", 1}, {"", 1},
}

// parseSize reads bytes as people and Kubernetes write them: 10GiB, 10Gi, 10GB, 1.5TiB, 4096.
func parseSize(s string) (int64, error) {
	for _, u := range units {
		num, ok := strings.CutSuffix(strings.TrimSpace(s), u.suffix)
		if !ok {
			continue
		}
		f, err := strconv.ParseFloat(strings.TrimSpace(num), 64)
		if err != nil || f <= 0 || math.IsInf(f, 0) || math.IsNaN(f) || f*float64(u.factor) > math.MaxInt64/2 {
			break
		}
		return int64(f * float64(u.factor)), nil
	}
	return 0, fmt.Errorf("size %q: want a number with a unit, for example 10GiB", s)
}

// size is a flag of bytes.
type size struct {
	bytes int64
	err   error // as in tierFlag
}

func (z *size) String() string { return strconv.FormatInt(z.bytes, 10) }
func (z *size) Type() string   { return "SIZE" }
func (z *size) check() error   { return z.err }
func (z *size) Set(s string) error {
	z.bytes, z.err = parseSize(s)
	return nil
}
