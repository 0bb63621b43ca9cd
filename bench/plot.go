package main

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// Sizes of a plot, in its own units.
const (
	plotWidth  = 800
	plotLeft   = 250 // of the axis, for the names
	plotRight  = 175 // for the values
	plotTop    = 44
	rowHeight  = 24
	panelGap   = 40 // for the axis of one panel and the title of the next
	plotBottom = 14
	plotInside = 1.06 // the axis ends so much beyond the greatest value
)

// Colours that can be read on the white card that a plot is drawn on, whatever
// is around it.
const (
	colourMark  = "#1f5fa8"
	colourText  = "#222"
	colourFaint = "#ccc"
	colourAxis  = "#777"
)

// panel is a list of rows over one axis that begins at 0.
type panel struct {
	title string
	base  float64 // a line across all rows; 0 means none
	rows  []row
}

type row struct {
	name string
	spread
}

// panels of a result: for two subjects the ratios, for more a panel for each
// figure.
func (r *Result) panels() (all []panel) {
	for _, t := range r.Tables {
		if len(t.Subjects) == 2 {
			p := panel{title: prefix(t.Title) + t.Subjects[1] + " / " + t.Subjects[0], base: 1}
			for _, f := range t.Figures {
				if all := ratios(f.Values[0], f.Values[1]); len(all) > 0 && !f.Plain {
					p.rows = append(p.rows, row{f.Name, spreadOf(all)})
				}
			}
			all = append(all, p)
			continue
		}
		for _, f := range t.Figures {
			if f.Plain {
				continue
			}
			p := panel{title: prefix(t.Title) + f.Name + ", " + f.Unit}
			for i, s := range t.Subjects {
				p.rows = append(p.rows, row{s, spreadOf(f.Values[i])})
			}
			all = append(all, p)
		}
	}
	return all
}

// svg draws the panels below each other: a dot at each median, a line from the
// least to the greatest. It needs no script, no font and no other file.
func svg(title string, panels []panel) string {
	height := plotTop + plotBottom
	for _, p := range panels {
		height += panelGap + len(p.rows)*rowHeight
	}
	var b strings.Builder
	put := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	put(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" font-family="sans-serif" font-size="12" fill="%s">`,
		plotWidth, height, plotWidth, height, colourText)
	put(`<title>%s</title>`, html.EscapeString(title))
	put(`<rect x="0.5" y="0.5" width="%d" height="%d" rx="6" fill="#fff" stroke="%s"/>`, plotWidth-1, height-1, colourFaint)
	put(`<text x="16" y="24" font-size="15">%s</text>`, html.EscapeString(title))
	top := plotTop
	for _, p := range panels {
		highest := p.base
		for _, r := range p.rows {
			highest = max(highest, r.most)
		}
		highest *= plotInside
		x := func(v float64) float64 { return plotLeft + v/highest*(plotWidth-plotLeft-plotRight) }
		put(`<text x="16" y="%d" font-weight="bold">%s</text>`, top+12, html.EscapeString(p.title))
		top += 20
		bottom := top + len(p.rows)*rowHeight
		step := axisStep(highest)
		for i := 0; float64(i)*step <= highest; i++ {
			v := float64(i) * step
			put(`<path d="M%.1f %dV%d" stroke="%s"/><text x="%.1f" y="%d" text-anchor="middle" font-size="10" fill="%s">%s</text>`,
				x(v), top, bottom, colourFaint, x(v), bottom+12, colourAxis, fmt.Sprintf("%g", math.Round(v*1000)/1000))
		}
		if p.base > 0 {
			put(`<path d="M%.1f %dV%d" stroke="%s" stroke-width="1.5" stroke-dasharray="4 3"/>`, x(p.base), top, bottom, colourText)
		}
		for i, r := range p.rows {
			y := float64(top+i*rowHeight) + rowHeight/2
			put(`<text x="%d" y="%.1f" text-anchor="end">%s</text>`, plotLeft-10, y+4, html.EscapeString(r.name))
			put(`<path d="M%.1f %.1fH%.1f" stroke="%s" stroke-width="3" stroke-linecap="round" opacity="0.5"/><circle cx="%.1f" cy="%.1f" r="4.5" fill="%s"/>`,
				x(r.least), y, x(r.most), colourMark, x(r.median), y, colourMark)
			put(`<text x="%d" y="%.1f">%s</text>`, plotWidth-plotRight+12, y+4, html.EscapeString(r.String()))
		}
		top = bottom + panelGap - 20
	}
	put(`</svg>`)
	return b.String()
}

// axisStep is a round number that divides an axis from 0 into 3 to 7 parts.
func axisStep(highest float64) float64 {
	step := math.Pow(10, math.Floor(math.Log10(highest)))
	for _, f := range []float64{0.2, 0.5, 1} {
		if highest/(step*f) <= 7 {
			return step * f
		}
	}
	return 2 * step
}

// prefix is a title with what joins it to the rest.
func prefix(title string) string {
	if title == "" {
		return ""
	}
	return title + ": "
}
