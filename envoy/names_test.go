package envoy

import (
	"strconv"
	"sync"
	"testing"
)

// A name that is kept shares no memory with what it was read from.
func TestNamesOwn(t *testing.T) {
	var n names
	buffer := []byte("Weather-Product")
	got := n.own(text(buffer))
	again := n.own(text(buffer))
	copy(buffer, "Another-Name---")
	if got != "Weather-Product" || again != got {
		t.Errorf("got %q and %q after the buffer was used again, want the name as it was", got, again)
	}
	if other := n.own(text(buffer)); other != "Another-Name---" {
		t.Errorf("got %q, want what the buffer holds now", other)
	}
	if got := testing.AllocsPerRun(100, func() { n.own("Weather-Product") }); got != 0 {
		t.Errorf("a name that is known costs %v allocations, want 0", got)
	}
}

// Beyond the bound names are right, and no longer kept.
func TestNamesBound(t *testing.T) {
	var n names
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range maxNames + 100 {
				if name := strconv.Itoa(i); n.own(name) != name {
					t.Errorf("goroutine %d: %s came back as another name", g, name)
				}
			}
		})
	}
	wg.Wait()
	if got := len(*n.known.Load()); got != maxNames {
		t.Errorf("%d names are kept, want %d", got, maxNames)
	}
}
