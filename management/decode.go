package management

import (
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"

	"keygate/jsonobject"
)

// rawJSON is a member that is read later.
type rawJSON = json.RawMessage

// members of an object of keygate's own, by name: a pointer to where each goes.
type members map[string]any

// decode reads an object, which holds nothing but members. pointer is where it
// stands in the body.
func decode(pointer string, raw []byte, into members) error {
	object, err := jsonobject.Parse(raw)
	if err != nil {
		return invalid(at(pointer), "want an object with %s", namesOf(into))
	}
	for _, m := range object {
		to, known := into[m.Name]
		if !known {
			// The name may be anything, a key too: it is not repeated.
			return invalid(at(pointer), "holds a member that is unknown here: want %s", namesOf(into))
		}
		err := json.Unmarshal(m.Value, to)
		if err == nil && string(m.Value) == "null" { // which leaves everything as it is
			err = errors.New("null")
		}
		if err != nil {
			want := "a value of another type"
			var wrong *json.UnmarshalTypeError
			if errors.As(err, &wrong) {
				want = "a " + wrong.Type.Kind().String() + ", not a " + wrong.Value
			}
			return invalid(pointer+"/"+m.Name, "want %s", want)
		}
	}
	return nil
}

// at is a pointer for people: that of the whole body is not empty, since an
// empty one says that it is not about the body.
func at(pointer string) string {
	if pointer == "" {
		return "/"
	}
	return pointer
}

func namesOf(into members) string {
	var names []string
	for _, name := range slices.Sorted(maps.Keys(into)) {
		names = append(names, strconv.Quote(name))
	}
	return strings.Join(names, ", ")
}

// index of an element in a list.
func index(pointer string, i int) string { return pointer + "/" + strconv.Itoa(i) }
