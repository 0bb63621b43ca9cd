package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

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
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return err
	}
	_, err := w.Write(escapeJSON(out.Bytes()))
	return err
}

// printDocument writes a JSON document as json or yaml, its members in their
// order.
func printDocument(w io.Writer, document json.RawMessage, format string) error {
	if format == "yaml" {
		return printYAML(w, document)
	}
	var out bytes.Buffer
	if err := json.Indent(&out, document, "", "  "); err != nil {
		return err
	}
	out.WriteByte('\n')
	_, err := w.Write(escapeJSON(out.Bytes()))
	return err
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
	if strings.ContainsFunc(s, unprintable) {
		q := fmt.Sprintf("%q", s)
		return q[1 : len(q)-1]
	}
	return s
}

// unprintable tells of what a terminal obeys and does not show: control
// characters, those that only turn or break a line, and what was no UTF-8.
func unprintable(r rune) bool {
	return unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp) || r == utf8.RuneError
}

// escapeJSON escapes what is unprintable in a JSON text. It stands in strings
// alone: elsewhere JSON has no such characters but the end of a line.
func escapeJSON(text []byte) []byte {
	return escapeStrings(text, func(r rune) string {
		if r <= 0xffff {
			return fmt.Sprintf(`\u%04x`, r)
		}
		high, low := utf16.EncodeRune(r)
		return fmt.Sprintf(`\u%04x\u%04x`, high, low)
	})
}

// escapeStrings escapes what is unprintable in a document, the ends of its lines
// excepted.
func escapeStrings(text []byte, escape func(rune) string) []byte {
	var out bytes.Buffer
	for _, r := range string(text) {
		if r != '\n' && unprintable(r) {
			out.WriteString(escape(r))
		} else {
			out.WriteRune(r)
		}
	}
	return out.Bytes()
}
