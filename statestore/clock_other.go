//go:build !linux

package statestore

import "time"

var start = time.Now()

// now is the time since the process started, by Go's monotonic clock. On
// systems where that clock stops during a suspend, restart keygate after one.
func now() time.Duration { return time.Since(start) }
