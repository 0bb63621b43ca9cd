package audit

import (
	"context"
	"time"
)

// Follow appends links without being the leader, until the watch ends.
func (f *Follower) Follow(ctx context.Context) error {
	_, err := f.follow(ctx)
	return err
}

// Again tells that err asks for a new watch.
func Again(err error) bool { return err == errAgain || err == errLost }

// LeaderPath is what the leader holds.
func (f *Follower) LeaderPath() string { return f.leader() }

// SetBehind sets how far behind, in revisions, the watch is opened anew.
func (f *Follower) SetBehind(n int64) { f.behind = n }

// SetIdle sets how old the newest link may become while there is no change.
func (f *Follower) SetIdle(d time.Duration) { f.idle = d }
