package main

import (
	"strings"
	"testing"
)

const said = `{"jobs": [{"jobname": "x", "error": ERR, "read": {"io_bytes": 9, "bw": 3, "bw_bytes": 2097152, "iops": 512.5}}]}`

func TestSpeedIsInTheUnitOfTheRow(t *testing.T) {
	for _, c := range []struct {
		text string
		job  job
		want float64 // 0: an error
	}{
		{strings.Replace(said, "ERR", "0", 1), job{unit: "MiB/s"}, 2},
		{strings.Replace(said, "ERR", "0", 1), job{unit: "IOPS"}, 512.5},
		{strings.Replace(said, "ERR", "5", 1), job{unit: "IOPS"}, 0},
		{`{"jobs": []}`, job{unit: "IOPS"}, 0},
		{"fio: error", job{unit: "IOPS"}, 0},
	} {
		got, err := c.job.speed(strings.NewReader(c.text))
		if got != c.want || (err == nil) != (c.want != 0) {
			t.Errorf("speed(%s) in %s = %v, %v; want %v", c.text, c.job.unit, got, err, c.want)
		}
	}
}

func TestRowsAreChosenByName(t *testing.T) {
	for only, want := range map[string]int{"warm-(seq|rand)": 4, "warm-rand": 2, "warm-seq-1MiB-4": 1} {
		chosen, err := choose(groups(), only)
		got := 0
		for _, g := range chosen {
			got += len(g.rows)
		}
		if err != nil || got != want {
			t.Errorf("choose(%q) = %d rows, %v; want %d", only, got, err, want)
		}
	}
	if _, err := choose(groups(), "no such row"); err == nil {
		t.Error("a bench without a row was accepted")
	}
}
