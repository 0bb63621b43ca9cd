package management

import (
	"context"
	"errors"
	"net/http"
	"time"

	"keygate/audit"
	"keygate/authz"
	"keygate/ledger"
	"keygate/statestore/keyspace"
)

// Words of ?action=, in the order of ledger.StatusAction.
var (
	statusActions    = []string{ledger.Revoke: "revoke", ledger.Approve: "approve"}
	developerActions = []string{ledger.Revoke: "inactive", ledger.Approve: "active"}
)

// statusAction reads the word of an action.
func statusAction(given, pointer string, words []string) (ledger.StatusAction, error) {
	for i, word := range words {
		if given == word {
			return ledger.StatusAction(i), nil
		}
	}
	if given == "" {
		return 0, invalid(pointer, "is missing: want %s", oneOf(words))
	}
	return 0, invalid(pointer, "is none that there is: want %s", oneOf(words))
}

func (c *call) setDeveloperStatus() (answer, error) {
	return c.setFlag(developerActions, func() (ledger.Target, error) {
		return c.cfg.Ledger.DeveloperTarget(c.ctx, c.org, c.developer())
	})
}

func (c *call) setAppStatus() (answer, error) {
	return c.setFlag(statusActions, c.appTarget)
}

func (c *call) appTarget() (ledger.Target, error) {
	return c.cfg.Ledger.AppTarget(c.ctx, c.org, c.developer(), c.params["app"])
}

func (c *call) setKeyStatus() (answer, error) {
	return c.setFlag(statusActions, func() (ledger.Target, error) {
		return c.cfg.Ledger.KeyTarget(c.ctx, c.org, c.developer(), c.params["app"], c.params["key"])
	})
}

func (c *call) setKeyProductStatus() (answer, error) {
	return c.setFlag(statusActions, func() (ledger.Target, error) {
		return c.cfg.Ledger.KeyProductTarget(c.ctx, c.org, c.developer(), c.params["app"], c.params["key"], c.product())
	})
}

// setFlag is approve and revoke of one thing, as Apigee has it: 204, or with
// wait=fleet the receipt.
func (c *call) setFlag(words []string, find func() (ledger.Target, error)) (answer, error) {
	return c.setFlagTo(c.query.get("action"), "?action", words, find)
}

// setFlagTo is the same for an action that stands at pointer.
func (c *call) setFlagTo(word, pointer string, words []string, find func() (ledger.Target, error)) (answer, error) {
	action, err := statusAction(word, pointer, words)
	if err != nil {
		return answer{}, err
	}
	target, err := find()
	if err != nil {
		return answer{}, err
	}
	by, wait, err := c.statusOptions()
	if err != nil {
		return answer{}, err
	}
	done, err := c.cfg.Ledger.SetStatus(c.ctx, by, action, []ledger.Target{target}, ledger.StatusOptions{Barrier: wait})
	switch {
	case err != nil:
		return answer{}, err
	case by.DryRun:
		return previewed(done.Revision, flagChanges(done), done.Stops), nil
	case !wait:
		return answer{revision: done.Revision, replayed: done.Replayed}, nil
	}
	r, err := c.receipt(done)
	if err != nil {
		return answer{}, err
	}
	changed := done.Changed()
	told := flagTold{
		Action: action.String(), Changed: changed, Unchanged: len(done.Flags) - changed,
		ByDeletion: done.ByDeletion, NoSpace: done.NoSpace, NoReceipt: r.none, Interrupted: r.interrupted,
	}
	a := answer{revision: done.Revision, replayed: done.Replayed}
	if r.none {
		a.body = marshal(struct {
			Revision       int64     `json:"revision"`
			UnregisteredBy time.Time `json:"unregisteredBy"`
			flagTold
		}{done.Revision, done.UnregisteredBy().UTC().Truncate(time.Second), told})
		return a, nil
	}
	a.body = marshal(struct {
		ledger.ReceiptJSON
		flagTold
	}{r.JSON(), told})
	return a, nil
}

// flagTold is what an answer says of one flag behind the receipt: as keygate
// revoke prints it.
type flagTold struct {
	Action      string `json:"action"`
	Changed     int    `json:"changed"`
	Unchanged   int    `json:"unchanged"` // they were so already
	ByDeletion  bool   `json:"byDeletion,omitempty"`
	NoSpace     bool   `json:"noSpace,omitempty"`   // in etcd: no replica can acknowledge
	NoReceipt   bool   `json:"noReceipt,omitempty"` // though it was asked for
	Interrupted bool   `json:"interrupted,omitempty"`
}

// statusOptions reads how statuses are changed.
func (c *call) statusOptions() (by ledger.By, wait bool, err error) {
	if by, err = c.by(); err != nil {
		return by, false, err
	}
	word, err := c.query.word("wait", "fleet")
	return by, word != "" && !by.DryRun, err
}

// flagChanges of a dry run.
func flagChanges(done ledger.Change) (changes []audit.Change) {
	for _, f := range done.Flags {
		if !f.Changed {
			continue
		}
		after := wordAfter(done.Action, f.Target.Record.Kind).String()
		ch := audit.Change{Path: f.Path, After: &after}
		if f.Before != "" {
			ch.Before = &f.Before
		}
		changes = append(changes, ch)
	}
	return changes
}

// wordAfter is the state of a flag after an action.
func wordAfter(action ledger.StatusAction, kind keyspace.Kind) authz.Status {
	words := [...]authz.Status{ledger.Revoke: authz.StatusRevoked, ledger.Approve: authz.StatusApproved}
	if kind == keyspace.KindDeveloper {
		words = [...]authz.Status{ledger.Revoke: authz.StatusInactive, ledger.Approve: authz.StatusActive}
	}
	return words[action]
}

// received is what came of waiting for the fleet.
type received struct {
	ledger.Receipt
	none        bool // nobody was asked, or too many are waiting already
	interrupted bool // it is not complete
}

// receipt waits for the fleet. The place among the requests under way is given
// back before. Whoever goes away meanwhile undoes nothing.
func (c *call) receipt(done ledger.Change) (r received, err error) {
	c.rq.release()
	select {
	case c.waits <- struct{}{}:
		defer func() { <-c.waits }()
	default:
		return received{none: true}, nil
	}
	if done.Replayed { // nobody knows who was asked the first time: ask again
		ctx, cancel := context.WithTimeout(c.r.Context(), changeTimeout)
		defer cancel()
		if done, err = ledger.Barrier(ctx, c.cfg.Store, c.cfg.Space, c.org); err != nil {
			return r, err
		}
	}
	if !done.Asked() {
		return received{none: true}, nil
	}
	r.Receipt, err = done.Wait(c.r.Context())
	r.interrupted = err != nil
	if errors.Is(r.Unread, ledger.ErrReplaced) {
		return r, r.Unread
	}
	return r, nil
}

// maxTargets of one request.
const maxTargets = 5000

// target is one of POST statuses: a key, a product on it, an app or a developer,
// the last two by their ids.
type target struct {
	Key       string            `json:"key,omitempty"`
	Product   authz.ProductName `json:"product,omitempty"`
	App       string            `json:"app,omitempty"`
	Developer string            `json:"developer,omitempty"`
}

func (c *call) parseTarget(pointer string, raw []byte) (t ledger.Target, err error) {
	var given target
	if err := decode(pointer, raw, members{"key": &given.Key, "product": &given.Product, "app": &given.App, "developer": &given.Developer}); err != nil {
		return t, err
	}
	ways := 0
	for _, way := range []string{given.Key, given.App, given.Developer} {
		if way != "" {
			ways++
		}
	}
	switch {
	case ways != 1 || given.Product != "" && given.Key == "":
		return t, invalid(pointer, `want one of "key", "key" with "product", "app" and "developer"`)
	case given.App != "":
		t.Record = keyspace.AppRecord(c.org, authz.AppID(given.App))
	case given.Developer != "":
		t.Record = keyspace.DeveloperRecord(c.org, authz.DeveloperID(given.Developer))
	default:
		id, err := keyID(given.Key, pointer+"/key")
		if err != nil {
			return t, err
		}
		t = ledger.Target{Record: keyspace.KeyRecord(c.org, id), Product: given.Product}
	}
	return t, nil
}

// asked is a target as a client names it.
func asked(t ledger.Target) target {
	switch t.Record.Kind {
	case keyspace.KindKey:
		return target{Key: t.Record.Key.String(), Product: t.Product}
	case keyspace.KindApp:
		return target{App: t.Record.Name}
	}
	return target{Developer: t.Record.Name}
}

// flagDone is what became of one target.
type flagDone struct {
	Target  target `json:"target"`
	Path    string `json:"path"`
	Before  string `json:"before"`
	Changed bool   `json:"changed"`
}

// statusesDone is the answer of POST statuses.
type statusesDone struct {
	Action         string              `json:"action"`
	DryRun         bool                `json:"dryRun,omitempty"`
	Revision       int64               `json:"revision"`
	Changed        int                 `json:"changed"`
	Unchanged      int                 `json:"unchanged"`
	ByDeletion     bool                `json:"byDeletion"`
	NoSpace        bool                `json:"noSpace"`
	UnregisteredBy *time.Time          `json:"unregisteredBy,omitempty"`
	Flags          []flagDone          `json:"flags"`
	NotFound       []target            `json:"notFound,omitempty"`
	Partial        string              `json:"partial,omitempty"`
	NoReceipt      bool                `json:"noReceipt,omitempty"`
	Interrupted    bool                `json:"interrupted,omitempty"`
	Receipt        *ledger.ReceiptJSON `json:"receipt,omitempty"`
	Stops          []ledger.Stop       `json:"stops,omitempty"`
	Replayed       bool                `json:"replayed,omitempty"`
}

// setStatuses is approve and revoke of many. What is not there, or could not be
// done, is named in the answer if anything could.
func (c *call) setStatuses() (answer, error) {
	var word string
	var list []rawJSON
	if err := decode("", c.body, members{"action": &word, "targets": &list}); err != nil {
		return answer{}, err
	}
	action, err := statusAction(word, "/action", statusActions)
	if err != nil {
		return answer{}, err
	}
	if len(list) == 0 || len(list) > maxTargets {
		return answer{}, invalid("/targets", "has %d targets, want 1 to %d", len(list), maxTargets)
	}
	targets := make([]ledger.Target, len(list))
	for i, raw := range list {
		if targets[i], err = c.parseTarget(index("/targets", i), raw); err != nil {
			return answer{}, err
		}
	}
	by, wait, err := c.statusOptions()
	if err != nil {
		return answer{}, err
	}
	done, err := c.cfg.Ledger.SetStatus(c.ctx, by, action, targets, ledger.StatusOptions{Barrier: wait})
	if done.Replayed && err == nil {
		// What the first time found is not kept: tell what is there now.
		now := by
		now.DryRun, now.Once, now.IfMatch = true, nil, 0
		var there ledger.Change
		there, err = c.cfg.Ledger.SetStatus(c.ctx, now, action, targets, ledger.StatusOptions{})
		if err != nil && !errors.Is(err, ledger.ErrNotFound) {
			return answer{}, err
		}
		for _, f := range there.Flags {
			f.Changed = false // by this request
			done.Flags = append(done.Flags, f)
		}
	} else if err != nil && len(done.Flags) == 0 {
		return answer{}, err
	}
	changed := done.Changed()
	told := statusesDone{
		Action: action.String(), DryRun: by.DryRun, Revision: done.Revision, Changed: changed, Unchanged: len(done.Flags) - changed,
		ByDeletion: done.ByDeletion, NoSpace: done.NoSpace, Flags: []flagDone{}, Stops: done.Stops, Replayed: done.Replayed,
	}
	for _, f := range done.Flags {
		told.Flags = append(told.Flags, flagDone{asked(f.Target), f.Path, f.Before, f.Changed})
	}
	var missing *ledger.NotFoundError
	if errors.As(err, &missing) {
		for _, t := range missing.Targets {
			told.NotFound = append(told.NotFound, asked(t))
		}
	}
	var partial *ledger.PartialError
	if errors.As(err, &partial) {
		c.cfg.Logger.Warn("a change of several statuses was not completed", "requestId", c.rq.id, "cause", err)
		told.Partial = refusalOf(partial.Err).message
	}
	if !by.DryRun {
		if !done.Replayed {
			at := done.UnregisteredBy().UTC().Truncate(time.Second)
			told.UnregisteredBy = &at
		}
		if wait {
			r, err := c.receipt(done)
			if err != nil {
				return answer{}, err
			}
			told.NoReceipt, told.Interrupted = r.none, r.interrupted
			if !r.none {
				json := r.JSON()
				told.Receipt = &json
			}
		}
	}
	return answer{status: http.StatusOK, body: marshal(told), revision: done.Revision, replayed: done.Replayed}, nil
}
