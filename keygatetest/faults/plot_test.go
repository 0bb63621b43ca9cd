package faults

import (
	"encoding/xml"
	"errors"
	"io"
	"math"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestPlot(t *testing.T) {
	p := plot{
		title: `memory & "time" <1 h`,
		lasts: 10 * time.Minute,
		panels: []panel{
			{title: "resident memory, MiB", lines: []line{
				{"replica 0", []point{{0, 40, 1}, {time.Minute, 50, 1}, {2 * time.Minute, 45, 2}, {10 * time.Minute, 100, 2}}},
				{"replica 1", nil},
			}},
			{title: "goroutines", lines: []line{{"replica 0", []point{{0, 0, 1}}}}},
		},
		marks: []mark{{time.Minute, 90 * time.Second, "1", "<black hole>"}, {91 * time.Second, 92 * time.Second, "2", "too near for a name of its own"}},
	}
	got := p.svg()
	var text []string
	shapes := map[string]int{}
	for dec := xml.NewDecoder(strings.NewReader(got)); ; {
		token, err := dec.Token()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("not XML: %v\n%s", err, got)
		}
		switch x := token.(type) {
		case xml.StartElement:
			shapes[x.Name.Local]++
		case xml.CharData:
			text = append(text, strings.TrimSpace(string(x)))
		}
	}
	for _, want := range []string{p.title, "resident memory, MiB", "goroutines", "— replica 0", "— replica 1", "100", "20", "10", "1", "1: <black hole>", "minutes since the beginning; shaded: a fault, by its number"} {
		if !slices.Contains(text, want) {
			t.Errorf("got no text %q, want it among %q", want, text)
		}
	}
	if got, want := shapes["rect"], 1+len(p.panels)*len(p.marks); got != want {
		t.Errorf("got %d rectangles, want %d: the ground, and each mark in each panel", got, want)
	}
	// From 0 at the left to the end at the right; two lives are two lines.
	for _, want := range []string{`d="M64.0 `, `L152.0 \d+\.\dM240.0 `, `L944.0 `} {
		if !regexp.MustCompile(want).MatchString(got) {
			t.Errorf("got no line with %s:\n%s", want, got)
		}
	}
	if strings.Contains(got, "NaN") || strings.Contains(got, "Inf") {
		t.Errorf("got a number that is none:\n%s", got)
	}
}

func TestTicks(t *testing.T) {
	for _, highest := range []float64{0.3, 1, 1.08, 2, 3.3, 5, 7, 9.99, 10, 24, 86, 540, 1080, 123456} {
		got := ticks(highest)
		if len(got) < 3 || len(got) > 7 || got[0] != 0 || got[len(got)-1] > highest {
			t.Errorf("up to %v: got %v, want 3 to 7 from 0 on", highest, got)
		}
	}
}

func TestTimeAxis(t *testing.T) {
	for _, c := range []struct {
		lasts time.Duration
		unit  string
		step  time.Duration
	}{
		{8 * time.Second, "seconds", time.Second},
		{2 * time.Minute, "seconds", 10 * time.Second},
		{5 * time.Minute, "minutes", time.Minute},
		{10 * time.Minute, "minutes", time.Minute},
		{2 * time.Hour, "minutes", 10 * time.Minute},
		{24 * time.Hour, "hours", 2 * time.Hour},
		{2000 * time.Hour, "hours", 2000 * time.Hour / 12},
	} {
		if unit, step := timeAxis(c.lasts); unit.name != c.unit || step != c.step {
			t.Errorf("%v: got %s in steps of %v, want %s of %v", c.lasts, unit.name, step, c.unit, c.step)
		}
	}
}

func TestSlope(t *testing.T) {
	var points []point
	if got := slope(points); got != 0 {
		t.Errorf("of nothing: got %v, want 0", got)
	}
	for i := range 100 {
		points = append(points, point{at: time.Duration(i) * time.Minute, value: 7 + 3*float64(i)/60})
	}
	if got := slope(points); math.Abs(got-3) > 1e-9 {
		t.Errorf("got %v an hour, want 3", got)
	}
	if got := median([]float64{5, 1, 3}); got != 3 {
		t.Errorf("median: got %v, want 3", got)
	}
}
