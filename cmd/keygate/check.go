package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"keygate/authz"
	"keygate/config"
	"keygate/statestore"
	"keygate/statestore/keyspace"
)

// checkAnswer is the JSON of keygate check. Stable.
type checkAnswer struct {
	Decision     string             `json:"decision"` // allowed or denied
	Reason       authz.Reason       `json:"reason"`
	Problem      string             `json:"problem,omitempty"`
	Revision     int64              `json:"revision"`
	Organization authz.Organization `json:"organization"`
	KeyID        authz.KeyID        `json:"keyId"`
	Product      authz.ProductName  `json:"product"`
	App          authz.AppID        `json:"app,omitempty"`
	Developer    authz.DeveloperID  `json:"developer,omitempty"`
	Scopes       string             `json:"scopes,omitempty"`
	Levels       []checkLevel       `json:"levels"`
}

type checkLevel struct {
	Level   string       `json:"level"`
	Status  authz.Status `json:"status,omitempty"`
	Reason  authz.Reason `json:"reason"`
	Problem string       `json:"problem,omitempty"`
	EtcdKey string       `json:"etcdKey,omitempty"`
}

func newCheckCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check --product P --key K|-",
		Short: "Explain what a check of a key would answer, level by level",
		Long: `Explain what a check of a consumer key for an API product would answer: every
level with its own status and the etcd key where it stands, the decision, the
reason and the revision. It is the code of the data path, over the same etcd.

With --key - the key comes from standard input. Exit code 0: allowed, 7: denied.`,
		Example: `  printf %s "$KEY" | keygate check --org acme --product Weather-Product --key -
  keygate check --product Weather-Product --key "$KEY" -o json`,
		GroupID:     groupUse,
		Annotations: map[string]string{holdsKeys: ""},
		Args:        noArguments,
	}
	key := cmd.Flags().String("key", "", "consumer `key`, or - to read it from standard input")
	products := cmd.Flags().StringArray("product", nil, "API `product` of the route; more than one means any of them")
	output := outputFlag(cmd, "table", "json")
	flags := config.Register(cmd.Flags(), config.External, config.Embedded, config.Keys, config.Org)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := a.loadFor(flags)
		if err != nil {
			return err
		}
		switch {
		case *key == "":
			return usageError(cmd, "no --key; give - to read it from standard input")
		case len(*products) == 0:
			return usageError(cmd, "no --product")
		}
		text := *key
		if text == "-" {
			if text, err = a.readKey(cmd.Context()); err != nil {
				return err
			}
		} else {
			a.warnOfArguments()
		}
		req := authz.Request{Organization: cfg.Organization}
		for _, p := range *products {
			req.Products = append(req.Products, authz.ProductName(p))
		}
		consumerKey, reason := authz.ParseConsumerKey(text)
		req.KeyID = consumerKey.ID()
		d, levels := authz.Refuse(req, reason), []authz.Rung(nil)
		if reason == authz.Allowed {
			if d, levels, err = a.explain(cmd.Context(), cfg, req); err != nil {
				return err
			}
		}
		return a.printCheck(cfg.Space, d, levels, output.value)
	}
	return cmd
}

// readKey reads the one line of standard input.
func (a *app) readKey(ctx context.Context) (string, error) {
	lines := bufio.NewScanner(a.input(ctx))
	if !lines.Scan() {
		if err := lines.Err(); err != nil && !errors.Is(err, bufio.ErrTooLong) {
			return "", fmt.Errorf("read standard input: %w", err)
		}
		return "", exitWith(exitUsage, errors.New("no key on standard input"))
	}
	return strings.TrimSuffix(lines.Text(), "\r"), nil
}

// explain asks a store that lives for one check.
func (a *app) explain(ctx context.Context, cfg *config.Config, req authz.Request) (d authz.Decision, levels []authz.Rung, err error) {
	log := a.toolLogger(cfg)
	etcd, release, err := a.reachEtcd(ctx, cfg, refuseAbsent, log)
	if err != nil {
		return d, nil, err
	}
	defer release()
	client, err := dial(ctx, cfg, etcd) // says in etcd's words why it cannot be reached
	if err != nil {
		return d, nil, err
	}
	defer func() { _ = client.Close() }()
	backend, err := statestore.NewEtcd(etcd)
	if err != nil {
		return d, nil, err
	}
	defer func() { _ = backend.Close() }()
	store, err := statestore.New(statestore.Config{Backend: backend, Space: cfg.Space, FenceSlots: 1, CacheBytes: 1 << 20, Logger: log})
	if err != nil {
		return d, nil, err
	}
	run, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = store.Run(run) // nil, says its contract
	}()
	defer func() { stop(); <-done }()
	proven, cancel := context.WithTimeout(ctx, reachTimeout)
	defer cancel()
	if err := store.Await(proven); err != nil {
		return d, nil, err
	}
	authorizer := authz.Authorizer{Source: store}
	d, levels = authorizer.Explain(ctx, req)
	if levels == nil {
		return d, nil, fmt.Errorf("check: %v: %s", d.Reason, d.Problem)
	}
	return d, levels, nil
}

func (a *app) printCheck(space keyspace.Space, d authz.Decision, levels []authz.Rung, format string) error {
	answer := checkAnswer{
		Decision: "denied", Reason: d.Reason, Problem: d.Problem, Revision: d.Revision, Organization: d.Organization,
		KeyID: d.KeyID, Product: d.Product, App: d.App, Developer: d.Developer, Scopes: d.Scopes, Levels: []checkLevel{},
	}
	if d.Allowed() {
		answer.Decision = "allowed"
	}
	paths := levelPaths(space, d)
	for _, r := range levels {
		answer.Levels = append(answer.Levels, checkLevel{r.Level, r.Status, r.Reason, r.Problem, paths[r.Level]})
	}
	err := a.printAnswer(answer, format)
	if err == nil && !d.Allowed() {
		err = exitWith(exitDenied, nil)
	}
	return err
}

// levelPaths gives the etcd key at which each level stands, where it is known.
func levelPaths(space keyspace.Space, d authz.Decision) map[string]string {
	key := keyspace.KeyRecord(d.Organization, d.KeyID)
	paths := map[string]string{
		"key": space.Folder(key), "key status": space.Status(key), "expiry": space.Details(key),
		"product on key": space.KeyProduct(key, d.Product),
	}
	if d.App != "" {
		paths["app status"] = space.Status(keyspace.AppRecord(d.Organization, d.App))
	}
	if d.Developer != "" {
		paths["developer status"] = space.Status(keyspace.DeveloperRecord(d.Organization, d.Developer))
	}
	return paths
}

func (a *app) printAnswer(answer checkAnswer, format string) error {
	if format == "json" {
		return printJSON(a.stdout, answer)
	}
	if len(answer.Levels) > 0 {
		rows := [][]string{{"LEVEL", "STATUS", "ANSWER", "ETCD KEY"}}
		for _, l := range answer.Levels {
			status, verdict := l.Status.String(), "ok"
			if status == "" {
				status = "-"
			}
			if l.Reason != authz.Allowed {
				verdict = l.Reason.String()
			}
			if l.Problem != "" {
				verdict += ": " + l.Problem
			}
			rows = append(rows, []string{l.Level, status, verdict, l.EtcdKey})
		}
		if err := printTable(a.stdout, rows...); err != nil {
			return err
		}
		fmt.Fprintln(a.stdout)
	}
	verdict := answer.Decision
	if answer.Reason != authz.Allowed {
		verdict += ": " + answer.Reason.String()
	}
	_, err := fmt.Fprintf(a.stdout, "%s (organization %s, product %s, revision %d)\n", verdict,
		printable(string(answer.Organization)), printable(string(answer.Product)), answer.Revision)
	return err
}
