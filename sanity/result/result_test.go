package result

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func add(t *testing.T, rs *Rows, name, unit, reference string, values ...float64) {
	t.Helper()
	if err := rs.Add(name, unit, reference, values...); err != nil {
		t.Fatal(err)
	}
}

func TestValueIsTheMedianAndRatioThatOfTheReference(t *testing.T) {
	var rs Rows
	add(t, &rs, "seq/native", "MiB/s", "seq/native", 900, 1000, 5000)
	add(t, &rs, "seq/mount", "MiB/s", "seq/native", 800, 700, 1200, 1000)
	r, _ := rs.Find("seq/mount")
	if r.Value != 900 || r.Ratio != 0.9 || r.Spread != [2]float64{700, 1200} {
		t.Errorf("got %+v, want the median 900, 0.9 of the reference, within 700 and 1200", r)
	}
	if err := rs.Add("x", "", "unknown", 1); err == nil {
		t.Error("a row over an unknown reference was added")
	}
	if err := rs.Add("x", "", "x"); err == nil {
		t.Error("a row without a value was added")
	}
}

func TestFileHasTheFiveKeysAndTheTableTheSameRows(t *testing.T) {
	var rs Rows
	add(t, &rs, "seq/native", "MiB/s", "seq/native", 1000)
	add(t, &rs, "seq/mount", "MiB/s", "seq/native", 930)
	file := filepath.Join(t.TempDir(), "build", "x.json")
	if err := rs.Write(file); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var got []map[string]any
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || len(got[1]) != 5 || got[1]["name"] != "seq/mount" || got[1]["value"] != 930.0 ||
		got[1]["unit"] != "MiB/s" || got[1]["reference"] != "seq/native" || got[1]["ratio"] != 0.93 {
		t.Errorf("wrote %s", text)
	}

	var table strings.Builder
	err = rs.Table(&table, []Axis{{"native", "native file"}, {"mount", "warm volume"}, {"cold", "cold"}}, []Axis{{"seq", "sequential"}})
	if err != nil {
		t.Fatal(err)
	}
	want := `
                 sequential
              MiB/s
native file    1000
warm volume     930   0.93×
cold              –
`
	if got := "\n" + table.String(); got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
}
