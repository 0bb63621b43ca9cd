package management

import (
	"fmt"
	"testing"
	"time"
)

func TestBucketsAreBounded(t *testing.T) {
	b := newBuckets(1, 2)
	now := time.Unix(1000, 0)
	for range 2 {
		if wait := b.take("kept", now); wait != 0 {
			t.Fatalf("got a wait of %v, want none", wait)
		}
	}
	for i := range 3 * maxBuckets {
		b.take(fmt.Sprint(i), now)
		b.empty("kept", now) // used, so it stays
	}
	if got := len(b.state.of); got != maxBuckets || b.state.recent.Len() != got {
		t.Errorf("%d buckets and a list of %d, want %d", got, b.state.recent.Len(), maxBuckets)
	}
	if wait := b.take("kept", now); wait != time.Second {
		t.Errorf("got a wait of %v, want 1s", wait)
	}
	if wait := b.take("kept", now.Add(time.Second)); wait != 0 {
		t.Errorf("a second later: got a wait of %v, want none", wait)
	}
	if b.empty("nobody", now) || b.get("nobody", false) != nil {
		t.Error("a look made a bucket")
	}
	for d, want := range map[time.Duration]string{0: "1", time.Millisecond: "1", time.Second: "1", 1001 * time.Millisecond: "2"} {
		if got := retryAfter(d); got != want {
			t.Errorf("Retry-After of %v: got %s, want %s", d, got, want)
		}
	}
}

func TestPlaces(t *testing.T) {
	p := newPlaces(8)
	status := func(err error) int {
		if err == nil {
			return 0
		}
		return refusalOf(err).status
	}
	var releases []func()
	for i, c := range []struct {
		name string
		want int
	}{{"a", 0}, {"a", 0}, {"a", 429}, {"b", 0}, {"b", 0}, {"c", 0}, {"c", 0}, {"d", 0}, {"d", 0}, {"e", 503}, {"a", 429}} {
		release, err := p.take(c.name)
		if got := status(err); got != c.want {
			t.Errorf("place %d, of %s: got %d, want %d", i, c.name, got, c.want)
		}
		if err == nil {
			releases = append(releases, release)
		}
	}
	releases[0]()
	releases[0]() // once is enough
	if _, err := p.take("b"); status(err) != 429 {
		t.Errorf("a third one of b: got %v, want 429", err)
	}
	release, err := p.take("a")
	if err != nil {
		t.Fatalf("a place that was given back: %v", err)
	}
	if _, err := p.take("e"); status(err) != 503 {
		t.Errorf("one more than there are: got %v, want 503", err)
	}
	for _, r := range append(releases, release) {
		r()
	}
	if p.state.taken != 0 || len(p.state.of) != 0 {
		t.Errorf("%d places of %v are taken in the end, want none", p.state.taken, p.state.of)
	}
	if got := newPlaces(1).each; got != 1 {
		t.Errorf("one place: got %d for each, want 1", got)
	}
}

func TestSummary(t *testing.T) {
	var s summary
	now := time.Unix(1000, 0)
	for i, want := range []int{1, 0, 0} {
		if got := s.add(now); got != want {
			t.Errorf("attempt %d: got %d to report, want %d", i, got, want)
		}
	}
	if got := s.add(now.Add(noteEvery)); got != 3 {
		t.Errorf("a minute later: got %d to report, want 3", got)
	}
}
