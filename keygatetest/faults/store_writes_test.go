package faults

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"os/exec"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/ledger"
)

// lacks tells whether this run is the one without the guard of that name. Some
// guards stand in the scenario itself.
func (w *World) lacks(guard string) bool { return w.Guard != nil && w.Guard.Name == guard }

// flagOf is one flag of one key.
type flagOf struct {
	key   int
	level Level
}

// setTogether revokes or approves several flags in one transaction, as a
// manager does, and records a write of each.
func (w *World) setTogether(s *Stream, client *clientv3.Client, action ledger.StatusAction, flags ...flagOf) []Write {
	slices.SortFunc(flags, func(a, b flagOf) int { return cmp.Or(cmp.Compare(a.level, b.level), cmp.Compare(a.key, b.key)) })
	var targets []ledger.Target
	for _, f := range flags {
		mu := w.flag(w.Keys[f.key].Paths[f.level])
		mu.Lock() // in the order of all
		defer mu.Unlock()
		targets = append(targets, w.Keys[f.key].flags[f.level])
	}
	return w.manage(s, client, action, targets, flags)
}

// manage is setTogether without taking turns: several managers may change the
// same flags at once.
func (w *World) manage(s *Stream, store ledger.Store, action ledger.StatusAction, targets []ledger.Target, flags []flagOf) []Write {
	ctx, cancel := context.WithTimeout(context.Background(), w.Options.WriteTimeout)
	defer cancel()
	start := w.Rec.Now()
	c, err := ledger.New(ledger.Config{Store: store, Space: w.Space}).SetStatus(ctx, ledger.By{}, action, targets, ledger.StatusOptions{})
	end := w.Rec.Now()
	var all []Write
	for i, f := range flags {
		k := w.Keys[f.key]
		one := Write{Start: start, End: end, Path: k.Paths[f.level], Level: f.level, Keys: k.with[f.level],
			Value: closing(f.level), Managed: true, Outcome: outcome(err)}
		if one.Outcome == Unknown && w.lacks(unknownOutcome) {
			one.Outcome = Failed
		}
		if action == ledger.Approve {
			one.Value = opening(f.level)
		}
		if err == nil {
			one.Revision, one.Already = c.Revision, !c.Flags[i].Changed
			if c.ByDeletion {
				one.Value, one.Deleted = "", true
			}
		}
		s.Write(one)
		all = append(all, one)
	}
	return all
}

// command is what keygate revoke and keygate approve answered.
type command struct {
	Write
	// Err is what it said when it failed; nil if it exited with 0.
	Err error
	// Took is from its start to its end, with the receipt if it waited for one.
	Took time.Duration
}

// command runs keygate revoke or approve, as a user would, on a key, and records
// the write. The key goes in by standard input.
func (w *World) command(action ledger.StatusAction, key int, endpoint string, args ...string) command {
	k := w.Keys[key]
	one := Write{Path: k.Paths[LevelKey], Level: LevelKey, Keys: k.with[LevelKey], Value: closing(LevelKey), Managed: true}
	if action == ledger.Approve {
		one.Value = opening(LevelKey)
	}
	mu := w.flag(one.Path)
	mu.Lock()
	defer mu.Unlock()
	cmd := exec.CommandContext(w.T.Context(), w.binary, append([]string{action.String(), "key", "-",
		"--etcd-endpoints", endpoint, "-o", "json"}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(k.Name), &stdout, &stderr
	one.Start = w.Rec.Now()
	err := cmd.Run()
	one.End = w.Rec.Now()
	c := command{Took: one.End - one.Start}
	var answer struct {
		Revision   int64 `json:"revision"`
		ByDeletion bool  `json:"byDeletion"`
		Replicas   *struct{ Total, Applied, Fenced int }
	}
	if err == nil {
		err = json.Unmarshal(stdout.Bytes(), &answer)
	} else {
		err = errors.New(strings.TrimSpace(stderr.String()))
	}
	if c.Err = err; err == nil {
		one.Outcome, one.Revision = Acked, answer.Revision
		if answer.ByDeletion {
			one.Value, one.Deleted = "", true
		}
		if r := answer.Replicas; r != nil {
			one.Receipt = &Receipt{End: one.End, Total: r.Total, Applied: r.Applied, Fenced: r.Fenced}
		}
	}
	c.Write = one
	w.main.Write(one)
	return c
}
