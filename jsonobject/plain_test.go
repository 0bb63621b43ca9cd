package jsonobject

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
)

const credential = `{"v":1,"developerId":"Z2S37rxX2Suzkwtg","appId":"6ed3a4d1-4733-439a-80a4-0d71149ec9ad","issuedAt":1700000000000,` +
	`"expiresAt":-1,"scopes":["READ","WRITE"],"attributes":[{"name":"a","value":"b"}],"hint":"giIC...","products":[{"apiproduct":"Weather-Product"}]}`

// FuzzPlain holds that what plain takes is what Parse makes of it the long way.
func FuzzPlain(f *testing.F) {
	for _, s := range []string{
		credential, `{}`, ` { } `, `{"a":1,"a":2}`, `{"a":{"b":1,"b":2}}`, `{"a":[1,{"b":null}]}`, `{"a":-0}`, `{"a":01}`, `{"a":1.5}`, `{"a":-}`, `{"a":1e3}`,
		`{"a":"\u0061"}`, `{"a":"ä"}`, "{\"a\":\"\x7f\"}", "{\"a\":\"\xff\"}", `{"a":tru}`, `{"a":nulll}`, `{"a":1,}`, `{,}`, `[]`, `{"a":1}x`, `{"a":[1,]}`, `{"a":[]}`,
		`{"":""}`, "{\t\"a\"\r\n:\n1 , \"b\" : [ 1 , 2 ] }", strings.Repeat(`{"a":`, 40) + "1" + strings.Repeat("}", 40), many(64), many(65),
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		got, ok := plain(data)
		if !ok {
			return
		}
		want, err := parse(data)
		if err != nil {
			t.Fatalf("plain takes %q, parse says %v", data, err)
		}
		if len(got)+len(want) > 0 && !reflect.DeepEqual(got, want) {
			t.Fatalf("%q: plain made %v, parse %v", data, got, want)
		}
	})
}

func many(n int) string {
	var members []string
	for i := range n {
		members = append(members, fmt.Sprintf(`"m%d":%d`, i, i))
	}
	return "{" + strings.Join(members, ",") + "}"
}

// The stored records are plain, or nothing is won.
func TestRecordsArePlain(t *testing.T) {
	for _, s := range []string{credential, `{}`, many(64)} {
		if _, ok := plain([]byte(s)); !ok {
			t.Errorf("%.60s is not plain", s)
		}
	}
	for _, s := range []string{`{"a":1,"a":2}`, many(65), `{"a":1.5}`, `{"a":"\n"}`} {
		if _, ok := plain([]byte(s)); ok {
			t.Errorf("%.60s is plain", s)
		}
	}
}

func BenchmarkParse(b *testing.B) {
	for name, read := range map[string]func([]byte) (Object, error){"plain": Parse, "any": parse} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := read([]byte(credential)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
