package main

import "fmt"

// figure is one row with its reference: name/of and name/volume in the JSON file.
type figure struct {
	name      string
	unit      string
	of        string    // what the reference is: native, sdk, link, least
	reference []float64 // one a run
	volume    []float64
	goal      goal
	note      string
}

// goal is what the volume's share of the reference is to be; the zero value asks for nothing.
type goal struct {
	least, most float64
}

func (g goal) String() string {
	switch {
	case g.least != 0:
		return fmt.Sprintf("goal ≥ %.2f", g.least)
	case g.most != 0:
		return fmt.Sprintf("goal ≤ %.2f", g.most)
	}
	return "no goal"
}

func (g goal) verdict(ratio float64) string {
	switch {
	case g == goal{}:
		return ""
	case ratio < g.least || g.most != 0 && ratio > g.most:
		return " missed"
	}
	return " reached"
}

func (b *bench) report(f figure) error {
	reference := f.name + "/" + f.of
	if err := b.rows.Add(reference, f.unit, reference, f.reference...); err != nil {
		return err
	}
	if err := b.rows.Add(f.name+"/volume", f.unit, reference, f.volume...); err != nil {
		return err
	}
	of, _ := b.rows.Find(reference)
	volume, _ := b.rows.Find(f.name + "/volume")
	note := f.note
	if note != "" {
		note = "; " + note
	}
	fmt.Printf("%-30s %6s %-20s volume %-20s %-6s %.2f×, %v%s%s\n", f.name, f.of,
		number(of.Value, of.Spread), number(volume.Value, volume.Spread), f.unit, volume.Ratio, f.goal, f.goal.verdict(volume.Ratio), note)
	return nil
}

func number(median float64, spread [2]float64) string {
	format := "%.0f"
	if median < 10 {
		format = "%.3f"
	}
	if spread[0] == spread[1] {
		return fmt.Sprintf(format, median)
	}
	return fmt.Sprintf(format+" ("+format+"–"+format+")", median, spread[0], spread[1])
}
