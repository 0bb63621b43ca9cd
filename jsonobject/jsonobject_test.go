package jsonobject_test

import (
	"bytes"
	"encoding/json"
	"reflect"
	"slices"
	"strings"
	"testing"

	"keygate/jsonobject"
)

func nested(depth int) string {
	return strings.Repeat(`{"a":`, depth-1) + "{}" + strings.Repeat("}", depth-1)
}

func TestParse(t *testing.T) {
	tests := []struct {
		name, in string
		names    []string // nil when an error is wanted
		err      string
	}{
		{name: "empty object", in: `{}`, names: []string{}},
		{name: "blanks around", in: " \t\r\n{ }\n", names: []string{}},
		{name: "order is kept", in: `{"z":1,"a":2,"m":3}`, names: []string{"z", "a", "m"}},
		{name: "names differ in case", in: `{"a":1,"A":2}`, names: []string{"a", "A"}},
		{name: "an empty name", in: `{"":1}`, names: []string{""}},
		{name: "escaped name", in: `{"\u0061":1}`, names: []string{"a"}},
		{name: "one name in two objects", in: `{"a":{"b":1},"c":{"b":1}}`, names: []string{"a", "c"}},
		{name: "deepest", in: nested(jsonobject.MaxDepth), names: []string{"a"}},
		{name: "large number", in: `{"n":123456789012345678901234567890}`, names: []string{"n"}},

		{name: "nothing", in: ``, err: "empty, want JSON"},
		{name: "only blanks", in: " \n", err: "empty, want JSON"},
		{name: "a list", in: `[1]`, err: "want a JSON object"},
		{name: "a string", in: `"approved"`, err: "want a JSON object"},
		{name: "a number", in: `1`, err: "want a JSON object"},
		{name: "null", in: `null`, err: "want a JSON object"},
		{name: "true", in: `true`, err: "want a JSON object"},
		{name: "a bare word", in: `approved`, err: "1:1: invalid character"},
		{name: "name twice", in: `{"a":1,"a":2}`, err: `"a" stands twice`},
		{name: "name twice, once escaped", in: `{"a":1,"\u0061":2}`, err: `"a" stands twice`},
		{name: "name twice, deep inside", in: `{"x":[{"a":1,"a":2}]}`, err: `"a" stands twice`},
		{name: "trailing object", in: `{} {}`, err: "1:4: data after the JSON value"},
		{name: "trailing word", in: "{}\nx", err: "2:1: data after the JSON value"},
		{name: "trailing NUL", in: "{}\x00", err: "1:3: data after the JSON value"},
		{name: "trailing comma", in: `{"a":1,}`, err: "invalid character"},
		{name: "truncated", in: `{"a":1`, err: "ends too early"},
		{name: "truncated name", in: `{"a`, err: "ends too early"},
		{name: "truncated after colon", in: `{"a":`, err: "ends too early"},
		{name: "one brace", in: `{`, err: "ends too early"},
		{name: "no colon", in: `{"a" 1}`, err: "1:6: invalid character"},
		{name: "number for a name", in: `{1:1}`, err: "1:2: invalid character"},
		{name: "NaN", in: `{"a":NaN}`, err: "invalid character"},
		{name: "leading zero", in: `{"a":01}`, err: "invalid character"},
		{name: "comment", in: `{/*a*/}`, err: "invalid character"},
		{name: "byte order mark", in: "\ufeff{}", err: "1:1: invalid character"},
		{name: "invalid UTF-8", in: "{\"a\":\n\"\xff\"}", err: "2:2: invalid UTF-8"},
		{name: "half a surrogate is replaced, so two can collide", in: `{"\ud800":1,"\ud801":2}`, err: "stands twice"},
		{name: "one too deep", in: nested(jsonobject.MaxDepth + 1), err: "nested deeper than 32"},
		{name: "lists too deep", in: `{"a":` + strings.Repeat("[", 10_000) + strings.Repeat("]", 10_000) + `}`, err: "nested deeper than 32"},
		{name: "control character in a string", in: "{\"a\":\"\n\"}", err: "invalid character"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o, err := jsonobject.Parse([]byte(tt.in))
			if tt.names == nil {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("got %v, %v, want an error with %q", o, err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatalf("got %v, want an object", err)
			}
			names := []string{}
			for _, m := range o {
				names = append(names, m.Name)
			}
			if !slices.Equal(names, tt.names) {
				t.Errorf("names: got %q, want %q", names, tt.names)
			}
		})
	}
}

func TestParseSharesNoMemory(t *testing.T) {
	in := []byte(`{"a":"before"}`)
	o, err := jsonobject.Parse(in)
	if err != nil {
		t.Fatal(err)
	}
	copy(in, `{"b":"after "}`)
	if v, ok := o.Get("a"); !ok || string(v) != `"before"` {
		t.Errorf("got %s after the input changed, want it as it was read", v)
	}
}

func TestCheckTakesAnyValue(t *testing.T) {
	for _, s := range []string{`1`, `"a"`, `null`, `[1,{"a":[]}]`, ` true `} {
		if err := jsonobject.Check([]byte(s)); err != nil {
			t.Errorf("%s: got %v, want nil", s, err)
		}
	}
	for _, s := range []string{``, `1 2`, `[1`, `{"a":1,"a":1}`, `]`, `tru`, "\"\xc3\""} {
		if err := jsonobject.Check([]byte(s)); err == nil {
			t.Errorf("%s: got nil, want an error", s)
		}
	}
}

func TestObjectIsReplacedNotEdited(t *testing.T) {
	o, err := jsonobject.Parse([]byte(`{"z": 1, "unknown": {"b": [1, 2], "a": null}, "a": "x"}`))
	if err != nil {
		t.Fatal(err)
	}
	before := must(t, o)
	tests := []struct {
		name string
		got  jsonobject.Object
		want string
	}{
		{"itself", o, `{"z":1,"unknown":{"b":[1,2],"a":null},"a":"x"}`},
		{"with, in its place", o.With("z", "new"), `{"z":"new","unknown":{"b":[1,2],"a":null},"a":"x"}`},
		{"with, at the end", o.With("n", []int{1}), `{"z":1,"unknown":{"b":[1,2],"a":null},"a":"x","n":[1]}`},
		{"with an object", o.With("a", jsonobject.Object{{Name: "q", Value: json.RawMessage(`1`)}}), `{"z":1,"unknown":{"b":[1,2],"a":null},"a":{"q":1}}`},
		{"without", o.Without("z", "a", "absent"), `{"unknown":{"b":[1,2],"a":null}}`},
		{"without everything", o.Without("z", "a", "unknown"), `{}`},
		{"of nothing", jsonobject.Object(nil).With("a", 1), `{"a":1}`},
		{"nil", nil, `{}`},
	}
	for _, tt := range tests {
		if got := must(t, tt.got); got != tt.want {
			t.Errorf("%s: got %s, want %s", tt.name, got, tt.want)
		}
	}
	// Two copies of one object that has room at its end do not see each other.
	base := slices.Grow(o.Without("a"), 8)
	x, y := base.With("x", 1), base.With("y", 2)
	if got := must(t, x); got != `{"z":1,"unknown":{"b":[1,2],"a":null},"x":1}` {
		t.Errorf("the first of two copies: got %s", got)
	}
	if got := must(t, y); got != `{"z":1,"unknown":{"b":[1,2],"a":null},"y":2}` {
		t.Errorf("the second of two copies: got %s", got)
	}
	if after := must(t, o); after != before {
		t.Errorf("the original changed: got %s, want %s", after, before)
	}
	if _, ok := o.Get("Z"); ok {
		t.Error("Get found a member by a name in other case")
	}
}

func must(t *testing.T, o jsonobject.Object) string {
	t.Helper()
	b, err := json.Marshal(o)
	if err != nil {
		t.Fatalf("marshal %v: %v", o, err)
	}
	return string(b)
}

func TestUnmarshalInsideAStruct(t *testing.T) {
	var v struct{ In jsonobject.Object }
	if err := json.Unmarshal([]byte(`{"In":{"b":1,"a":2}}`), &v); err != nil || must(t, v.In) != `{"b":1,"a":2}` {
		t.Errorf("got %v, %v, want the object in its order", v.In, err)
	}
	if err := json.Unmarshal([]byte(`{"In":{"b":1,"b":2}}`), &v); err == nil {
		t.Error("a name that stands twice: got nil, want an error")
	}
	if must(t, v.In) != `{"b":1,"a":2}` {
		t.Errorf("a failed read changed the object: %v", v.In)
	}
}

// FuzzParse holds that what was read is written back whole and in its order,
// and that whatever is refused or taken, encoding/json sees the same.
func FuzzParse(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"z":1,"a":[{"b":null}],"m":"é\u2028<"}`, `{"a":1,"a":2}`, `{"a":1e999}`, `{"n":-0.0}`, "{\"a\":\"\xff\"}",
		`[1]`, `{"a":1}x`, nested(33), `{"\ud800":1}`, `{"a":`, "\ufeff{}",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		in := bytes.Clone(data)
		o, err := jsonobject.Parse(data)
		if !bytes.Equal(data, in) {
			t.Fatal("Parse changed its input")
		}
		if err != nil {
			return
		}
		if !json.Valid(data) {
			t.Fatalf("%q was read, but is not JSON", data)
		}
		if err := jsonobject.Check(data); err != nil {
			t.Fatalf("%q was read, but Check says %v", data, err)
		}
		out, err := json.Marshal(o)
		if err != nil {
			t.Fatalf("marshal what %q became: %v", data, err)
		}
		again, err := jsonobject.Parse(out)
		if err != nil {
			t.Fatalf("read %q again as %q: %v", data, out, err)
		}
		if len(again) != len(o) {
			t.Fatalf("%q has %d members, written again %d", data, len(o), len(again))
		}
		seen := map[string]bool{}
		for i, m := range o {
			if seen[m.Name] {
				t.Fatalf("%q: %q stands twice", data, m.Name)
			}
			seen[m.Name] = true
			if again[i].Name != m.Name {
				t.Fatalf("member %d of %q: got %q, want %q", i, out, again[i].Name, m.Name)
			}
		}
		// json.Number keeps what a float64 would lose.
		if got, want := decode(t, out), decode(t, data); !reflect.DeepEqual(got, want) {
			t.Fatalf("%q written again means something else: %q", data, out)
		}
	})
}

func decode(t *testing.T, data []byte) (v any) {
	t.Helper()
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	if err := dec.Decode(&v); err != nil {
		t.Fatalf("decode %q: %v", data, err)
	}
	return v
}
