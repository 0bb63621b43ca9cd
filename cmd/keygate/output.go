package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
)

// outputFormat is the value of the flag -o.
type outputFormat struct {
	value   string
	allowed []string
}

// outputFlag adds -o to cmd. The first format is the default.
func outputFlag(cmd *cobra.Command, formats ...string) *outputFormat {
	f := &outputFormat{formats[0], formats}
	cmd.Flags().VarP(f, "output", "o", "`format` of the output: "+strings.Join(formats, ", "))
	return f
}

func (f *outputFormat) String() string { return f.value }
func (f *outputFormat) Type() string   { return "string" }

func (f *outputFormat) Set(s string) error {
	if !slices.Contains(f.allowed, s) {
		return fmt.Errorf("want one of %s", strings.Join(f.allowed, ", "))
	}
	f.value = s
	return nil
}

// printJSON writes v, indented, as one document.
func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// printTable writes rows in aligned columns; the first may be the header. A
// cell's control characters, which might move the columns or the terminal's
// cursor, are written escaped.
func printTable(w io.Writer, rows ...[]string) error {
	t := tabwriter.NewWriter(w, 0, 8, 3, ' ', 0)
	for _, row := range rows {
		for i, cell := range row {
			row[i] = printable(cell)
		}
		// A row's last cell ends no column: no blanks behind it.
		fmt.Fprintln(t, strings.TrimRight(strings.Join(row, "\t"), "\t"))
	}
	return t.Flush()
}

// printable escapes what is not to be written to a terminal.
func printable(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r >= 0x7f && r < 0xa0 || r == 0xfffd }) {
		q := fmt.Sprintf("%q", s)
		return q[1 : len(q)-1]
	}
	return s
}
