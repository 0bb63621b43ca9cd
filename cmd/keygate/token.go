package main

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"keygate/access"
	"keygate/client"
	"keygate/config"
)

func newTokenCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "token",
		Short:   "Create, list and revoke tokens of the management API",
		Long:    "Create, list and revoke tokens of the management API. A token is shown once, at\nits creation, and kept as a hash.\n" + whereHelp,
		GroupID: groupSetUp,
		Example: `  keygate token create --name ci --role operator --org acme --expires-in 720h
  keygate token list`,
	}
	parent(cmd)
	cmd.AddCommand(newTokenCreateCommand(a), newTokenListCommand(a), newTokenRevokeCommand(a))
	return cmd
}

// tokenJSON is a token in the output. Stable.
type tokenJSON struct {
	ID           string `json:"id"`
	Name         string `json:"name"`
	Role         string `json:"role"`
	Organization string `json:"organization"`
	CreatedBy    string `json:"createdBy,omitempty"`
	CreatedAt    int64  `json:"createdAt"` // ms
	ExpiresAt    int64  `json:"expiresAt"` // ms; -1 never
	LastUsed     int64  `json:"lastUsed,omitempty"`
	Token        string `json:"token,omitempty"` // of one that was created now
}

func tokenOutput(t client.Token, secret client.Secret) tokenJSON {
	return tokenJSON{t.ID, t.Name, t.Role, t.Organization, t.CreatedBy, int64(t.CreatedAt), int64(t.ExpiresAt), int64(t.LastUsed), secret.Reveal()}
}

func jsonOf(v any) (json.RawMessage, error) { return json.Marshal(v) }

func newTokenCreateCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "create --role R",
		Short: "Create a token, and show it once",
		Long: `Create a token for the organization of --org, and print it on standard output,
alone: this once. Roles: viewer reads, operator approves and revokes too, admin
does everything, auditor reads the audit.`,
		Example: `  keygate token create --name ci --role operator --org acme > ci.token
  keygate token create --role viewer --expires-in 720h -o json`,
		Args: noArguments,
	}
	var spec client.TokenSpec
	role := &outputFormat{"", nil}
	for _, r := range access.Roles() {
		role.allowed = append(role.allowed, r.String())
	}
	cmd.Flags().Var(role, "role", "`role`: viewer, operator, admin or auditor")
	cmd.Flags().StringVar(&spec.Name, "name", "", "`name` for people (default who creates it)")
	cmd.Flags().DurationVar(&spec.ExpiresIn, "expires-in", 0, "`duration` until it expires, such as 720h (default never)")
	all := cmd.Flags().Bool("all-organizations", false, "it is good for every organization, not only --org")
	ch := changeFlags(cmd)
	output := outputFlag(cmd, "table", "json", "yaml")
	flags := config.Register(cmd.Flags(), managed()...)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := a.loadFor(flags)
		switch {
		case err != nil:
			return err
		case role.value == "":
			return usageError(cmd, "no --role: viewer, operator, admin or auditor")
		case spec.ExpiresIn < 0:
			return usageError(cmd, "--expires-in: want a duration such as 720h")
		}
		spec.Role = role.value
		if *all {
			spec.Organization = string(access.AllOrganizations)
		}
		if spec.Name == "" {
			spec.Name = localActor().Name
		}
		c, release, err := a.manage(cmd, cfg, createAbsent, false)
		if err != nil {
			return err
		}
		defer release()
		t, secret, done, err := c.CreateToken(cmd.Context(), spec, *ch)
		switch {
		case err != nil:
			return apiError(err)
		case ch.DryRun:
			return a.printChanged("token of role "+spec.Role, "created", *ch, done, output.value)
		case output.value != "table":
			document, err := jsonOf(tokenOutput(t, secret))
			if err != nil {
				return err
			}
			return printDocument(a.stdout, document, output.value)
		}
		fmt.Fprintf(a.stderr, "token %.12s, %s of %s, expires %s; it is shown this once:\n", t.ID, printable(t.Role), printable(t.Organization), expiry(t.ExpiresAt))
		_, err = fmt.Fprintln(a.stdout, secret.Reveal())
		return err
	}
	return cmd
}

func newTokenListCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "list", Short: "List the tokens that are good for the organization",
		Long: `List the tokens of the organization; with --org '*' all tokens, those that are
good for every organization too.`,
		Example: `  keygate token list --org acme
  keygate token list --org '*' -o json`,
		Args: noArguments,
	}
	output := outputFlag(cmd, "table", "json", "yaml", "name")
	noHeaders := cmd.Flags().Bool("no-headers", false, "no header in the table")
	flags := config.Register(cmd.Flags(), managed()...)
	flags.AllOrganizations = true
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := a.loadFor(flags)
		if err != nil {
			return err
		}
		c, release, err := a.manage(cmd, cfg, refuseAbsent, false)
		if err != nil {
			return err
		}
		defer release()
		tokens, err := c.Tokens(cmd.Context())
		if err != nil {
			return apiError(err)
		}
		n := noun{plural: "tokens", member: "tokens", header: []string{"ID", "NAME", "ROLE", "ORGANIZATION", "CREATED", "EXPIRES", "LAST USED"}}
		p := listPrinter{noun: n, format: output.value, headers: !*noHeaders}
		return p.print(a, func(yield func(item, error) bool) {
			for _, t := range tokens {
				raw, err := jsonOf(tokenOutput(t, ""))
				i := item{
					name: "token/" + t.ID, raw: raw,
					row: []string{fmt.Sprintf("%.12s", t.ID), dash(t.Name), t.Role, t.Organization, date(t.CreatedAt), expiry(t.ExpiresAt), minute(t.LastUsed)},
				}
				if !yield(i, err) {
					return
				}
			}
		})
	}
	return cmd
}

// minute of a time that is noted to the minute.
func minute(m client.Millis) string {
	if m.Time().IsZero() {
		return "never"
	}
	return m.Time().Format("2006-01-02T15:04Z07:00")
}

func newTokenRevokeCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "revoke ID...", Short: "Revoke tokens, by their ids",
		Long: `Revoke tokens by their ids, or at least 8 characters that one begins with, which
token list prints. They are good for nothing from the next request on. A token
that is good for every organization is revoked with --org '*'.`,
		Example: `  keygate token revoke 5f2a9c01e77b
  keygate token revoke 5f2a9c01e77b --reason "left the team"`,
		Annotations: map[string]string{holdsKeys: ""},
	}
	ch := changeFlags(cmd)
	output := outputFlag(cmd, "table", "json", "yaml", "name")
	flags := config.Register(cmd.Flags(), managed()...)
	flags.AllOrganizations = true
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usageError(cmd, "name at least one token")
		}
		for i, arg := range args {
			if !isTokenID(arg) {
				return usageError(cmd, "argument %d is not a token's id: want 8 to 64 lower-case hex digits, which keygate token list prints. "+
					"If it is the token itself, others may have seen it (ps, shell history)", i+1)
			}
		}
		return nil
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		cfg, err := a.loadFor(flags)
		if err != nil {
			return err
		}
		c, release, err := a.manage(cmd, cfg, refuseAbsent, false)
		if err != nil {
			return err
		}
		defer release()
		for _, id := range distinct(args) {
			t, done, err := c.RevokeToken(cmd.Context(), id, *ch)
			if err != nil {
				return apiError(err)
			}
			if ch.DryRun {
				t.ID = id
			}
			if err := a.printChanged("token/"+t.ID, "revoked", *ch, done, output.value); err != nil {
				return err
			}
		}
		return nil
	}
	return cmd
}

func isTokenID(s string) bool {
	for _, c := range s {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return len(s) >= 8 && len(s) <= 64
}

// parseTime reads a time, or how long ago one was.
func parseTime(cmd *cobra.Command, flag, s string) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	for _, layout := range []string{time.RFC3339, time.DateOnly} {
		if t, err := time.Parse(layout, s); err == nil {
			return t, nil
		}
	}
	if d, err := time.ParseDuration(s); err == nil && d > 0 {
		return time.Now().Add(-d), nil
	}
	return time.Time{}, usageError(cmd, "--%s: want a time such as 2026-01-31T12:00:00Z, a date, or how long ago, such as 24h", flag)
}
