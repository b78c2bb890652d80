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
	"unicode/utf8"
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
	cells := [][]string{{""}, {""}} // by line; the first two are the head
	for _, c := range columns {
		cells[0] = append(cells[0], c.Title)
		cells[1] = append(cells[1], rs.unit(c.Key))
	}
	for _, l := range lines {
		line := []string{l.Title}
		for _, c := range columns {
			line = append(line, rs.cell(c.Key+"/"+l.Key))
		}
		cells = append(cells, line)
	}
	width := make([]int, 1+len(columns))
	for _, line := range cells {
		for i, cell := range line {
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	for _, line := range cells {
		text := fmt.Sprintf("%-*s", width[0], line[0])
		for i, cell := range line[1:] {
			text += fmt.Sprintf("   %*s", width[i+1], cell)
		}
		if _, err := fmt.Fprintln(w, strings.TrimRight(text, " ")); err != nil {
			return err
		}
	}
	return nil
}

// unit is that of a column, padded as its cells are.
func (rs Rows) unit(column string) string {
	for _, r := range rs {
		if strings.HasPrefix(r.Name, column+"/") {
			return r.Unit + padding
		}
	}
	return ""
}

// padding is as wide as a ratio.
const padding = "        "

func (rs Rows) cell(name string) string {
	r, ok := rs.Find(name)
	switch {
	case !ok:
		return "–" + padding
	case r.Reference == r.Name:
		return fmt.Sprintf("%.0f", r.Value) + padding
	case r.Ratio < 0.095:
		return fmt.Sprintf("%.0f %6.2g×", r.Value, r.Ratio)
	}
	return fmt.Sprintf("%.0f %6.2f×", r.Value, r.Ratio)
}
