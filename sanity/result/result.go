// Package result keeps what the demo and the benchmarks measured.
//
// Every number that is shown or written is a row, and a row's ratio is always its value
// divided by the value of the row that it names as its reference: a table cannot say
// something else than the JSON file beside it.
package result

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
)

// Row is one measurement.
type Row struct {
	Name      string  `json:"name"`
	Value     float64 `json:"value"`
	Unit      string  `json:"unit"`
	Reference string  `json:"reference"` // the name of a row, maybe its own
	Ratio     float64 `json:"ratio"`     // value / value of the reference

	Spread [2]float64 `json:"-"` // least and greatest of the runs that Value is the median of
}

// Rows are the measurements of one run, in the order in which they were added.
type Rows []Row

// Add adds the median of the values. A reference that is another row must have been
// added before.
func (rs *Rows) Add(name, unit, reference string, values ...float64) error {
	if len(values) == 0 {
		return fmt.Errorf("row %s: nothing was measured", name)
	}
	values = slices.Sorted(slices.Values(values))
	row := Row{Name: name, Unit: unit, Reference: reference, Value: median(values), Spread: [2]float64{values[0], values[len(values)-1]}}
	of := row
	if reference != name {
		var ok bool
		if of, ok = rs.Find(reference); !ok {
			return fmt.Errorf("row %s: there is no row %s", name, reference)
		}
	}
	if of.Value != 0 {
		row.Ratio = row.Value / of.Value
	}
	*rs = append(*rs, row)
	return nil
}

func median(sorted []float64) float64 {
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// Find returns the row of that name.
func (rs Rows) Find(name string) (Row, bool) {
	i := slices.IndexFunc(rs, func(r Row) bool { return r.Name == name })
	if i < 0 {
		return Row{}, false
	}
	return rs[i], true
}

// Write writes the rows as JSON.
func (rs Rows) Write(file string) error {
	text, err := json.MarshalIndent(rs, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}

// Axis is a line or a column of a table: the rows whose name has Key on that side of the slash.
type Axis struct{ Key, Title string }

// Table prints the rows named "column/line", one cell each: the value, and behind it the
// ratio where the reference is another row. What was not measured is a dash.
func (rs Rows) Table(w io.Writer, lines, columns []Axis) error {
	tw := tabwriter.NewWriter(w, 0, 0, 1, ' ', tabwriter.AlignRight)
	for _, c := range columns {
		fmt.Fprintf(tw, "\t%s\t", c.Title)
	}
	fmt.Fprintln(tw, "\t")
	for _, l := range lines {
		// Columns are aligned to the right; the first one is padded to look left-aligned.
		fmt.Fprint(tw, pad(l.Title, lines))
		for _, c := range columns {
			value, ratio := rs.cell(c.Key + "/" + l.Key)
			fmt.Fprintf(tw, "\t%s\t%s", value, ratio)
		}
		fmt.Fprintln(tw, "\t")
	}
	return tw.Flush()
}

func pad(title string, lines []Axis) string {
	width := 0
	for _, l := range lines {
		width = max(width, len([]rune(l.Title)))
	}
	return title + strings.Repeat(" ", width-len([]rune(title)))
}

func (rs Rows) cell(name string) (value, ratio string) {
	r, ok := rs.Find(name)
	if !ok {
		return "–", ""
	}
	value = fmt.Sprintf("%.0f %s", r.Value, r.Unit)
	if r.Reference != r.Name {
		ratio = fmt.Sprintf("%.2f×", r.Ratio)
	}
	return value, ratio
}
