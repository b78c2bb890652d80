package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// memory is the row of what the worker needs for many large files at once.
func memory() group {
	return group{
		open: func(ctx context.Context, b *bench) (*site, error) { return b.cold(ctx, b.s3.DirectEndpoint) },
		rows: []row{{"memory-8x1GiB", streamed}},
	}
}

// streamed compares the most that the worker has had in memory, while 8 cold files of 1 GiB are read at once,
// with what it may have.
func streamed(ctx context.Context, s *site, name string) error {
	var files []string
	for range 8 {
		_, f := s.fresh("one")
		files = append(files, f)
	}
	r, err := s.child(ctx, task{Do: "whole", Files: files})
	if err != nil {
		return err
	}
	if r.Bytes != 8*coldBytes {
		return fmt.Errorf("%d bytes were read", r.Bytes)
	}
	st, err := s.stack.Status(ctx)
	if err != nil {
		return err
	}
	peak, err := peakRSS(st.PID)
	if err != nil {
		return err
	}
	return s.report(figure{
		name: name, unit: "MiB", of: "limit", goal: goal{most: 1},
		reference: []float64{300}, volume: []float64{float64(peak) / (1 << 20)},
		note: fmt.Sprintf("the greatest RSS, at %.0f MB/s", float64(r.Bytes)/r.Seconds/1e6),
	})
}

func peakRSS(pid int) (bytes int64, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(text), "VmHWM:")
	kib, err := strconv.ParseInt(strings.Fields(rest + " 0")[0], 10, 64)
	return kib << 10, err
}
