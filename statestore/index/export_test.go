package index

import "fmt"

// Left tells what an empty copy still holds that it should not; "" for nothing.
func (x *Index) Left() string {
	left := ""
	if n := len(x.names.entries) - 1 - len(x.names.free); n > 0 {
		left += fmt.Sprintf("%d names ", n)
	}
	if n := len(x.sets.all) - 1 - len(x.sets.free); n > 0 || len(x.sets.byID) > 0 {
		left += fmt.Sprintf("%d sets of products ", n)
	}
	if len(x.others) > 0 {
		left += fmt.Sprintf("%d other keys ", len(x.others))
	}
	for name, t := range map[string]*table{"keys": &x.byKey, "entities": &x.byName, "names": &x.names.byText} {
		for i := range t.segments {
			if n := t.segments[i].live; n != 0 {
				left += fmt.Sprintf("%d places for %s ", n, name)
			}
		}
	}
	return left
}

// NameBytes returns how many bytes the arena holds, and how many are in use.
func (x *Index) NameBytes() (all, live int) {
	for _, c := range x.names.chunks {
		all += cap(c.bytes)
	}
	for _, e := range x.names.entries {
		live += int(e.length)
	}
	return all, live
}
