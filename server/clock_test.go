package server

import (
	"testing"
	"testing/synctest"
	"time"
)

// What a wall clock did between two looks, and what is told of it.
func TestWallClockWentBack(t *testing.T) {
	tests := []struct {
		name   string
		passed time.Duration // between the looks
		moved  time.Duration // the wall clock, against the time that passed
		within time.Duration // that the second look itself takes, before and after it reads
		want   time.Duration
	}{
		{"as time passed", 50 * time.Millisecond, 0, 0, 0},
		{"back an hour", 50 * time.Millisecond, -time.Hour, 0, time.Hour},
		{"back half a second", 50 * time.Millisecond, -time.Second / 2, 0, time.Second / 2},
		{"back two seconds, ten seconds after the last look", 10 * time.Second, -2 * time.Second, 0, 2 * time.Second},
		{"ahead a day", 50 * time.Millisecond, 24 * time.Hour, 0, -24 * time.Hour},
		{"a pause within the look", 50 * time.Millisecond, 0, 3 * time.Second, -3 * time.Second},
		{"back during a pause", 50 * time.Millisecond, -time.Hour, 3 * time.Second, time.Hour - 3*time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var moved, within time.Duration
				c := newWallClock(func() time.Time {
					time.Sleep(within)
					wall := time.Now().Add(moved)
					time.Sleep(within)
					return wall
				})
				time.Sleep(tt.passed)
				moved, within = tt.moved, tt.within
				if got := c.wentBack(); got != tt.want {
					t.Errorf("got back by %v, want %v", got, tt.want)
				}
				// The next look finds nothing new: a jump is told once, and a pause in
				// the look before is no jump.
				within = 0
				time.Sleep(tt.passed)
				if got := c.wentBack(); got > 0 {
					t.Errorf("the look after it: got back by %v, want no jump", got)
				}
			})
		})
	}
}
