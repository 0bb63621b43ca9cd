package server

import "time"

// clockJump is how far the wall clock must go back between two looks to be
// told. Slewing, at most a tenth of the time that passes, stays far below.
const clockJump = time.Second

// wallClock looks out for a wall clock that is set back, measured against Go's
// monotonic clock. A jump ahead is not told: it looks like a suspend of the
// machine. One goroutine looks.
type wallClock struct {
	now  func() time.Time
	wall time.Time // at the last look, without its monotonic part
	read time.Time // when that was, at the latest, with it
}

func newWallClock(now func() time.Time) *wallClock {
	return &wallClock{now: now, wall: now().Round(0), read: time.Now()}
}

// wentBack tells by how much, at the least, the wall clock was set back since
// the last look; 0 or less if it was not. Counted is the time between the end
// of that look and the start of this one, so that a pause within a look, of
// the process or the machine, is never taken for a jump.
func (c *wallClock) wentBack() time.Duration {
	passed := time.Since(c.read)
	wall := c.now().Round(0)
	back := passed - wall.Sub(c.wall)
	c.wall, c.read = wall, time.Now()
	return back
}
