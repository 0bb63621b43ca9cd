package ledger

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/authz"
	"keygate/catalog"
	"keygate/statestore/keyspace"
)

// ImporterConfig of an Importer.
type ImporterConfig struct {
	// KV of the store; required.
	KV clientv3.KV
	// Space and Organization that the apps are brought into; required.
	Space        keyspace.Space
	Organization authz.Organization
	// Options of each import.
	Options ImportOptions
	// Concurrency is how many apps are imported at a time; 0 means 32.
	Concurrency int
}

// Importer imports many apps, from one input or several, as one import: what
// stands in it twice is taken once. It remembers the id of every app and key it
// has seen. It is for one goroutine at a time.
type Importer struct {
	cfg  ImporterConfig
	apps map[authz.AppID]claim
	keys map[authz.KeyID]authz.AppID
}

// claim of an app's id by its first submission.
type claim struct {
	place  catalog.Place
	digest [32]byte
}

// NewImporter returns an Importer. It talks to nobody yet.
func NewImporter(cfg ImporterConfig) *Importer {
	if cfg.Concurrency <= 0 {
		cfg.Concurrency = 32
	}
	return &Importer{cfg: cfg, apps: map[authz.AppID]claim{}, keys: map[authz.KeyID]authz.AppID{}}
}

// Submissions are apps that are read one after another.
type Submissions interface {
	// Next returns the next one. The error is io.EOF at the end; any other ends
	// the import.
	Next() (catalog.Submission, error)
}

// Import brings all of in into the store. report gets one outcome for each
// submission, in no certain order, and by one goroutine at a time. The error
// says why not all of in was imported: it could not be read, the store did not
// answer, or ctx ended. What was reported then stands; what was not, may. The
// same import can simply be run again.
func (im *Importer) Import(ctx context.Context, in Submissions, report func(Outcome)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var reporting sync.Mutex
	tell := func(o Outcome) {
		reporting.Lock()
		defer reporting.Unlock()
		report(o)
	}
	var workers sync.WaitGroup
	jobs := make(chan catalog.Submission)
	for range im.cfg.Concurrency {
		workers.Go(func() {
			for s := range jobs {
				o, err := Import(ctx, im.cfg.KV, im.cfg.Space, im.cfg.Organization, *s.App, im.cfg.Options)
				if err != nil {
					cancel(err)
					return
				}
				o.Place = s.Place
				o.Items = append(o.Items, refusals(s.Refused)...)
				tell(o)
			}
		})
	}
	err := im.dispatch(ctx, in, jobs, tell)
	close(jobs)
	workers.Wait()
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// dispatch hands each app to a worker, once.
func (im *Importer) dispatch(ctx context.Context, in Submissions, jobs chan<- catalog.Submission, tell func(Outcome)) error {
	for {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		s, err := in.Next()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case s.App == nil:
			tell(Outcome{Place: s.Place, Items: refusals(s.Refused)})
			continue
		}
		if o, again := im.again(s); again {
			tell(o)
			continue
		}
		im.claimKeys(&s)
		select {
		case jobs <- s:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// again answers for an app that this import has seen before.
func (im *Importer) again(s catalog.Submission) (Outcome, bool) {
	first, seen := im.apps[s.App.ID]
	if !seen {
		im.apps[s.App.ID] = claim{s.Place, s.Digest}
		return Outcome{}, false
	}
	item := Item{
		Kind: keyspace.KindApp, Whole: true,
		Path:   im.cfg.Space.Details(keyspace.AppRecord(im.cfg.Organization, s.App.ID)),
		Reason: fmt.Sprintf("the same as at %s", first.place),
	}
	if first.digest != s.Digest {
		item.Action = Refused
		item.Reason = fmt.Sprintf("the app stands at %s already, and differs", first.place)
	}
	return Outcome{Place: s.Place, App: s.App.ID, Name: s.App.Name, Items: append([]Item{item}, refusals(s.Refused)...)}, true
}

// claimKeys refuses the credentials whose keys another app of this import has.
func (im *Importer) claimKeys(s *catalog.Submission) {
	app := *s.App
	app.Credentials = slices.DeleteFunc(slices.Clone(app.Credentials), func(c catalog.Credential) bool {
		owner, seen := im.keys[c.Key]
		if !seen {
			im.keys[c.Key] = app.ID
			return false
		}
		s.Refused = append(s.Refused, catalog.Refusal{
			Place:  s.Place,
			Reason: fmt.Sprintf("credential %s: app %q at %s has the same consumer key", c.Key, owner, im.apps[owner].place),
		})
		return true
	})
	s.App = &app
}

func refusals(refused []catalog.Refusal) (items []Item) {
	for _, r := range refused {
		items = append(items, Item{Action: Refused, Place: &r.Place, Reason: r.Reason})
	}
	return items
}
