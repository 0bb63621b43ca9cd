package quickstart

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"slices"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/authz"
	apps "keygate/examples/quickstart"
	"keygate/statestore"
	"keygate/statestore/keyspace"
)

// stepTimeout until a change is seen through Envoy; it takes milliseconds.
const stepTimeout = 5 * time.Second

// GoalFactor is how many times as long as a bare watch's event a refusal may
// take, and one request more.
const GoalFactor = 1.5

// TourConfig of RunTour.
type TourConfig struct {
	// Rounds of every level's steps; 0 means 20.
	Rounds int
	// OnStep, if set, is told each step as it ends.
	OnStep func(Step)
}

// Step is one change to one level, made in several rounds by a plain put to
// etcd, or a delete. Times are of the put, whichever it was.
type Step struct {
	// Level that was changed.
	Level Level `json:"level"`
	// Path in etcd.
	Path string `json:"path"`
	// Value that was put; "" for the delete.
	Value string `json:"value"`
	// Status that Envoy answered with afterwards, and keygate's reason for it.
	Status int          `json:"status"`
	Reason authz.Reason `json:"reason"`
	// Rounds that the times are of; 0 for the step that changes nothing.
	Rounds int `json:"rounds"`

	// Without rounds there are no times.
	//
	// AckToAnswer is from the put's answer to the end of the first response
	// with Status through Envoy. It is below zero when that came first.
	AckToAnswer Spread `json:"ackToAnswer,omitzero"`
	// SentToAnswer is the same from just before the put was sent, and
	// SentToEvent until a bare watch of the path had the event.
	SentToAnswer Spread `json:"sentToAnswer,omitzero"`
	SentToEvent  Spread `json:"sentToEvent,omitzero"`
}

// Refuses tells whether the step closed.
func (s Step) Refuses() bool { return s.Status != http.StatusOK }

// Ratio of the medians of SentToAnswer and SentToEvent.
func (s Step) Ratio() float64 { return ratio(s.SentToAnswer, s.SentToEvent) }

// Level of a status.
type Level string

// The levels, in the order of the tour.
const (
	LevelProduct   Level = "product on key"
	LevelKey       Level = "key"
	LevelApp       Level = "app"
	LevelDeveloper Level = "developer"
)

// Tour is what a whole tour came to.
type Tour struct {
	Steps []Step `json:"steps"`
	// Refusals sums up the rounds of all steps that close.
	Refusals struct {
		Rounds       int    `json:"rounds"`
		AckToAnswer  Spread `json:"ackToAnswer"`
		SentToAnswer Spread `json:"sentToAnswer"`
		SentToEvent  Spread `json:"sentToEvent"`
		// Check is the time that keygate's first refusing check took, with the
		// load of the record where there had been none since the change.
		Check Spread  `json:"check"`
		Ratio float64 `json:"ratio"`
	} `json:"refusals"`
	// Request is one request through Envoy while nothing changes, refused or
	// allowed, beside the other pollers.
	Request Spread `json:"request"`
	// Requests that the tour made in all.
	Requests int `json:"requests"`
	// Goal for the median of Refusals.SentToAnswer: GoalFactor times that of
	// SentToEvent, and a median Request.
	Goal Milliseconds `json:"goalMs"`
	Met  bool         `json:"met"`
}

// Spread of some durations.
type Spread struct{ Median, P99, Max time.Duration }

// MarshalJSON writes milliseconds.
func (s Spread) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		Median Milliseconds `json:"medianMs"`
		P99    Milliseconds `json:"p99Ms"`
		Max    Milliseconds `json:"maxMs"`
	}{Milliseconds(s.Median), Milliseconds(s.P99), Milliseconds(s.Max)})
}

// Milliseconds is a duration whose JSON is a number of milliseconds.
type Milliseconds time.Duration

// MarshalJSON writes three places, microseconds.
func (m Milliseconds) MarshalJSON() ([]byte, error) {
	return fmt.Appendf(nil, "%.3f", float64(m)/float64(time.Millisecond)), nil
}

// spread of ds, by nearest rank. It sorts ds.
func spread(ds []time.Duration) Spread {
	if len(ds) == 0 {
		return Spread{}
	}
	slices.Sort(ds)
	rank := func(q float64) time.Duration { return ds[max(int(math.Ceil(q*float64(len(ds)))), 1)-1] }
	return Spread{Median: rank(0.5), P99: rank(0.99), Max: ds[len(ds)-1]}
}

func ratio(a, b Spread) float64 {
	if b.Median <= 0 {
		return 0
	}
	return float64(a.Median) / float64(b.Median)
}

// RunTour changes every level of the weather app's key by plain puts, while
// requests with that key go through Envoy back to back, and waits each time
// until Envoy answers accordingly. The store must be as the import of the apps
// left it, and is so again at the end but for WeatherProduct, which is then
// approved on the key.
//
// The error says which step was not seen within 5 s, was seen with another
// reason, or was taken back: a request that began after the first refusal had
// ended and was allowed all the same.
func RunTour(ctx context.Context, w *World, cfg TourConfig) (Tour, error) {
	if cfg.Rounds == 0 {
		cfg.Rounds = 20
	}
	p := newPollers(w.URL()+WeatherPath, w.settings.KeyHeader, apps.WeatherKey)
	w.Follow(Observer{OnDecision: p.decided})
	defer w.Follow(Observer{})
	bare, err := statestore.EtcdConfig{Endpoints: []string{w.Etcd()}}.Dial()
	if err != nil {
		return Tour{}, err
	}
	defer bare.Close()

	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	for i := range numPollers {
		running.Go(func() { p.run(ctx, i) })
	}
	t := &tour{cfg: cfg, client: w.client, bare: bare, pollers: p}
	space, org := w.settings.Space, w.settings.Organization
	key := keyspace.KeyRecord(org, apps.KeyID(apps.WeatherKey))
	product := level{LevelProduct, space.KeyProduct(key, apps.WeatherProduct)}
	status := level{LevelKey, space.Status(key)}
	for _, part := range []func() error{
		func() error { return t.asImported(ctx, product) },
		func() error { return t.calm(ctx) },
		func() error { return t.rounds(ctx, product, 1, approve) },
		func() error { return t.calm(ctx) },
		func() error {
			return t.rounds(ctx, product, cfg.Rounds, action{"revoked", authz.ProductRevoked}, approve)
		},
		func() error {
			return t.rounds(ctx, status, cfg.Rounds, action{"revoked", authz.KeyRevoked}, approve)
		},
		func() error {
			return t.rounds(ctx, level{LevelApp, space.Status(keyspace.AppRecord(org, apps.WeatherApp))}, cfg.Rounds,
				action{"revoked", authz.AppRevoked}, approve)
		},
		func() error {
			return t.rounds(ctx, level{LevelDeveloper, space.Status(keyspace.DeveloperRecord(org, apps.WeatherDeveloper))}, cfg.Rounds,
				action{"inactive", authz.DeveloperInactive}, action{"active", authz.Allowed})
		},
		func() error {
			return t.rounds(ctx, status, cfg.Rounds, action{"", authz.RecordUnreadable}, approve)
		},
	} {
		if err := part(); err != nil {
			return Tour{}, err
		}
	}
	return t.sum(), nil
}

// tour is one that is under way. It is for one goroutine.
type tour struct {
	cfg     TourConfig
	client  *clientv3.Client // puts
	bare    *clientv3.Client // only watches
	pollers *pollers

	done     Tour
	refusals times
}

// level is where a status stands.
type level struct {
	name Level
	path string
}

// action is a value to put, "" for a delete, and the reason it brings.
type action struct {
	value  string
	reason authz.Reason
}

var approve = action{"approved", authz.Allowed}

func (a action) status() int {
	if a.reason == authz.Allowed {
		return http.StatusOK
	}
	return http.StatusUnauthorized
}

// times of rounds.
type times struct{ ackToAnswer, sentToAnswer, sentToEvent, check []time.Duration }

func (t *tour) end(s Step, of times) {
	s.AckToAnswer, s.SentToAnswer, s.SentToEvent = spread(of.ackToAnswer), spread(of.sentToAnswer), spread(of.sentToEvent)
	t.done.Steps = append(t.done.Steps, s)
	if t.cfg.OnStep != nil {
		t.cfg.OnStep(s)
	}
}

// asImported looks, and changes nothing.
func (t *tour) asImported(ctx context.Context, l level) error {
	a := action{"revoked", authz.ProductRevoked}
	x := t.pollers.expect(a.status())
	if err := t.await(ctx, x, a, "as imported"); err != nil {
		return err
	}
	t.end(Step{Level: l.name, Path: l.path, Value: a.value, Status: a.status(), Reason: a.reason}, times{})
	return nil
}

// calm times requests while nothing changes.
func (t *tour) calm(ctx context.Context) error {
	select {
	case <-t.pollers.time():
		return nil
	case <-time.After(stepTimeout):
		return fmt.Errorf("fewer than %d requests through Envoy in %v", calmRequests, stepTimeout)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// rounds makes the changes one after the other, n times; each is a step.
func (t *tour) rounds(ctx context.Context, l level, n int, actions ...action) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	events, err := t.watch(ctx, l.path)
	if err != nil {
		return err
	}
	all := make([]times, len(actions))
	for range n {
		for i, a := range actions {
			if err := t.change(ctx, l, a, events, &all[i]); err != nil {
				return err
			}
		}
	}
	for i, a := range actions {
		if a.status() != http.StatusOK {
			t.refusals.ackToAnswer = append(t.refusals.ackToAnswer, all[i].ackToAnswer...)
			t.refusals.sentToAnswer = append(t.refusals.sentToAnswer, all[i].sentToAnswer...)
			t.refusals.sentToEvent = append(t.refusals.sentToEvent, all[i].sentToEvent...)
			t.refusals.check = append(t.refusals.check, all[i].check...)
		}
		t.end(Step{Level: l.name, Path: l.path, Value: a.value, Status: a.status(), Reason: a.reason, Rounds: n}, all[i])
	}
	return nil
}

// event of the bare watch.
type event struct {
	revision int64
	at       time.Time
}

// watch follows one path with nothing around it: what keygate is compared with.
// Returns when the watch is there; it ends with ctx.
func (t *tour) watch(ctx context.Context, path string) (<-chan event, error) {
	updates := t.bare.Watch(ctx, path, clientv3.WithCreatedNotify())
	select {
	case u := <-updates:
		if err := u.Err(); err != nil || !u.Created {
			return nil, fmt.Errorf("watch %s: %w", path, err)
		}
	case <-time.After(stepTimeout):
		return nil, fmt.Errorf("watch %s: not there after %v", path, stepTimeout)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	events := make(chan event, 16) // a step awaits its event before the next put
	go func() {
		defer close(events)
		for u := range updates {
			at := time.Now()
			for _, e := range u.Events {
				select {
				case events <- event{e.Kv.ModRevision, at}:
				case <-ctx.Done():
				}
			}
		}
	}()
	return events, nil
}

// change makes one change and measures it.
func (t *tour) change(ctx context.Context, l level, a action, events <-chan event, to *times) error {
	what := fmt.Sprintf("put %s %s", l.path, a.value)
	if a.value == "" {
		what = "delete " + l.path
	}
	x := t.pollers.expect(a.status())
	writing, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	sent := time.Now()
	revision, err := t.write(writing, l.path, a.value)
	acknowledged := time.Now()
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if err := t.await(ctx, x, a, fmt.Sprintf("%s, done at revision %d", what, revision)); err != nil {
		return err
	}
	for {
		select {
		case e, ok := <-events:
			if !ok {
				return fmt.Errorf("%s: the bare watch ended", what)
			}
			if e.revision != revision {
				continue
			}
			to.ackToAnswer = append(to.ackToAnswer, x.first.Sub(acknowledged))
			to.sentToAnswer = append(to.sentToAnswer, x.first.Sub(sent))
			to.sentToEvent = append(to.sentToEvent, e.at.Sub(sent))
			_, check := t.pollers.decision(x)
			to.check = append(to.check, check)
			return nil
		case <-time.After(stepTimeout):
			return fmt.Errorf("%s: the bare watch saw no event within %v", what, stepTimeout)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (t *tour) write(ctx context.Context, path, value string) (int64, error) {
	if value == "" {
		r, err := t.client.Delete(ctx, path)
		if err != nil {
			return 0, err
		}
		return r.Header.Revision, nil
	}
	r, err := t.client.Put(ctx, path, value)
	if err != nil {
		return 0, err
	}
	return r.Header.Revision, nil
}

// await waits until every poller has the answer that a brings.
func (t *tour) await(ctx context.Context, x *expectation, a action, what string) error {
	select {
	case <-x.settled:
	case <-time.After(stepTimeout):
		return fmt.Errorf("%s: no %d through Envoy within %v; %s", what, a.status(), stepTimeout, t.pollers.lastOther(x))
	case <-ctx.Done():
		return ctx.Err()
	}
	if x.broken != nil {
		return fmt.Errorf("%s: %w", what, x.broken)
	}
	if got, _ := t.pollers.decision(x); got != a.reason {
		return fmt.Errorf("%s: %d through Envoy for the reason %s, want %s", what, a.status(), got, a.reason)
	}
	return nil
}

func (t *tour) sum() Tour {
	r := &t.done.Refusals
	r.Rounds = len(t.refusals.sentToAnswer)
	r.AckToAnswer, r.SentToAnswer, r.SentToEvent = spread(t.refusals.ackToAnswer), spread(t.refusals.sentToAnswer), spread(t.refusals.sentToEvent)
	r.Check = spread(t.refusals.check)
	r.Ratio = ratio(r.SentToAnswer, r.SentToEvent)
	t.done.Request, t.done.Requests = t.pollers.requests()
	goal := time.Duration(GoalFactor*float64(r.SentToEvent.Median)) + t.done.Request.Median
	t.done.Goal, t.done.Met = Milliseconds(goal), r.SentToAnswer.Median <= goal
	return t.done
}
