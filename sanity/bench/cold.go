package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"time"

	"github.com/larderfs/larder/sanity/shaper"
)

const (
	coldBytes   = 1 << 30   // of one object
	eachBytes   = 256 << 20 // of one of eight
	firstByteAt = 30 * time.Millisecond
	connection  = 90e6 // bytes a second
	linkMost    = 400e6
)

// shaped is the rows over a store with latency and a link, which is the limit.
func shaped() group {
	return group{
		open: func(ctx context.Context, b *bench) (*site, error) {
			if err := b.shape(ctx); err != nil {
				return nil, err
			}
			return b.cold(ctx, b.proxy.Endpoint)
		},
		rows: []row{
			{"cold-shaped-cat-1GiB", coldCat},
			{"cold-shaped-8readers", coldEight},
			{"cold-shaped-first-byte", coldFirst},
			{"cold-shaped-first-byte-known", coldFirstKnown},
			{"cold-shaped-mmap-random", coldMapped},
		},
	}
}

// unshaped is the rows over the server as it is: the processors are the limit, so the SDK's
// download to a file is what a volume is compared with.
func unshaped() group {
	return group{
		open: func(ctx context.Context, b *bench) (*site, error) { return b.cold(ctx, b.s3.DirectEndpoint) },
		rows: []row{
			{"cold-direct-cat-1GiB", directCat},
			{"cold-direct-8readers", directEight},
		},
	}
}

// seeds uploads what the cold rows read, once.
func (b *bench) seeds(ctx context.Context) error {
	if b.uploaded {
		return nil
	}
	for name, size := range map[string]int64{"one": coldBytes, "each": eachBytes} {
		if err := b.upload(ctx, "seed/"+name, size); err != nil {
			return err
		}
	}
	for _, kib := range footers {
		if err := b.uploadFooted(ctx, "seed/"+footName(kib), kib); err != nil {
			return err
		}
	}
	b.uploaded = true
	return b.s3.Age(time.Hour)
}

// cold publishes a volume over objects that nobody has read. Each has a folder of its own, so that nothing
// is known about it either.
func (b *bench) cold(ctx context.Context, endpoint string) (*site, error) {
	if err := b.seeds(ctx); err != nil {
		return nil, err
	}
	prefix := fmt.Sprintf("cold%d", b.sites)
	kinds := []string{"one", "each"}
	for _, kib := range footers {
		kinds = append(kinds, footName(kib))
	}
	for _, kind := range kinds {
		for i := range 8 + 4*b.runs {
			if err := b.link("seed/"+kind, fmt.Sprintf("%s/%s%d/o", prefix, kind, i)); err != nil {
				return nil, err
			}
		}
	}
	return b.open(ctx, volume{prefix: prefix, endpoint: endpoint})
}

// shape gives the store its manners. It measures how wide the link may be so that reading over it needs half of
// the machine.
func (b *bench) shape(ctx context.Context) error {
	if b.linkRate == 0 {
		if err := b.measureLink(ctx); err != nil {
			return err
		}
	}
	b.proxy.Shape(shaper.Limits{FirstByte: firstByteAt, ConnectionRate: connection, LinkRate: b.linkRate})
	return nil
}

func (b *bench) measureLink(ctx context.Context) error {
	if err := b.seeds(ctx); err != nil {
		return err
	}
	b.proxy.Shape(shaper.Limits{})
	client := b.client(b.proxy.Endpoint)
	var rates []float64
	for range 3 {
		start := time.Now()
		if err := download(ctx, client, "seed/one", nowhere{}); err != nil {
			return err
		}
		rates = append(rates, coldBytes/time.Since(start).Seconds())
	}
	if err := b.rows.Add("link-unshaped/sdk", "MB/s", "link-unshaped/sdk", megabytes(rates)...); err != nil {
		return err
	}
	sdk, _ := b.rows.Find("link-unshaped/sdk")
	b.linkRate = min(linkMost, sdk.Value*1e6/2)
	fmt.Printf("the link: %.0f MB/s, a connection %.0f MB/s, first byte after %v (the SDK reads %.0f MB/s through the unshaped proxy)\n",
		b.linkRate/1e6, connection/1e6, firstByteAt, sdk.Value)
	return nil
}

func megabytes(rates []float64) []float64 {
	var mb []float64
	for _, r := range rates {
		mb = append(mb, r/1e6)
	}
	return mb
}

// fresh is an object that nobody has read, as the name of its key and of its file.
func (s *site) fresh(kind string) (key, file string) {
	rel := fmt.Sprintf("%s%d/o", kind, s.taken[kind])
	s.taken[kind]++
	return s.prefix + "/" + rel, filepath.Join(s.root, rel)
}

func (s *site) freshEight() (files []string) {
	for range 8 {
		_, f := s.fresh("each")
		files = append(files, f)
	}
	return files
}

// cat is the program, and how fast it read a new object of 1 GiB.
func (s *site) cat(ctx context.Context) (rate float64, err error) {
	_, file := s.fresh("one")
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	start := time.Now()
	if err := s.stack.Command(ctx, "cat", file).Run(); err != nil {
		return 0, fmt.Errorf("cat %s: %w", file, err)
	}
	return coldBytes / time.Since(start).Seconds(), nil
}

// overLink reports rates as shares of the link, and what was fetched twice or too much.
func (s *site) overLink(ctx context.Context, name string, least float64, bytes int64, read func(context.Context) (rate float64, err error)) error {
	f := figure{name: name, unit: "MB/s", of: "link", goal: goal{least: least}}
	var got, gets int64
	for range s.runs {
		s.proxy.Take()
		rate, err := read(ctx)
		if err != nil {
			return err
		}
		n, b := shaper.Count(s.proxy.Take(), shaper.Get)
		gets, got = gets+int64(n), got+b
		f.reference, f.volume = append(f.reference, s.linkRate/1e6), append(f.volume, rate/1e6)
		if err := s.renew(ctx); err != nil {
			return err
		}
	}
	f.note = fmt.Sprintf("%.1f GETs, %.3f of the bytes fetched", float64(gets)/float64(s.runs), float64(got)/float64(bytes)/float64(s.runs))
	return s.report(f)
}

func coldCat(ctx context.Context, s *site, name string) error {
	return s.overLink(ctx, name, 0.95, coldBytes, s.cat)
}

func coldEight(ctx context.Context, s *site, name string) error {
	return s.overLink(ctx, name, 0.90, 8*eachBytes, s.eight)
}

func (s *site) eight(ctx context.Context) (float64, error) {
	r, err := s.child(ctx, task{Do: "whole", Files: s.freshEight()})
	if err == nil && r.Bytes != 8*eachBytes {
		err = fmt.Errorf("%d bytes were read", r.Bytes)
	}
	return float64(r.Bytes) / r.Seconds, err
}

// coldMapped reads a file as safetensors does: mapped, tensor by tensor, in an order that is not the file's.
func coldMapped(ctx context.Context, s *site, name string) error {
	order := tensors(coldBytes)
	return s.overLink(ctx, name, 0.95, coldBytes, func(ctx context.Context) (float64, error) {
		_, file := s.fresh("one")
		r, err := s.child(ctx, task{Do: "mapped", Files: []string{file}, Pieces: order})
		return float64(r.Bytes) / r.Seconds, err
	})
}

// tensors cuts size bytes into pieces of 4 to 68 MiB, in random order.
func tensors(size int64) []piece {
	r := rand.New(rand.NewChaCha8([32]byte{1}))
	var all []piece
	for at := int64(0); at < size; {
		n := min(4<<20+r.Int64N(64<<20)&^4095, size-at)
		all = append(all, piece{at, n})
		at += n
	}
	r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all
}

func coldFirst(ctx context.Context, s *site, name string) error {
	return s.firstBytes(ctx, name, false)
}

func coldFirstKnown(ctx context.Context, s *site, name string) error {
	return s.firstBytes(ctx, name, true)
}

// firstBytes compares the time to the first byte with the SDK's HEAD and GET, or with its GET
// alone where the volume knows the file.
func (s *site) firstBytes(ctx context.Context, name string, known bool) error {
	f := figure{name: name, unit: "ms", of: "sdk", goal: goal{most: 1.3}}
	client := s.client(s.proxy.Endpoint)
	for range 2 * s.runs {
		key, file := s.fresh("each")
		sdk, err := firstByte(ctx, client, key, !known)
		if err != nil {
			return err
		}
		r, err := s.child(ctx, task{Do: "first", Files: []string{file}, Known: known})
		if err != nil {
			return err
		}
		f.reference, f.volume = append(f.reference, sdk*1e3), append(f.volume, r.Seconds*1e3)
	}
	return s.report(f)
}

func directCat(ctx context.Context, s *site, name string) error {
	return s.againstDownload(ctx, name, []string{"seed/one"}, coldBytes, s.cat)
}

func directEight(ctx context.Context, s *site, name string) error {
	return s.againstDownload(ctx, name, strings.Split(strings.Repeat(" seed/each", 8)[1:], " "), 8*eachBytes, s.eight)
}

func (s *site) againstDownload(ctx context.Context, name string, keys []string, bytes int64, read func(context.Context) (float64, error)) error {
	f := figure{name: name, unit: "MB/s", of: "sdk", goal: goal{least: 0.80}}
	client := s.client(s.s3.DirectEndpoint)
	for range s.runs {
		seconds, err := s.downloads(ctx, client, keys)
		if err != nil {
			return err
		}
		rate, err := read(ctx)
		if err != nil {
			return err
		}
		f.reference, f.volume = append(f.reference, float64(bytes)/seconds/1e6), append(f.volume, rate/1e6)
		if err := s.renew(ctx); err != nil {
			return err
		}
	}
	return s.report(f)
}
