package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/larderfs/larder/sanity/stack"
)

// site is a running larder with one volume, and what is measured on it.
type site struct {
	*bench
	volume
	stack *stack.Stack
	root  string // of the volume
	tier  string

	native  string // the files of the warm rows
	mounted string
	taken   map[string]int // of the cold rows: objects that were read since start, by kind
}

// volume says what a site is made of.
type volume struct {
	prefix   string // in the bucket
	endpoint string // "" means the server itself
	args     []string
	complete string // parameter of the volume; "" means auto
}

func (b *bench) open(ctx context.Context, v volume) (*site, error) {
	if v.endpoint == "" {
		v.endpoint = b.s3.DirectEndpoint
	}
	s := &site{bench: b, volume: v}
	if err := s.start(ctx); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// start starts larder with an empty cache and publishes the volume.
func (s *site) start(ctx context.Context) (err error) {
	s.sites++
	s.taken = map[string]int{}
	s.tier = filepath.Join(s.dir, fmt.Sprintf("tier%d", s.sites))
	args := append([]string{"--tier", s.tier + ":24GiB"}, s.args...)
	s.stack, err = stack.Start(ctx, stack.Config{Dir: filepath.Join(s.dir, fmt.Sprintf("up%d", s.sites)), Binary: s.binary, Args: args})
	if err != nil {
		return err
	}
	p, err := s.stack.Publish(ctx, stack.PublishInput{
		Name: "bench",
		Parameters: map[string]string{
			"complete": cmp.Or(s.complete, "auto"),
			"source":   "s3://" + bucket + "/" + s.prefix, "endpoint": s.endpoint,
			"region": s.s3.Region, "pathStyle": "true", "layout": "data",
			"freshness": "1h", // nobody else writes there
		},
		Secrets:  map[string]string{"AWS_ACCESS_KEY_ID": s.s3.AccessKey, "AWS_SECRET_ACCESS_KEY": s.s3.SecretKey},
		ReadOnly: true,
	})
	if err == nil {
		s.root = p.Targets[0]
	}
	return err
}

// renew begins with an empty cache again, so that no run pays for writing to the disk what an
// earlier one has fetched.
func (s *site) renew(ctx context.Context) error {
	if err := s.close(); err != nil {
		return err
	}
	return s.start(ctx)
}

func (s *site) close() error {
	if s.stack == nil {
		return nil
	}
	err := errors.Join(s.stack.Close(), os.RemoveAll(s.tier))
	s.stack = nil
	return err
}
