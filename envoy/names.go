package envoy

import (
	"strings"
	"sync"
	"sync/atomic"
)

// maxNames that are kept: a thousand routes with names of their own. They take
// 1/4 MiB at most.
const maxNames = 1024

// names keeps the names of products and organizations, so that a check that
// was read from a buffer has strings that outlive it, without memory of its
// own. They come from the operator's routes, of which there are few, and the
// first maxNames of them stay. It is safe for concurrent use; the zero names
// is empty.
type names struct {
	known atomic.Pointer[map[string]string] // replaced, never changed
	mu    sync.Mutex                        // held to replace it
}

// own returns a string that is equal to name and shares no memory with it.
func (n *names) own(name string) string {
	if kept, ok := n.lookUp(name); ok {
		return kept
	}
	name = strings.Clone(name)
	n.mu.Lock()
	defer n.mu.Unlock()
	if kept, ok := n.lookUp(name); ok {
		return kept
	}
	known := map[string]string{}
	if old := n.known.Load(); old != nil {
		if len(*old) >= maxNames {
			return name
		}
		for kept := range *old {
			known[kept] = kept
		}
	}
	known[name] = name
	n.known.Store(&known)
	return name
}

func (n *names) lookUp(name string) (string, bool) {
	known := n.known.Load()
	if known == nil {
		return "", false
	}
	kept, ok := (*known)[name]
	return kept, ok
}
