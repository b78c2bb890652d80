package main

import (
	"context"
	"fmt"
	"path"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/larderfs/larder/sanity/shaper"
)

// listed is the rows of one tree of folders, all of whose objects are listed over the shaped store.
func listed(folders, objects int) group {
	tree := fmt.Sprintf("list-%dx%d", folders, objects)
	return group{
		open: func(ctx context.Context, b *bench) (*site, error) {
			if err := b.plant(ctx, tree, folders, objects); err != nil {
				return nil, err
			}
			if err := b.shape(ctx); err != nil {
				return nil, err
			}
			return b.open(ctx, volume{prefix: tree, endpoint: b.proxy.Endpoint})
		},
		rows: []row{{"ls-lR-" + tree[len("list-"):], func(ctx context.Context, s *site, name string) error {
			return s.list(ctx, name, tree, folders)
		}}},
	}
}

// plant makes the objects, as links: nobody reads them.
func (b *bench) plant(ctx context.Context, tree string, folders, objects int) error {
	const links = 10_000 // a file system allows only so many
	for i := range folders * objects {
		seed := fmt.Sprintf("seed/%s-%d", tree, i/links)
		if i%links == 0 {
			if err := b.upload(ctx, seed, 100); err != nil {
				return err
			}
		}
		if err := b.link(seed, fmt.Sprintf("%s/%s", tree, leaf(i/objects, i%objects))); err != nil {
			return err
		}
	}
	return nil
}

func leaf(folder, object int) string { return fmt.Sprintf("d%03d/part-%06d", folder, object) }

// list compares `ls -lR` with one series of LISTs for each folder, made one after another.
func (s *site) list(ctx context.Context, name, tree string, folders int) error {
	took := figure{name: name + "-time", unit: "s", of: "series", goal: goal{most: 0.5}}
	lists := figure{name: name + "-lists", unit: "LISTs", of: "series", goal: goal{most: 1.2}}
	client := s.client(s.proxy.Endpoint)
	for range min(s.runs, 2) {
		s.proxy.Take()
		seconds, err := series(ctx, client, tree, folders)
		if err != nil {
			return err
		}
		needed, _ := shaper.Count(s.proxy.Take(), shaper.List)
		start := time.Now()
		if err := s.lsLR(ctx); err != nil {
			return err
		}
		took.reference, took.volume = append(took.reference, seconds), append(took.volume, time.Since(start).Seconds())
		first := s.proxy.Take()
		made, _ := shaper.Count(first, shaper.List)
		lists.reference, lists.volume = append(lists.reference, float64(needed)), append(lists.volume, float64(made))
		start = time.Now()
		if err := s.lsLR(ctx); err != nil {
			return err
		}
		took.note = fmt.Sprintf("a second one %.1f s", time.Since(start).Seconds())
		heads, _ := shaper.Count(first, shaper.Head)
		lists.note = fmt.Sprintf("%d HEADs; a second one makes %d requests", heads, len(s.proxy.Take()))
		if err := s.renew(ctx); err != nil {
			return err
		}
	}
	if err := s.report(took); err != nil {
		return err
	}
	return s.report(lists)
}

func (s *site) lsLR(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	return s.stack.Command(ctx, "ls", "-lR", s.root).Run()
}

// series lists the folders one after another, and the one above them first.
func series(ctx context.Context, client *s3.Client, tree string, folders int) (seconds float64, err error) {
	start := time.Now()
	prefixes := []string{tree + "/"}
	for i := range folders {
		prefixes = append(prefixes, path.Join(tree, path.Dir(leaf(i, 0)))+"/")
	}
	for _, prefix := range prefixes {
		pages := s3.NewListObjectsV2Paginator(client, &s3.ListObjectsV2Input{
			Bucket: aws.String(bucket), Prefix: &prefix, Delimiter: aws.String("/"),
		})
		for pages.HasMorePages() {
			if _, err := pages.NextPage(ctx); err != nil {
				return 0, err
			}
		}
	}
	return time.Since(start).Seconds(), nil
}
