package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"keygate/config"
	"keygate/server"
)

func newStatusCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Ask a keygate, and the fleet: is it fresh, how far has it come",
		Long: `Ask the keygate at --health-listen how it is: whether it answers checks, how old
its proof of freshness is, which etcd revision it has applied, and what its
cache does. And ask the fleet, if --etcd-endpoints is given or --data-dir is
served: a barrier is written, and whoever of the registered replicas has not
acknowledged it within a second is shown with its last figures.

Exit code 0: all are fresh, 1: somebody is stale, does not answer, or could not
be asked (etcd is full, or the user may not write the barrier), 5: nobody can be
asked. The keygate at the default address may be missing where there is a fleet.`,
		Example: `  keygate status
  keygate status --etcd-endpoints https://etcd-0:2379 -o json`,
		GroupID: groupUse,
		Args:    noArguments,
	}
	output := outputFlag(cmd, "table", "json")
	flags := config.Register(cmd.Flags(), config.Health, config.Org, config.External, config.Embedded, config.Keys)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := a.load(flags)
		if err != nil {
			return err
		}
		ctx := cmd.Context()
		var local *server.Status
		st, localErr := fetchStatus(ctx, cfg.HealthListen)
		if localErr != nil {
			localErr = fmt.Errorf("ask keygate at %s: %w", cfg.HealthListen, localErr)
		} else {
			local = &st
		}
		fleet, fleetErr := askFleet(ctx, cfg)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case local == nil && fleet == nil && fleetErr != nil:
			return exitWith(exitUnreachable, fmt.Errorf("%w; ask the fleet: %w", localErr, fleetErr))
		case local == nil && fleet == nil:
			return exitWith(exitUnreachable, localErr)
		}
		if err := a.printStatuses(local, localErr, fleet, fleetErr, output.value); err != nil {
			return err
		}
		asked := cfg.Source("health-listen").Kind != config.FromDefault
		switch {
		case local != nil && !local.Ready, local == nil && (asked || len(fleet.Replicas) == 0), fleetErr != nil, fleet != nil && !fleet.fresh():
			return exitWith(exitFailed, nil)
		}
		return nil
	}
	return cmd
}

// printStatuses prints what answered, and why something did not.
func (a *app) printStatuses(local *server.Status, localErr error, fleet *fleetStatus, fleetErr error, format string) error {
	if format == "json" {
		answer := struct {
			*server.Status
			Unreachable string       `json:"unreachable,omitempty"` // why the keygate did not answer
			Fleet       *fleetStatus `json:"fleet,omitempty"`
			FleetError  string       `json:"fleetError,omitempty"`
		}{Status: local, Fleet: fleet}
		if localErr != nil {
			answer.Unreachable = localErr.Error()
		}
		if fleetErr != nil {
			answer.FleetError = fleetErr.Error()
		}
		return printJSON(a.stdout, answer)
	}
	if local != nil {
		if err := a.printStatus(*local); err != nil {
			return err
		}
	} else {
		fmt.Fprintf(a.stdout, "%s\n", printable(localErr.Error()))
	}
	switch {
	case fleetErr != nil:
		_, err := fmt.Fprintf(a.stdout, "\nfleet: %s\n", printable(fleetErr.Error()))
		return err
	case fleet != nil:
		fmt.Fprintln(a.stdout)
		return fleet.print(a.stdout)
	}
	return nil
}

// maxStatus bounds the answer of /status, in bytes.
const maxStatus = 1 << 20

func fetchStatus(ctx context.Context, at config.Address) (st server.Status, err error) {
	ctx, cancel := context.WithTimeout(ctx, reachTimeout)
	defer cancel()
	client := http.Client{Transport: &http.Transport{
		Proxy: nil,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, at.Network, dialable(at))
		},
	}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://keygate/status", nil)
	if err != nil {
		return st, err
	}
	res, err := client.Do(req)
	if err != nil {
		// The URL in a url.Error is made up; the cause says it all.
		if cause := errors.Unwrap(err); cause != nil {
			err = cause
		}
		return st, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return st, fmt.Errorf("it answered %s: is it a keygate?", res.Status)
	}
	if err := json.NewDecoder(http.MaxBytesReader(nil, res.Body, maxStatus)).Decode(&st); err != nil {
		return st, fmt.Errorf("read its answer: %w", err)
	}
	return st, nil
}

// dialable is where to reach an address that is served: a server may listen on
// every interface, a client dials one.
func dialable(a config.Address) string {
	host, port, err := net.SplitHostPort(a.Address)
	if ip := net.ParseIP(host); a.Network == "tcp" && err == nil && (host == "" || ip != nil && ip.IsUnspecified()) {
		return net.JoinHostPort("localhost", port)
	}
	return a.Address
}

func (a *app) printStatus(st server.Status) error {
	state := "ready"
	if !st.Ready {
		state = "NOT READY: " + st.Problem
	}
	s := st.Store
	proof := "none yet"
	if s.ProofAge >= 0 {
		proof = fmt.Sprintf("%.3f s old, answers until %v", s.ProofAge.Seconds(), s.StalenessBudget)
	}
	etcd := strings.Join(st.Etcd.Endpoints, ",")
	if st.Etcd.Embedded {
		etcd = fmt.Sprintf("embedded, pid %d, %d restarts, %s", st.Etcd.Pid, st.Etcd.Restarts, etcd)
	}
	hitRate := "-"
	if used := s.Hits + s.AbsentHits + s.Misses; used > 0 {
		hitRate = fmt.Sprintf("%.1f %%", 100*float64(s.Hits+s.AbsentHits)/float64(used))
	}
	n := func(v int64) string { return strconv.FormatInt(v, 10) }
	return printTable(a.stdout,
		[]string{"state", state},
		[]string{"version", st.Version + ", up " + time.Duration(st.UptimeSeconds*float64(time.Second)).Round(time.Second).String()},
		[]string{"etcd", etcd},
		[]string{"proof", proof},
		[]string{"applied revision", n(s.AppliedRevision)},
		[]string{"watch", fmt.Sprintf("%d events, %d gaps, %d replaced, epoch %d", s.Events, s.Gaps, s.Replaced, s.Epoch)},
		[]string{"index", fmt.Sprintf("%s, %d records, %d answers", s.Index, s.IndexRecords, s.Indexed)},
		[]string{"cache", fmt.Sprintf("%s hits (%d records, %d unknown keys, %d misses)", hitRate, s.Hits, s.AbsentHits, s.Misses)},
		[]string{"loads", fmt.Sprintf("%d, %d failed, %d shed, %d of unreadable records", s.Loads, s.LoadErrors, s.Shed, s.Unreadable)},
	)
}
