package faults

import (
	"fmt"
	"strings"
	"testing"

	"keygate/authz"
	"keygate/keygatetest"
	"keygate/keygatetest/variant"
)

// Values that no manager writes stand in etcd: in a flag of each level, and in
// the JSON of each record. Whatever they are, the key is refused and no other
// is, until a good value is put.
func TestHostileValues(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "hostile values", Faults: "misspelt, truncated, huge, deep, doubled and newer values in every place of a record",
		Guarantees: []Guarantee{G5, G7, G8},
		Options:    Options{Keys: 8, Replicas: 2},
		Run:        hostileValues,
		Guards: []Guard{
			{
				Name: "the comparison with the exact word", Guarantee: G7,
				Mutations: []variant.Mutation{{File: "statestore/keyspace/value.go", Old: "if string(value) == w.String() {", New: "if strings.EqualFold(strings.TrimSpace(string(value)), w.String()) {"}},
			},
			{
				Name: "the refusal of another version", Guarantee: G7,
				Mutations: []variant.Mutation{{File: "statestore/keyspace/value.go", Old: "case string(v) != strconv.Itoa(Version):", New: "case string(v) == strconv.Itoa(-Version):"}},
			},
		},
	})
}

// hostileWords are values of a flag that do not open it. The opening word is
// put in place of %s.
var hostileWords = []string{
	"", " ", "\n", "%s ", " %s", "%s\n", "%s\r\n", "%s\x00", "\"%s\"", "'%s'", "%s.", "%s,revoked", "%[1]s%[1]s",
	"\ufeff%s", "APPROVED", "Approved", "Active", "aproved", "approve", "approved-v2", "enabled", "suspended", "allow", "true", "1", "0", "null", "{}", "[]",
	`{"status":"%s"}`, `{"v":1,"status":"%s"}`, "аpproved" /* a Cyrillic а */, "appro\u200bved", "\xff\xfe", "%s\x1b[0m",
}

// hostileJSON makes values of a record's details out of a good one.
func hostileJSON(good string) map[string]string {
	inner := strings.TrimSuffix(strings.TrimPrefix(good, "{"), "}")
	return map[string]string{
		"empty": "", "blank": " ", "null": "null", "a number": "7", "a string": `"approved"`, "a list": "[" + good + "]",
		"truncated": good[:len(good)/2], "without its end": good[:len(good)-1], "trailing data": good + good, "trailing word": good + "x",
		"newer version": strings.Replace(good, `"v":1`, `"v":2`, 1), "version zero": strings.Replace(good, `"v":1`, `"v":0`, 1),
		"version as text": strings.Replace(good, `"v":1`, `"v":"1"`, 1), "version with a fraction": strings.Replace(good, `"v":1`, `"v":1.0`, 1),
		"no version": strings.Replace(good, `"v":1`, `"w":1`, 1), "version null": strings.Replace(good, `"v":1`, `"v":null`, 1),
		"two versions": `{"v":1,` + inner + `}`, "version in capitals": strings.Replace(good, `"v":1`, `"V":1`, 1),
		"doubled field": `{` + inner + `,"x":1,"x":1}`,
		"not UTF-8":     `{` + inner + `,"x":"` + "\xff" + `"}`,
		"deep":          `{` + inner + `,"x":` + strings.Repeat("[", 20_000) + strings.Repeat("]", 20_000) + `}`,
		"huge junk":     strings.Repeat("x", 1_400_000),
		"NaN":           `{` + inner + `,"x":NaN}`, "comment": `{` + inner + `/**/}`, "byte order mark": "\ufeff" + good,
		"another developer": strings.Replace(good, `"developerId":"`, `"developerId":"not-`, 1),
	}
}

func hostileValues(w *World) {
	w.Checks(100)
	const hostile = 4 // keys; one of each level, the others are good all the time
	good := hostile
	refusedGood := 0
	stillGood := func(what string) {
		for i := range w.Replicas {
			c := w.Check(i, good)
			if !c.Yes() && c.decided() {
				refusedGood++
				w.Expect(G8, false, "a good key is refused with %s on replica %d beside %s", c.answer(), i, what)
			}
		}
	}
	tried, most := 0, w.Rounds(12, len(hostileWords))
	for l := range numLevels {
		key := int(l)
		for n := range most {
			// Each level begins elsewhere, so that the short run tries them all, too.
			word := hostileWords[(n+int(l)*most)%len(hostileWords)]
			value := word
			if strings.Contains(word, "%") {
				value = fmt.Sprintf(word, opening(l))
			}
			one := w.Set(key, l, value, false)
			w.Applied(one.Revision)
			for i := range w.Replicas {
				c := w.Check(i, key)
				w.Expect(G7, !c.Yes(), "replica %d allows a key whose %s has the status %q", i, l, value)
			}
			tried++
		}
		stillGood("hostile words")
		one := w.Approve(key, l, false)
		w.Applied(one.Revision)
		for i := range w.Replicas {
			w.Eventually(G8, w.Options.S, fmt.Sprintf("replica %d to allow a key whose %s is good again", i, l), func() bool { return w.Allowed(i, key) })
		}
	}

	unreadable, _ := w.Replicas[0].Metric("keygate_unreadable_records_total")
	x := w.extra(keygatetest.Key{Key: "hostile-00000000-extra-key"})
	named := false
	for _, path := range []string{x.credential, x.app, x.developer} {
		was := x.value(path)
		for name, value := range hostileJSON(was) {
			if value == was { // of a record that has no such field
				continue
			}
			w.Applied(x.put(path, value))
			for i := range w.Replicas {
				got := x.ask(i)
				// An app that names another developer leads to one who is not there.
				w.Expect(G7, got == authz.RecordUnreadable, "replica %d answers %v under %s with JSON that is %s, want %v", i, got, path, name, authz.RecordUnreadable)
			}
			tried++
			stillGood("JSON that is " + name)
		}
		w.Applied(x.put(path, was))
		for i := range w.Replicas {
			got := x.ask(i)
			w.Expect(G8, got == authz.Allowed, "replica %d answers %v under %s that is good again, want %v", i, got, path, authz.Allowed)
		}
		// What another version of keygate may have added changes nothing.
		w.Applied(x.put(path, strings.TrimSuffix(was, "}")+`,"fromTheFuture":{"a":[1,2,3]}}`))
		for i := range w.Replicas {
			got := x.ask(i)
			w.Expect(G8, got == authz.Allowed, "replica %d answers %v under %s with a field that it does not know, want %v", i, got, path, authz.Allowed)
		}
		named = named || strings.Contains(w.Replicas[0].Log(), x.id)
	}
	after, _ := w.Replicas[0].Metric("keygate_unreadable_records_total")
	w.Expect(G7, after > unreadable && named, "an unreadable record is neither counted (%.0f) nor logged with the key's id (%v)", after-unreadable, named)
	w.Expect(G7, !strings.Contains(w.Replicas[0].Log(), x.given.Key), "the consumer key stands in the log")
	for _, r := range w.Replicas {
		w.Expect(G7, r.Running(), "replica %d has ended", r.Index)
	}
	w.Figure(G7, "hostile values", "%d tried on %d replicas, each refused; %d refusals of a good key beside them; healed by the next good put", tried, len(w.Replicas), refusedGood)
}
