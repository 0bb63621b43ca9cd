package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/bench/load"
)

// bulkRate of checks beside a bulk change, a second.
const bulkRate = 5000

// bulkFirst is the first of the keys that are imported and revoked: beyond those
// that are checked.
const bulkFirst = 50_000_000

// runBulk measures checks, and the lag of single revocations, while a bulk change
// goes on.
func runBulk(ctx context.Context, b *bench) (*Result, error) {
	count, size := b.keys[len(b.keys)-1], max(b.bulk/b.rounds, 1)
	result := &Result{
		Title: "Beside a bulk change",
		About: []string{
			fmt.Sprintf("%s checks a second of %s keys, on four connections, while keys are revoked one at a time in turn with their refusal: first with nothing else, then while %s new keys with all they hang on are written straight into etcd, as fast as it takes them, in transactions of %d values from %d writers, and while the status of each of those keys is set to revoked and back in the same way.",
				number(bulkRate), number(float64(count)), number(float64(size)), opsPerTxn, writers),
			"etcd, keygate, the writers and the generator share the processors, so much of what the checks lose they lose to etcd's work. To revoke an app with any number of keys is one put, which is what the quiet rows measure. A raw watch of the same puts shows how much of a revocation's time is etcd's.",
		},
	}
	s, r, stop, err := b.revocable(ctx, count, 4)
	if err != nil {
		return nil, err
	}
	defer stop()
	t := Table{Title: number(float64(count)) + " keys checked", Subjects: []string{"quiet", "import", "revoke each"}, Figures: []Figure{
		{Name: "p50 of a check", Unit: "µs"}, {Name: "p99 of a check", Unit: "µs"},
		{Name: "p50 of a revocation", Unit: "ms"}, {Name: "p99 of a revocation", Unit: "ms"},
		{Name: "p50 of a raw watch", Unit: "ms"},
		{Name: "checks not answered within Envoy's 250 ms", Unit: "of a million", Plain: true}, {Name: "values written", Unit: "/s", Plain: true},
	}}
	for f := range t.Figures {
		t.Figures[f].Values = make([][]float64, len(t.Subjects))
	}
	for round := range b.rounds {
		first := bulkFirst + round*size
		for i, change := range []func(context.Context, *clientv3.Client) (int, error){
			nil,
			func(ctx context.Context, etcd *clientv3.Client) (int, error) {
				return importWorld(ctx, etcd, first, size)
			},
			func(ctx context.Context, etcd *clientv3.Client) (int, error) { return setEach(ctx, etcd, first, size) },
		} {
			found, err := b.beside(ctx, s, r, change)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", t.Subjects[i], err)
			}
			for f, v := range found {
				t.Figures[f].Values[i] = append(t.Figures[f].Values[i], v)
			}
			b.progress("round %d/%d, %s: check p50 %s p99 %s µs, revocation p50 %s p99 %s ms, raw watch p50 %s ms, %s values/s", round+1, b.rounds, t.Subjects[i],
				number(found[0]), number(found[1]), number(found[2]), number(found[3]), number(found[4]), number(found[6]))
		}
	}
	result.Tables = append(result.Tables, t)
	return result, nil
}

// beside measures checks and revocations until change is done, or for the usual
// duration if there is none.
func (b *bench) beside(ctx context.Context, s *subject, r *revoker, change func(context.Context, *clientv3.Client) (int, error)) (found [7]float64, err error) {
	running, stop := context.WithCancel(ctx)
	defer stop()
	var checks load.Result
	var lags times
	var checkErr, revokeErr error
	var both sync.WaitGroup
	both.Go(func() { checks, checkErr = s.generator.Run(running, load.Plan{Rate: bulkRate}) })
	both.Go(func() {
		for running.Err() == nil && revokeErr == nil {
			var part times
			part, revokeErr = r.round(ctx, b.duration/8) // to its end: a key is left approved
			lags.refusal = append(lags.refusal, part.refusal...)
			lags.watch = append(lags.watch, part.watch...)
		}
	})
	written, began := 0, time.Now()
	if change != nil {
		written, err = change(ctx, r.etcd)
	} else {
		select {
		case <-time.After(b.duration):
		case <-ctx.Done():
		}
	}
	took := time.Since(began)
	stop()
	both.Wait()
	if err = errors.Join(err, checkErr, revokeErr); err == nil && checks.Denied > 0 {
		err = checks.Err()
	}
	if err == nil && len(lags.refusal) == 0 {
		err = errors.New("no revocation in the time")
	}
	if err != nil {
		return found, err
	}
	slices.Sort(lags.refusal)
	slices.Sort(lags.watch)
	quantile := window{Result: checks}.quantile
	return [7]float64{quantile(0.5), quantile(0.99), ms(lags.refusal[len(lags.refusal)/2]), ms(lags.refusal[len(lags.refusal)*99/100]), ms(lags.watch[len(lags.watch)/2]),
		1e6 * float64(checks.Failed) / float64(checks.Sent), float64(written) / took.Seconds()}, nil
}

// importWorld writes so many new keys, from the first on.
func importWorld(ctx context.Context, etcd *clientv3.Client, first, count int) (int, error) {
	return inTransactions(ctx, etcd, func(put func(path, value string)) { world(first, count, put) })
}

// setEach revokes those keys one by one, and approves them again.
func setEach(ctx context.Context, etcd *clientv3.Client, first, count int) (written int, err error) {
	for _, status := range []string{"revoked", "approved"} {
		n, err := inTransactions(ctx, etcd, func(put func(path, value string)) {
			for i := range count {
				put(space.Status(keyRecord(keyText(first+i))), status)
			}
		})
		if written += n; err != nil {
			return written, err
		}
	}
	return written, nil
}
