package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"keygate/config"
	"keygate/ledger"
	"keygate/statestore"
	"keygate/statestore/embedded"
)

// fleetPatience is how long status waits for the answers to its barrier. They
// take milliseconds.
const fleetPatience = time.Second

// fleetStatus is the JSON of the fleet in keygate status. Stable.
type fleetStatus struct {
	// Revision of the barrier, or of the list if there is none.
	Revision int64 `json:"revision"`
	// Asked: a barrier was written. If not, Problem says why.
	Asked    bool           `json:"asked"`
	Problem  string         `json:"problem,omitempty"`
	Replicas []fleetReplica `json:"replicas"`
}

// fleetReplica is one registered replica. Its figures are those that it wrote
// last.
type fleetReplica struct {
	ID      string `json:"id"`
	Host    string `json:"host,omitempty"`
	Pid     int    `json:"pid,omitempty"`
	Version string `json:"version,omitempty"`
	State   string `json:"state"`
	// ProofAgeMs is -1 before the first proof.
	ProofAgeMs        int64 `json:"proofAgeMs"`
	Acknowledged      int64 `json:"acknowledged"`
	StalenessBudgetMs int64 `json:"stalenessBudgetMs"`
	// FiguresAgeMs by the clocks of the two machines.
	FiguresAgeMs int64 `json:"figuresAgeMs"`
	// AnsweredMs after the barrier; absent without an answer.
	AnsweredMs *int64 `json:"answeredMs,omitempty"`
	Problem    string `json:"problem,omitempty"`
}

// States of a replica.
const (
	stateFresh    = "fresh"
	stateStale    = "STALE"
	stateSilent   = "no answer"
	stateGone     = "gone" // its registration ended meanwhile
	stateNotAsked = "not asked"
)

// askFleet asks the replicas that are registered in the etcd that cfg names. It
// starts no etcd: where there is none of cfg's it returns nothing.
func askFleet(ctx context.Context, cfg *config.Config) (*fleetStatus, error) {
	var etcd statestore.EtcdConfig
	var err error
	if cfg.Embedded() {
		if !embedded.Running(ctx, cfg.DataDir) {
			return nil, nil
		}
		endpoint, err := embedded.Endpoint(cfg.DataDir)
		if err != nil {
			return nil, err
		}
		etcd.Endpoints = []string{endpoint}
	} else if etcd, err = externalEtcd(cfg); err != nil {
		return nil, err
	}
	client, err := dial(ctx, cfg, etcd)
	if err != nil {
		return nil, err
	}
	defer client.Close()

	asking, cancel := context.WithTimeout(ctx, reachTimeout)
	defer cancel()
	barrier, err := ledger.Barrier(asking, client, cfg.Space, cfg.Organization)
	if errors.Is(err, rpctypes.ErrPermissionDenied) || errors.Is(err, rpctypes.ErrNoSpace) {
		all, revision, listErr := ledger.Replicas(asking, client, cfg.Space)
		if listErr != nil {
			return nil, listErr
		}
		f := &fleetStatus{Revision: revision, Problem: err.Error(), Replicas: []fleetReplica{}}
		for _, r := range all {
			f.add(ledger.ReplicaAnswer{Registration: r})
		}
		return f, nil
	}
	if err != nil {
		return nil, err
	}
	waiting, cancel := context.WithTimeout(ctx, fleetPatience)
	defer cancel()
	receipt, err := barrier.Wait(waiting)
	if err != nil && waiting.Err() == nil {
		return nil, err
	}
	f := &fleetStatus{Revision: receipt.Revision, Asked: true, Replicas: []fleetReplica{}}
	if receipt.Unread != nil {
		f.Problem = "answers could not be read: " + receipt.Unread.Error()
	}
	for _, r := range receipt.Replicas {
		f.add(r)
	}
	return f, nil
}

func (f *fleetStatus) add(a ledger.ReplicaAnswer) {
	r := fleetReplica{
		ID: a.ID, Host: a.Replica.Host, Pid: a.Replica.Pid, Version: a.Replica.Version, State: stateNotAsked, Problem: a.Problem,
		ProofAgeMs: -1, Acknowledged: a.Replica.Acknowledged, StalenessBudgetMs: a.Replica.StalenessBudget.Milliseconds(),
	}
	if a.Replica.ProofAge >= 0 && a.Problem == "" {
		r.ProofAgeMs = a.Replica.ProofAge.Milliseconds()
	}
	if !a.Replica.At.IsZero() {
		r.FiguresAgeMs = max(0, time.Since(a.Replica.At).Milliseconds())
	}
	switch {
	case !f.Asked:
	case a.Answer != ledger.Applied && a.Vanished:
		r.State = stateGone
	case a.Answer != ledger.Applied:
		r.State = stateSilent
	default:
		ms := a.After.Milliseconds()
		r.AnsweredMs = &ms
		r.State = stateStale
		if a.Replica.Fresh {
			r.State = stateFresh
		}
	}
	f.Replicas = append(f.Replicas, r)
}

// fresh tells whether all are known to be, or are no more.
func (f *fleetStatus) fresh() bool {
	if !f.Asked && len(f.Replicas) > 0 {
		return false
	}
	for _, r := range f.Replicas {
		if r.State == stateStale || r.State == stateSilent {
			return false
		}
	}
	return true
}

func (f *fleetStatus) print(w io.Writer) error {
	fresh, answered := 0, 0
	rows := [][]string{{"REPLICA", "STATE", "PROOF AGE", "ACKNOWLEDGED", "S", "FIGURES", "VERSION", "ID"}}
	seconds := func(ms int64) string { return strconv.FormatFloat(float64(ms)/1000, 'f', 3, 64) + " s" }
	for _, r := range f.Replicas {
		if r.Problem != "" {
			rows = append(rows, []string{"unreadable", r.State, "-", "-", "-", "-", r.Problem, r.ID})
			continue
		}
		proof, acknowledged, figures := "none", strconv.FormatInt(r.Acknowledged, 10), "now"
		if r.ProofAgeMs >= 0 {
			proof = seconds(r.ProofAgeMs)
		}
		if f.Asked && r.Acknowledged < f.Revision {
			acknowledged += fmt.Sprintf(" of %d", f.Revision)
		}
		if r.AnsweredMs == nil {
			figures = seconds(r.FiguresAgeMs) + " old"
		} else {
			answered++
		}
		if r.State == stateFresh {
			fresh++
		}
		rows = append(rows, []string{
			fmt.Sprintf("%s/%d", r.Host, r.Pid), r.State, proof, acknowledged, seconds(r.StalenessBudgetMs), figures, r.Version, r.ID,
		})
	}
	var err error
	switch {
	case len(f.Replicas) == 0:
		_, err = fmt.Fprintf(w, "fleet: no replica is registered, at revision %d\n", f.Revision)
	case !f.Asked:
		_, err = fmt.Fprintf(w, "fleet: %s, not asked (%s), at revision %d: nobody knows whether they are fresh\n", count(len(f.Replicas), "replica"), printable(f.Problem), f.Revision)
	default:
		_, err = fmt.Fprintf(w, "fleet: %d/%d replicas answered the barrier at revision %d, %d fresh\n", answered, len(f.Replicas), f.Revision, fresh)
		if err == nil && f.Problem != "" {
			_, err = fmt.Fprintln(w, printable(f.Problem))
		}
	}
	if err != nil || len(f.Replicas) == 0 {
		return err
	}
	return printTable(w, rows...)
}
