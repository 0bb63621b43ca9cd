package management

import (
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// parameters of queries that mean something here. Others are ignored: Google's
// clients send some with every request.
var parameters = []string{
	"action", "apiProduct", "app", "attributename", "attributevalue", "actor", "count", "dryRun", "entity", "expand", "expired",
	"expiringWithin", "filter", "from", "ids", "includeCred", "keyStatus", "object", "pageSize", "pageToken", "query", "reason",
	"reveal", "reverse", "rows", "shallowExpand", "startKey", "status", "ticket", "to", "wait",
}

const (
	// maxPage of elements in a list.
	maxPage = 1000
	// maxQueryValue in bytes.
	maxQueryValue = 8 << 10
)

// query of a request.
type query struct{ values url.Values }

// parseQuery is strict about the parameters it knows. The query is what could be
// read of it, error or not.
func parseQuery(raw string) (query, error) {
	values, err := url.ParseQuery(raw)
	q := query{values}
	if err != nil {
		return q, invalid("?", "the query is not well-formed: want name=value&name=value, percent-encoded")
	}
	for _, name := range parameters {
		switch given := values[name]; {
		case len(given) > 1:
			return q, invalid("?"+name, "is given %d times, want once", len(given))
		case len(given) == 1 && (len(given[0]) > maxQueryValue || strings.ContainsRune(given[0], 0)):
			return q, invalid("?"+name, "is longer than %d bytes, or holds a zero byte", maxQueryValue)
		}
	}
	return q, nil
}

func (q query) has(name string) bool   { return q.values.Has(name) }
func (q query) get(name string) string { return q.values.Get(name) }

// flag reads a parameter that is true or false.
func (q query) flag(name string, otherwise bool) (bool, error) {
	switch q.get(name) {
	case "true":
		return true, nil
	case "false":
		return false, nil
	case "":
		if !q.has(name) {
			return otherwise, nil
		}
	}
	return otherwise, invalid("?"+name, "want true or false")
}

// word reads a parameter that is one of words; empty if it is not there.
func (q query) word(name string, words ...string) (string, error) {
	given := q.get(name)
	if !q.has(name) || slices.Contains(words, given) {
		return given, nil
	}
	return "", invalid("?"+name, "want %s", oneOf(words))
}

// page reads how many elements are asked for, by the first of names that is
// there.
func (q query) page(otherwise int, names ...string) (int, error) {
	for _, name := range names {
		if !q.has(name) {
			continue
		}
		n, err := strconv.Atoi(q.get(name))
		if err != nil || n < 1 || n > maxPage {
			return 0, invalid("?"+name, "want a number from 1 to %d", maxPage)
		}
		return n, nil
	}
	return otherwise, nil
}

// instant reads a time in milliseconds since 1970, or in RFC 3339; zero if it is
// not there.
func (q query) instant(name string) (time.Time, error) {
	if !q.has(name) {
		return time.Time{}, nil
	}
	if ms, err := strconv.ParseInt(q.get(name), 10, 64); err == nil && ms >= 0 && ms <= latest {
		return time.UnixMilli(ms), nil
	}
	if t, err := time.Parse(time.RFC3339, q.get(name)); err == nil && t.UnixMilli() >= 0 && t.UnixMilli() <= latest {
		return t, nil
	}
	return time.Time{}, invalid("?"+name, "want milliseconds since 1970, or a time such as 2026-01-31T12:00:00Z")
}

// latest time, in milliseconds: the end of the year 9999.
const latest = 253402300799999

// oneOf lists words for people.
func oneOf(words []string) string {
	if len(words) == 1 {
		return words[0]
	}
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " or " + words[last]
}
