package faults

import (
	"cmp"
	"fmt"
	"html"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// plot is a picture of figures over one time: a panel for each, one below the
// other, on the same axis.
type plot struct {
	title  string
	lasts  time.Duration // the axis goes from 0 to here
	panels []panel
	marks  []mark
}

// panel is one figure, of one process or several.
type panel struct {
	title string // with its unit
	lines []line
}

// line is one process's figure. It is broken where its points begin anew.
type line struct {
	name   string
	points []point
}

type point struct {
	at    time.Duration
	value float64
	life  int // of the process: between points of different lives there is no line
}

// mark is a time in which something was broken. All panels show it.
type mark struct {
	from, to time.Duration
	name     string // short: it stands over the mark
	says     string
}

// Sizes, in the picture's own units.
const (
	plotWidth   = 960
	plotLeft    = 64 // of the axis, for its numbers
	plotRight   = 16
	plotTop     = 64 // above the first panel, for the title and the names of the marks
	panelHeight = 130
	panelGap    = 44 // for the title of the next
	plotBottom  = 44
	nameWidth   = 20   // of a mark
	panelInside = 1.08 // the axis ends so much above the highest value
)

// plotColours of lines: blue, orange, green and violet that also differ in
// lightness.
var plotColours = [...]string{"#1f5fa8", "#d2691e", "#2e8b57", "#7b3fa0"}

// svg draws the picture. It needs nothing besides: no script, no font of its
// own, no other file.
func (p plot) svg() string {
	height := plotTop + len(p.panels)*(panelHeight+panelGap) + plotBottom - panelGap
	var b strings.Builder
	put := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	put(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" font-family="sans-serif" font-size="12" fill="#222">`, plotWidth, height, plotWidth, height)
	put(`<title>%s</title>`, html.EscapeString(p.title))
	put(`<rect width="100%%" height="100%%" fill="#fff"/>`)
	put(`<text x="%d" y="20" font-size="15">%s</text>`, plotLeft, html.EscapeString(p.title))
	x := func(at time.Duration) float64 {
		return plotLeft + float64(at)/float64(max(1, p.lasts))*(plotWidth-plotLeft-plotRight)
	}
	free := 0.0 // from here on there is room for a name
	for _, m := range p.marks {
		if at := (x(m.from) + x(m.to)) / 2; at >= free {
			free = at + nameWidth
			put(`<text x="%.1f" y="%d" text-anchor="middle" font-size="10" fill="#8a5a00">%s<title>%s</title></text>`,
				at, plotTop-24, html.EscapeString(m.name), html.EscapeString(m.says))
		}
	}
	unit, step := timeAxis(p.lasts)
	for i, pn := range p.panels {
		top := plotTop + i*(panelHeight+panelGap)
		bottom := float64(top + panelHeight)
		highest := pn.highest()
		y := func(v float64) float64 { return bottom - v/highest*panelHeight }
		for _, m := range p.marks {
			put(`<rect x="%.1f" y="%d" width="%.1f" height="%d" fill="#ffe7b3"><title>%s</title></rect>`,
				x(m.from), top, max(1, x(m.to)-x(m.from)), panelHeight, html.EscapeString(m.name+": "+m.says))
		}
		for _, v := range ticks(highest) {
			put(`<path d="M%d %.1fH%d" stroke="#ddd"/><text x="%d" y="%.1f" text-anchor="end">%s</text>`,
				plotLeft, y(v), plotWidth-plotRight, plotLeft-6, y(v)+4, number(v))
		}
		for at := time.Duration(0); at <= p.lasts; at += step {
			put(`<path d="M%.1f %.1fv4" stroke="#888"/><text x="%.1f" y="%.1f" text-anchor="middle">%s</text>`,
				x(at), bottom, x(at), bottom+16, number(float64(at)/float64(unit.of)))
		}
		put(`<path d="M%d %dV%.1fH%d" fill="none" stroke="#888"/>`, plotLeft, top, bottom, plotWidth-plotRight)
		for j, l := range pn.lines {
			put(`<path d="%s" fill="none" stroke="%s" stroke-width="1.5" stroke-linejoin="round"/>`, l.path(x, y), plotColours[j%len(plotColours)])
		}
		// Its title, and the names of its lines in their colours behind it.
		fmt.Fprintf(&b, `<text x="%d" y="%d" xml:space="preserve"><tspan font-weight="bold">%s</tspan>`, plotLeft, top-8, html.EscapeString(pn.title))
		for j, l := range pn.lines {
			fmt.Fprintf(&b, `<tspan fill="%s">   — %s</tspan>`, plotColours[j%len(plotColours)], html.EscapeString(l.name))
		}
		put(`</text>`)
	}
	put(`<text x="%d" y="%d" text-anchor="middle">%s since the beginning; shaded: a fault, by its number</text>`, (plotLeft+plotWidth-plotRight)/2, height-6, unit.name)
	put(`</svg>`)
	return b.String()
}

// path of a line: down where the life of the process ends, up where the next
// begins.
func (l line) path(x func(time.Duration) float64, y func(float64) float64) string {
	var b strings.Builder
	for i, p := range l.points {
		command := "L"
		if i == 0 || p.life != l.points[i-1].life {
			command = "M"
		}
		fmt.Fprintf(&b, "%s%.1f %.1f", command, x(p.at), y(p.value))
	}
	return b.String()
}

// highest value of the axis.
func (pn panel) highest() float64 {
	highest := 0.0
	for _, l := range pn.lines {
		for _, p := range l.points {
			highest = max(highest, p.value)
		}
	}
	if highest == 0 {
		return 1
	}
	return highest * panelInside
}

// ticks of an axis from 0: 3 to 6 round numbers.
func ticks(highest float64) (all []float64) {
	step := math.Pow(10, math.Floor(math.Log10(highest)))
	for _, f := range []float64{0.2, 0.5, 1, 2} {
		if highest/(step*f) <= 5.5 {
			step *= f
			break
		}
	}
	for i := 0; float64(i)*step <= highest; i++ {
		all = append(all, float64(i)*step)
	}
	return all
}

type timeUnit struct {
	name string
	of   time.Duration
}

// timeAxis chooses the unit, and a round step that gives at most 12 of them.
func timeAxis(lasts time.Duration) (unit timeUnit, step time.Duration) {
	units := []timeUnit{{"seconds", time.Second}, {"minutes", time.Minute}, {"hours", time.Hour}}
	unit = units[0]
	for _, u := range units[1:] {
		if lasts >= 3*u.of {
			unit = u
		}
	}
	steps := []time.Duration{1, 2, 5, 10, 15, 20, 30, 60}
	i := slices.IndexFunc(steps, func(s time.Duration) bool { return lasts/(s*unit.of) <= 12 })
	if i < 0 { // of hours there may be any number
		return unit, lasts / 12
	}
	return unit, steps[i] * unit.of
}

// number in as few digits as it needs.
func number(v float64) string {
	return strconv.FormatFloat(math.Round(v*1000)/1000, 'f', -1, 64)
}

// median of values; 0 if there is none.
func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.SortedFunc(slices.Values(values), cmp.Compare[float64])
	return sorted[len(sorted)/2]
}

// slope of points by least squares, in units an hour; 0 of fewer than two.
func slope(points []point) float64 {
	var n, t, v, tt, tv float64
	for _, p := range points {
		h := p.at.Hours()
		n, t, v, tt, tv = n+1, t+h, v+p.value, tt+h*h, tv+h*p.value
	}
	if below := n*tt - t*t; below > 0 {
		return (n*tv - t*v) / below
	}
	return 0
}
