package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"

	"github.com/larderfs/larder/sanity/shaper"
)

// thrift is the rows that count requests.
func thrift() group {
	return group{
		open: func(ctx context.Context, b *bench) (*site, error) {
			b.proxy.Shape(shaper.Limits{})
			return b.cold(ctx, b.proxy.Endpoint)
		},
		rows: []row{
			{"cold-rand-4KiB", coldRandom},
			{"cold-parquet-footer", coldFooter},
		},
	}
}

const chunk = 1 << 20

// footers are the lengths, in KiB, of those of the objects that end like Parquet files.
var footers = []int64{64, 2560}

const footBytes = 32 << 20 // of such an object

func footName(kib int64) string { return fmt.Sprintf("foot%d-", kib) }

// uploadFooted puts an object that ends like a Parquet file.
func (b *bench) uploadFooted(ctx context.Context, key string, kib int64) error {
	end := append(binary.LittleEndian.AppendUint32(nil, uint32(kib<<10)), "PAR1"...)
	return b.uploadEnding(ctx, key, footBytes, end)
}

// coldRandom reads 4 KiB in each of many chunks.
func coldRandom(ctx context.Context, s *site, name string) error {
	const reads = 200
	gets := figure{name: name + "-gets", unit: "GETs", of: "least", goal: goal{most: 1}, note: "a read"}
	fetched := figure{name: name + "-fetched", unit: "MiB", of: "chunk", goal: goal{most: 1}, note: "a read"}
	for range min(s.runs, 3) {
		r := rand.New(rand.NewChaCha8([32]byte{2}))
		var pieces []piece
		for _, c := range r.Perm(coldBytes / chunk)[:reads] {
			pieces = append(pieces, piece{int64(c)*chunk + r.Int64N(chunk/4096)*4096, 4096})
		}
		_, file := s.fresh("one")
		n, b, err := s.counted(ctx, task{Do: "pieces", Files: []string{file}, Known: true, Pieces: pieces})
		if err != nil {
			return err
		}
		gets.reference, gets.volume = append(gets.reference, 1), append(gets.volume, float64(n)/reads)
		fetched.reference, fetched.volume = append(fetched.reference, 1), append(fetched.volume, float64(b)/chunk/reads)
	}
	if err := s.report(gets); err != nil {
		return err
	}
	return s.report(fetched)
}

// coldFooter reads as every reader of Parquet begins: the last 8 bytes, then the footer, whose length they tell.
func coldFooter(ctx context.Context, s *site, name string) error {
	for _, kib := range footers {
		f := figure{name: fmt.Sprintf("%s-%dKiB", name, kib), unit: "GETs", of: "least", goal: goal{most: 2}}
		for range min(s.runs, 3) {
			_, file := s.fresh(footName(kib))
			n, b, err := s.counted(ctx, task{Do: "pieces", Files: []string{file}, Known: true,
				Pieces: []piece{{footBytes - 8, 8}, {footBytes - 8 - kib<<10, kib << 10}}})
			if err != nil {
				return err
			}
			f.reference, f.volume = append(f.reference, 1), append(f.volume, float64(n))
			f.note = fmt.Sprintf("%.1f MiB fetched", float64(b)/chunk)
		}
		if err := s.report(f); err != nil {
			return err
		}
	}
	return nil
}

// counted has a child do the task, and returns the GETs and the bytes of them that it took.
func (s *site) counted(ctx context.Context, t task) (gets int, bytes int64, err error) {
	s.proxy.Take()
	if _, err := s.child(ctx, t); err != nil {
		return 0, 0, err
	}
	gets, bytes = shaper.Count(s.proxy.Take(), shaper.Get)
	return gets, bytes, nil
}
