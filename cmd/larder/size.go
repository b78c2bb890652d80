package main

import (
	"fmt"
	"math"
	"path/filepath"
	"strconv"
	"strings"
)

// tier is a --tier: a directory and how many bytes of it the cache may use; 0 means nine tenths of its
// file system.
type tier struct {
	dir   string
	bytes int64
	err   error // of the text that was set: kept, so that all mistakes can be told at once
}

// String, Set and Type make a pflag.Value.
func (t *tier) String() string {
	if t.dir == "" {
		return ""
	}
	return t.dir + ":" + strconv.FormatInt(t.bytes, 10)
}

func (t *tier) Type() string { return "DIR:SIZE" }

func (t *tier) Set(s string) error {
	t.err = t.parse(s)
	return nil
}

func (t *tier) check() error { return t.err }

func (t *tier) parse(s string) error {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return fmt.Errorf("%q: want DIR:SIZE, for example /var/cache/larder:10GiB", s)
	}
	dir, err := filepath.Abs(s[:i])
	if err != nil {
		return err
	}
	n, err := parseSize(s[i+1:])
	if err != nil {
		return err
	}
	if i == 0 {
		return fmt.Errorf("%q: the directory is missing", s)
	}
	t.dir, t.bytes = dir, n
	return nil
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
	err   error // as in tier
}

func (z *size) String() string { return strconv.FormatInt(z.bytes, 10) }
func (z *size) Type() string   { return "SIZE" }
func (z *size) check() error   { return z.err }
func (z *size) Set(s string) error {
	z.bytes, z.err = parseSize(s)
	return nil
}
