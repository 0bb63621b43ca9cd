package ledger

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/audit"
	"keygate/authz"
	"keygate/catalog"
	"keygate/seal"
	"keygate/statestore/keyspace"
)

// ImporterConfig of an Importer.
type ImporterConfig struct {
	// KV of the store; required.
	KV clientv3.KV
	// Space and Organization that the records are brought into; required.
	Space        keyspace.Space
	Organization authz.Organization
	// Options of the import.
	Options ImportOptions
	// Actor, Reason and Ticket stand in the audit records. The zero Actor means
	// keygate by itself.
	Actor          audit.Actor
	Reason, Ticket string
	// Seal keeps consumer keys and secrets. With nil they are not kept, and what
	// is stored of them stays.
	Seal *seal.Keyring
	// Concurrency is how many transactions are under way at a time; 0 means 32.
	Concurrency int
	// Now is the wall clock; nil means time.Now.
	Now func() time.Time
}

// ImportOptions of an Importer.
type ImportOptions struct {
	// Overwrite statuses and expiries in the store by those handed in, and
	// write again what has been deleted. Of a developer that only an app names
	// no status is handed in: there it stays.
	Overwrite bool
}

// maxTogether is how many records share a transaction: a few, so that they fit
// with their products.
const maxTogether = 8

// Importer imports many apps, developers and API products, from one input or
// several, as one import: what stands in it twice is taken once. It remembers
// the name of every record and key it has seen. It is for one goroutine at a
// time.
//
// What is imported again writes nothing. A record or a credential that the store
// cannot take is refused in its outcome.
type Importer struct {
	cfg     ImporterConfig
	ledger  *Ledger
	records map[keyspace.Record]claim
	keys    map[authz.KeyID]authz.AppID
}

// claim of a record by its first submission.
type claim struct {
	place  catalog.Place
	digest [32]byte
}

// NewImporter returns an Importer. It talks to nobody yet.
func NewImporter(cfg ImporterConfig) *Importer {
	if cfg.Concurrency <= 0 {
		cfg.Concurrency = 32
	}
	if cfg.Actor == (audit.Actor{}) {
		cfg.Actor.Kind = audit.ActorKeygate
	}
	return &Importer{
		cfg:     cfg,
		ledger:  New(Config{Space: cfg.Space, Now: cfg.Now}),
		records: map[keyspace.Record]claim{}, keys: map[authz.KeyID]authz.AppID{},
	}
}

// Submissions are records that are read one after another.
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
	if err := keyspace.CheckOrganization(im.cfg.Organization); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var reporting sync.Mutex
	tell := func(all ...Outcome) {
		reporting.Lock()
		defer reporting.Unlock()
		for _, o := range all {
			report(o)
		}
	}
	var workers sync.WaitGroup
	jobs := make(chan []catalog.Submission)
	for range im.cfg.Concurrency {
		workers.Go(func() {
			for subs := range jobs {
				outcomes, err := im.bring(ctx, subs)
				if err != nil {
					cancel(err)
					return
				}
				tell(outcomes...)
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

// dispatch hands each record to a worker, once.
func (im *Importer) dispatch(ctx context.Context, in Submissions, jobs chan<- []catalog.Submission, tell func(...Outcome)) error {
	var subs []catalog.Submission
	hand := func() error {
		if len(subs) == 0 {
			return nil
		}
		select {
		case jobs <- subs:
			subs = nil
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		s, err := in.Next()
		switch {
		case errors.Is(err, io.EOF):
			return hand()
		case err != nil:
			_ = hand() // what was read before it is imported
			return err
		case s.App == nil && s.Developer == nil && s.Product == nil:
			tell(Outcome{Place: s.Place, Items: refusals(s.Refused)})
			continue
		}
		if o, again := im.again(s); again {
			tell(o)
			continue
		}
		im.claimKeys(&s)
		if subs = append(subs, s); len(subs) == maxTogether {
			if err := hand(); err != nil {
				return err
			}
		}
	}
}

// again answers for a record that this import has seen before.
func (im *Importer) again(s catalog.Submission) (Outcome, bool) {
	rec := im.planner(s, nil).record()
	first, seen := im.records[rec]
	if !seen {
		im.records[rec] = claim{s.Place, s.Digest}
		return Outcome{}, false
	}
	item := Item{
		Kind: rec.Kind, Whole: true, Path: im.cfg.Space.Details(rec),
		Reason: fmt.Sprintf("the same as at %s", first.place),
	}
	if first.digest != s.Digest {
		item.Action = Refused
		item.Reason = fmt.Sprintf("it stands at %s already, and differs", first.place)
	}
	o := outcome(s)
	o.Items = append([]Item{item}, refusals(s.Refused)...)
	return o, true
}

// claimKeys refuses the credentials whose keys another app of this import has.
func (im *Importer) claimKeys(s *catalog.Submission) {
	if s.App == nil {
		return
	}
	app := *s.App
	app.Credentials = slices.DeleteFunc(slices.Clone(app.Credentials), func(c catalog.Credential) bool {
		owner, seen := im.keys[c.Key]
		if !seen {
			im.keys[c.Key] = app.ID
			return false
		}
		first := im.records[keyspace.AppRecord(im.cfg.Organization, owner)]
		s.Refused = append(s.Refused, catalog.Refusal{
			Place:  s.Place,
			Reason: fmt.Sprintf("credential %s: app %q at %s has the same consumer key", c.Key, owner, first.place),
		})
		return true
	})
	s.App = &app
}

// bring imports records, together if one transaction holds them.
func (im *Importer) bring(ctx context.Context, subs []catalog.Submission) ([]Outcome, error) {
	for range maxAttempts {
		outcomes, took, err := im.attempt(ctx, subs)
		switch {
		case errors.Is(err, errTooLarge), errors.Is(err, rpctypes.ErrRequestTooLarge), errors.Is(err, rpctypes.ErrTooManyOps):
			if len(subs) > 1 {
				return im.halve(ctx, subs)
			}
			return im.refuse(subs, err.Error()), nil
		case err != nil:
			return nil, err
		case took:
			return outcomes, nil
		}
	}
	if len(subs) > 1 {
		return im.halve(ctx, subs)
	}
	return im.refuse(subs, fmt.Sprintf("others kept changing it: given up after %d attempts", maxAttempts)), nil
}

// halve imports records in two parts.
func (im *Importer) halve(ctx context.Context, subs []catalog.Submission) ([]Outcome, error) {
	first, err := im.bring(ctx, subs[:len(subs)/2])
	if err != nil {
		return nil, err
	}
	second, err := im.bring(ctx, subs[len(subs)/2:])
	return append(first, second...), err
}

// refuse answers for a record that was not imported.
func (im *Importer) refuse(subs []catalog.Submission, reason string) []Outcome {
	rec := im.planner(subs[0], nil).record()
	o := outcome(subs[0])
	o.Items = append([]Item{{Action: Refused, Kind: rec.Kind, Whole: true, Path: im.cfg.Space.Details(rec), Reason: reason}}, refusals(subs[0].Refused)...)
	return []Outcome{o}
}

// attempt reads, plans and writes. It tells whether that took place; not so when
// something that was read has changed meanwhile. Several records must fit into
// one transaction, else it is errTooLarge.
func (im *Importer) attempt(ctx context.Context, subs []catalog.Submission) (outcomes []Outcome, took bool, err error) {
	read := view{}
	planners := make([]*planner, len(subs))
	var first, second []clientv3.Op
	invalid := make([]error, len(subs))
	for i, s := range subs {
		planners[i] = im.planner(s, read)
		if invalid[i] = planners[i].check(); invalid[i] == nil {
			first = append(first, planners[i].reads()...)
		}
	}
	if err := read.read(ctx, im.cfg.KV, first); err != nil {
		return nil, false, fmt.Errorf("read from etcd: %w", err)
	}
	for _, p := range planners {
		second = append(second, p.readsAfter()...)
	}
	if err := read.read(ctx, im.cfg.KV, second); err != nil {
		return nil, false, fmt.Errorf("read from etcd: %w", err)
	}

	// Each is planned on what the ones before it will have written.
	ahead := maps.Clone(read)
	var groups []group
	for i, p := range planners {
		if p.view = ahead; invalid[i] != nil {
			outcomes = append(outcomes, im.refuse(subs[i:i+1], invalid[i].Error())...)
			continue
		}
		if reason := p.plan(); reason != "" {
			outcomes = append(outcomes, im.refuse(subs[i:i+1], reason)...)
			continue
		}
		for _, g := range p.groups {
			g.changes = im.changes(ahead, g.writes)
			groups = append(groups, g)
		}
		o := outcome(subs[i])
		o.Items = append(p.items, refusals(subs[i].Refused)...)
		outcomes = append(outcomes, o)
	}
	batches, err := transactions(groups)
	switch {
	case err != nil:
		return nil, false, err
	case len(subs) > 1 && len(batches) > 1:
		return nil, false, errTooLarge
	}
	by := By{Actor: im.cfg.Actor, Reason: im.cfg.Reason, Ticket: im.cfg.Ticket}
	for _, b := range batches {
		took, err := b.commit(ctx, im.cfg.KV, read, im.cfg.Space.Audit(im.cfg.Organization), func(object string) audit.Record {
			return im.ledger.record(by, im.cfg.Organization, "import", object)
		})
		if err != nil {
			return nil, false, fmt.Errorf("write to etcd: %w", err)
		}
		if !took {
			return nil, false, nil
		}
	}
	return outcomes, true, nil
}

// changes are what an audit record says of writes. They are applied to v.
func (im *Importer) changes(v view, writes []write) (changes []audit.Change) {
	for _, w := range writes {
		c, ok := im.ledger.changed(w.path,
			func(path string) (string, bool) { e, there := v[path]; return e.value, there },
			func(string) (string, bool) { return w.value, !w.deletion })
		if ok {
			changes = append(changes, c)
		}
		if delete(v, w.path); !w.deletion {
			v[w.path] = entry{value: w.value, rev: unwritten}
		}
	}
	return changes
}

// unwritten is the revision of a value that is planned.
const unwritten = -1

func (im *Importer) planner(s catalog.Submission, v view) *planner {
	p := &planner{space: im.cfg.Space, org: im.cfg.Organization, seal: im.cfg.Seal, overwrite: im.cfg.Options.Overwrite, in: s, view: v}
	if s.App != nil {
		p.app = *s.App
	}
	return p
}

// outcome begins the outcome of a submission.
func outcome(s catalog.Submission) Outcome {
	o := Outcome{Place: s.Place}
	switch {
	case s.App != nil:
		o.App, o.Name = s.App.ID, s.App.Name
	case s.Developer != nil:
		o.Developer, o.Name = s.Developer.ID, s.Developer.Email
	case s.Product != nil:
		o.Product = s.Product.Name
	}
	return o
}

func refusals(refused []catalog.Refusal) (items []Item) {
	for _, r := range refused {
		items = append(items, Item{Action: Refused, Place: &r.Place, Reason: r.Reason})
	}
	return items
}
