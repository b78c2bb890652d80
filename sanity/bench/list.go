package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"path"
	"runtime"
	"slices"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go/middleware"
	smithyhttp "github.com/aws/smithy-go/transport/http"
	"golang.org/x/sync/errgroup"

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
		rows: []row{
			{"ls-lR-" + tree[len("list-"):], func(ctx context.Context, s *site, name string) error {
				return s.list(ctx, name, tree, folders, "ls", "-lR")
			}},
			{"find-" + tree[len("list-"):], func(ctx context.Context, s *site, name string) error {
				return s.list(ctx, name, tree, folders, "find")
			}},
		},
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

// list compares a program that reads the tree with one series of LISTs for each folder, made one after another.
func (s *site) list(ctx context.Context, name, tree string, folders int, program ...string) error {
	took := figure{name: name + "-time", unit: "s", of: "series", goal: goal{most: 0.5}}
	lists := figure{name: name + "-lists", unit: "LISTs", of: "series", goal: goal{most: 1.2}}
	client := s.client(s.proxy.Endpoint)
	for range min(s.runs, 2) {
		s.proxy.Take()
		start := time.Now()
		pages, err := series(ctx, client, tree, folders)
		if err != nil {
			return err
		}
		took.reference = append(took.reference, time.Since(start).Seconds())
		needed, _ := shaper.Count(s.proxy.Take(), shaper.List)
		lists.reference = append(lists.reference, float64(needed))
		alone, err := s.atOnce(ctx, pages)
		if err != nil {
			return err
		}
		first, err := s.run(ctx, program)
		if err != nil {
			return err
		}
		took.volume = append(took.volume, first.Seconds())
		rs := s.proxy.Take()
		made, _ := shaper.Count(rs, shaper.List)
		lists.volume = append(lists.volume, float64(made))
		second, err := s.run(ctx, program)
		if err != nil {
			return err
		}
		took.note = fmt.Sprintf("the server alone, asked from %d places, %.1f s; a second time %.1f s", places, alone.Seconds(), second.Seconds())
		heads, _ := shaper.Count(rs, shaper.Head)
		lists.note = fmt.Sprintf("%d HEADs; a second time %d requests", heads, len(s.proxy.Take()))
		if err := s.renew(ctx); err != nil {
			return err
		}
	}
	if err := s.report(took); err != nil {
		return err
	}
	return s.report(lists)
}

// run has a program read the volume.
func (s *site) run(ctx context.Context, program []string) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	args := append(slices.Clone(program[1:]), s.root)
	start := time.Now()
	err = s.stack.Command(ctx, program[0], args...).Run()
	return time.Since(start), err
}

// page is a LIST that is needed.
type page struct{ prefix, after string }

// series lists the folders one after another, and the one above them first.
func series(ctx context.Context, client *s3.Client, tree string, folders int) (pages []page, err error) {
	prefixes := []string{tree + "/"}
	for i := range folders {
		prefixes = append(prefixes, path.Join(tree, path.Dir(leaf(i, 0)))+"/")
	}
	for _, prefix := range prefixes {
		list := s3.NewListObjectsV2Paginator(client, &s3.ListObjectsV2Input{
			Bucket: aws.String(bucket), Prefix: &prefix, Delimiter: aws.String("/"),
		})
		for after := ""; list.HasMorePages(); {
			pages = append(pages, page{prefix, after})
			out, err := list.NextPage(ctx)
			if err != nil {
				return nil, err
			}
			if n := len(out.Contents); n > 0 {
				after = aws.ToString(out.Contents[n-1].Key)
			}
		}
	}
	return pages, nil
}

// places is from how many the server alone is asked: it has all processors then.
var places = 2 * runtime.NumCPU()

// atOnce asks the server itself for the pages and looks at nothing it says. Nobody who shares the machine with it can be faster.
func (s *site) atOnce(ctx context.Context, pages []page) (took time.Duration, err error) {
	client := s.client(s.s3.DirectEndpoint)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(places)
	start := time.Now()
	for _, p := range pages {
		g.Go(func() error {
			in := &s3.ListObjectsV2Input{Bucket: aws.String(bucket), Prefix: &p.prefix, Delimiter: aws.String("/")}
			if p.after != "" {
				in.StartAfter = &p.after
			}
			_, err := client.ListObjectsV2(ctx, in, unread)
			return err
		})
	}
	err = g.Wait()
	return time.Since(start), err
}

// unread lets the SDK see nothing of an answer's body.
func unread(o *s3.Options) {
	o.APIOptions = append(o.APIOptions, func(stack *middleware.Stack) error {
		return stack.Deserialize.Insert(middleware.DeserializeMiddlewareFunc("Unread", func(ctx context.Context, in middleware.DeserializeInput, next middleware.DeserializeHandler) (
			middleware.DeserializeOutput, middleware.Metadata, error,
		) {
			out, meta, err := next.HandleDeserialize(ctx, in)
			if resp, ok := out.RawResponse.(*smithyhttp.Response); ok && err == nil && resp.StatusCode == http.StatusOK {
				_, err = io.Copy(io.Discard, resp.Body)
			}
			return out, meta, err
		}), "OperationDeserializer", middleware.After)
	})
}
