package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"keygate/authz"
	"keygate/client"
	"keygate/config"
	"keygate/ledger"
	"keygate/statestore/keyspace"
)

// statusPlace is where revoke and approve find keys and change flags.
type statusPlace interface {
	// find returns keys. The error wraps ledger.ErrNotFound if there is no such app
	// or developer.
	find(ctx context.Context, by client.SelectBy) (client.Selection, error)
	// developer and app return the id of whom an e-mail address names, and of the
	// app with a name.
	developer(ctx context.Context, email string) (id string, err error)
	app(ctx context.Context, developer, name string) (id string, err error)
	// set changes the flags of targets. What it has done is told whether there is
	// an error or not; a ledger.NotFoundError names what is not there.
	set(ctx context.Context, action ledger.StatusAction, targets []client.Target, wait bool, ch client.Change, progress func(done int)) (statusDone, error)
	close()
}

// statusDone is what a change of statuses did.
type statusDone struct {
	revision            int64
	flags               []client.Flag
	byDeletion, noSpace bool
	unregisteredBy      time.Time
	stops               []client.Stop // of a dry run
	// await waits for the receipt; nil if the replicas were not asked. It returns
	// at latest.
	await   func(context.Context) (ledger.ReceiptJSON, error)
	latest  time.Time
	receipt *ledger.ReceiptJSON
}

// changed counts the flags that were in another state before.
func (d statusDone) changed() (n int) {
	for _, f := range d.flags {
		if f.Changed {
			n++
		}
	}
	return n
}

func (a *app) statusPlace(ctx context.Context, cfg *config.Config, at place) (statusPlace, error) {
	if at.server != "" {
		c, err := at.client(cfg, false)
		if err != nil {
			return nil, exitWith(exitUsage, err)
		}
		return apiStatuses{c}, nil
	}
	s, err := a.openStore(ctx, cfg, refuseAbsent, withoutSealing)
	if err != nil {
		return nil, err
	}
	return storeStatuses{s, cfg}, nil
}

// storeStatuses changes flags in the store itself.
type storeStatuses struct {
	*store
	cfg *config.Config
}

func (s storeStatuses) find(ctx context.Context, by client.SelectBy) (client.Selection, error) {
	var found ledger.Selection
	var err error
	org := s.cfg.Organization
	switch {
	case by.App != "":
		found, err = ledger.AppKeys(ctx, s.etcd, s.cfg.Space, org, authz.AppID(by.App))
	case by.Developer != "":
		found, err = ledger.DeveloperKeys(ctx, s.etcd, s.cfg.Space, org, authz.DeveloperID(by.Developer))
	default:
		for _, text := range by.Keys {
			id, err := authz.ParseKeyID(text)
			if err != nil {
				return client.Selection{}, err
			}
			found.Keys = append(found.Keys, id)
		}
	}
	if err != nil {
		return client.Selection{}, err
	}
	keys, err := ledger.Keys(ctx, s.etcd, s.cfg.Space, org, found.Keys)
	if err != nil {
		return client.Selection{}, err
	}
	selection := client.Selection{Notes: found.Notes}
	for _, k := range keys {
		selected := client.SelectedKey{Key: k.ID.String(), There: k.There, App: string(k.Credential.App), Status: k.Credential.Status.Status.String()}
		for _, p := range k.Products {
			selected.Products = append(selected.Products, client.ProductRef{Product: string(p), Status: k.Credential.Products[p].Status.String()})
		}
		selection.Keys = append(selection.Keys, selected)
	}
	return selection, nil
}

func (s storeStatuses) set(ctx context.Context, action ledger.StatusAction, targets []client.Target, wait bool, ch client.Change, progress func(done int)) (statusDone, error) {
	flags, err := ledgerTargets(s.cfg.Organization, targets)
	if err != nil {
		return statusDone{}, err
	}
	by := ledger.By{Actor: localActor(), Reason: ch.Reason, Ticket: ch.Ticket, DryRun: ch.DryRun}
	change, err := s.ledger.SetStatus(ctx, by, action, flags, ledger.StatusOptions{
		Barrier: wait, Progress: func(done, _ int) { progress(done) },
	})
	done := statusDone{
		revision: change.Revision, byDeletion: change.ByDeletion, noSpace: change.NoSpace,
		unregisteredBy: change.UnregisteredBy(), latest: change.Latest(),
	}
	for _, f := range change.Flags {
		done.flags = append(done.flags, client.Flag{Target: clientTarget(f.Target), Path: f.Path, Before: f.Before, Changed: f.Changed})
	}
	for _, stop := range change.Stops {
		done.stops = append(done.stops, client.Stop{Key: stop.Key.String(), Hint: stop.Hint, App: string(stop.App), Product: string(stop.Product)})
	}
	if change.Asked() {
		done.await = func(ctx context.Context) (ledger.ReceiptJSON, error) {
			receipt, err := change.Wait(ctx)
			return receipt.JSON(), err
		}
	}
	return done, err
}

func (s storeStatuses) developer(ctx context.Context, email string) (string, error) {
	t, err := s.ledger.DeveloperTarget(ctx, s.cfg.Organization, email)
	return t.Record.Name, err
}

func (s storeStatuses) app(ctx context.Context, developer, name string) (string, error) {
	t, err := s.ledger.AppTarget(ctx, s.cfg.Organization, developer, name)
	return t.Record.Name, err
}

// ledgerTargets are the same in the ledger's words.
func ledgerTargets(org authz.Organization, targets []client.Target) ([]ledger.Target, error) {
	all := make([]ledger.Target, 0, len(targets))
	for _, t := range targets {
		switch {
		case t.App != "":
			all = append(all, ledger.Target{Record: keyspace.AppRecord(org, authz.AppID(t.App))})
		case t.Developer != "":
			all = append(all, ledger.Target{Record: keyspace.DeveloperRecord(org, authz.DeveloperID(t.Developer))})
		default:
			id, err := authz.ParseKeyID(t.Key)
			if err != nil {
				return nil, err
			}
			all = append(all, ledger.Target{Record: keyspace.KeyRecord(org, id), Product: authz.ProductName(t.Product)})
		}
	}
	return all, nil
}

func clientTarget(t ledger.Target) client.Target {
	switch t.Record.Kind {
	case keyspace.KindApp:
		return client.Target{App: t.Record.Name}
	case keyspace.KindDeveloper:
		return client.Target{Developer: t.Record.Name}
	}
	return client.Target{Key: t.Record.Key.String(), Product: string(t.Product)}
}

// apiStatuses changes flags by the management API.
type apiStatuses struct{ client *client.Client }

func (s apiStatuses) close() { s.client.Close() }

func (s apiStatuses) find(ctx context.Context, by client.SelectBy) (client.Selection, error) {
	found, err := s.client.Select(ctx, by)
	return found, s.notFound(err, []client.Target{{App: by.App, Developer: by.Developer}})
}

func (s apiStatuses) developer(ctx context.Context, email string) (string, error) {
	d, err := s.client.Developer(ctx, email)
	return d.ID, err
}

func (s apiStatuses) app(ctx context.Context, developer, name string) (string, error) {
	a, err := s.client.DeveloperApp(ctx, developer, name)
	return a.ID, err
}

// notFound makes a 404 the ledger's own error.
func (s apiStatuses) notFound(err error, targets []client.Target) error {
	var refusal *client.Error
	if !errors.As(err, &refusal) || refusal.Status != http.StatusNotFound || refusal.Code != codeNotFound {
		return err
	}
	missing, parseErr := ledgerTargets(s.client.Organization(), targets)
	if parseErr != nil {
		return err
	}
	return &ledger.NotFoundError{Targets: missing}
}

// codeNotFound is the API's for a target that is not there.
const codeNotFound = "keygate.not_found"

// targetsAtOnce of one request. Each request is one change.
const targetsAtOnce = 1000

func (s apiStatuses) set(ctx context.Context, action ledger.StatusAction, targets []client.Target, wait bool, ch client.Change, progress func(done int)) (done statusDone, err error) {
	var missing []client.Target
	handled := 0
	for part := range slices.Chunk(targets, targetsAtOnce) {
		handled += len(part)
		last := wait && handled == len(targets)
		answer, setErr := s.client.SetStatuses(ctx, client.StatusChange{Change: ch, Action: action.String(), Targets: part, Wait: last})
		if notFound := s.notFound(setErr, part); errors.Is(notFound, ledger.ErrNotFound) {
			missing = append(missing, part...)
			continue
		}
		if setErr != nil {
			err = setErr
			break
		}
		if answer.Replayed {
			// An earlier attempt made it, and its answer was lost. What it found is not
			// known: the flags are as they should be.
			for _, t := range part {
				answer.Flags = append(answer.Flags, client.Flag{Target: t})
			}
			answer.UnregisteredBy = time.Now().Add(keyspace.MaxStalenessBudget + time.Second)
		}
		if err = done.add(answer); err != nil {
			break
		}
		missing = append(missing, answer.NotFound...)
		if answer.Partial != "" {
			err = errors.New(answer.Partial)
			break
		}
		progress(handled)
	}
	switch {
	case err != nil && ctx.Err() != nil:
		noun := [...]string{ledger.Revoke: "revocation", ledger.Approve: "approval"}[action]
		err = exitWith(exitInterrupted, fmt.Errorf("interrupted: the %s was sent, and may stand; the same again tells", noun))
	case err != nil && len(done.flags) > 0:
		err = fmt.Errorf("%v: %d of %d done, and repeating it is safe: %w", action, len(done.flags), len(targets), err)
	}
	if len(missing) > 0 {
		absent, parseErr := ledgerTargets(s.client.Organization(), missing)
		err = errors.Join(err, parseErr, fmt.Errorf("%v: %w", action, &ledger.NotFoundError{Targets: absent}))
	}
	return done, err
}

// add an answer.
func (d *statusDone) add(answer client.StatusDone) error {
	d.revision, d.unregisteredBy = answer.Revision, answer.UnregisteredBy
	d.flags = append(d.flags, answer.Flags...)
	d.stops = append(d.stops, answer.Stops...)
	d.byDeletion, d.noSpace = d.byDeletion || answer.ByDeletion, d.noSpace || answer.NoSpace
	if answer.Receipt == nil {
		return nil
	}
	var receipt ledger.ReceiptJSON
	if err := json.Unmarshal(answer.Receipt.Raw, &receipt); err != nil {
		return fmt.Errorf("read the receipt: %w", err)
	}
	d.latest = time.Now()
	d.await = func(context.Context) (ledger.ReceiptJSON, error) { return receipt, nil }
	return nil
}
