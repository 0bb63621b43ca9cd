//go:build race

package envoy

// raceEnabled tells that a sync.Pool forgets now and then, on purpose.
const raceEnabled = true
