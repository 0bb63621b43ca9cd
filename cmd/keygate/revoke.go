package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"keygate/authz"
	"keygate/client"
	"keygate/config"
	"keygate/ledger"
	"keygate/statestore/keyspace"
)

func newRevokeCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "revoke",
		Short: "Revoke a key, a product on it, an app or a developer",
		Long: `Revoke a consumer key, an API product on it, a developer app, or a developer
(who becomes inactive): by the management API of --server; or in the etcd that
--etcd-endpoints or --data-dir names, whether a keygate runs or not; or else by
the keygate that serves the data directory of this machine. One flag changes and
no other: approving it again restores what was.

With --wait the command returns when every registered replica has applied it or
refuses by itself, and says so. If etcd has no space left, flags are deleted
instead, which refuses as well.

Where etcd knows users it needs the right to read and write /keygate/,
/keygate.audit/ and /keygate.intent/ and to read /keygate.index/, and with
--wait to read /keygate.replicas/ as well.`,
		Example: `  keygate revoke app 6ed3a4d1-4733-439a-80a4-0d71149ec9ad --org acme --wait
  printf %s "$KEY" | keygate revoke key - --wait`,
		GroupID: groupUse,
	}
	return statusCommand(a, cmd, ledger.Revoke)
}

func newApproveCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "approve",
		Short: "Approve a key, a product on it, an app or a developer",
		Long: `Approve a consumer key, an API product on it, a developer app, or a developer
(who becomes active): by the management API of --server; or in the etcd that
--etcd-endpoints or --data-dir names, whether a keygate runs or not; or else by
the keygate that serves the data directory of this machine. One flag changes and
no other, and nothing is created that was not there.

With --wait the command returns when every registered replica has applied it or
refuses by itself, and says so.

Where etcd knows users it needs the right to read and write /keygate/,
/keygate.audit/ and /keygate.intent/ and to read /keygate.index/, and with
--wait to read /keygate.replicas/ as well.`,
		Example: `  keygate approve app 6ed3a4d1-4733-439a-80a4-0d71149ec9ad --org acme
  printf %s "$KEY" | keygate approve key - --product Weather-Product`,
		GroupID: groupUse,
	}
	return statusCommand(a, cmd, ledger.Approve)
}

// statusCommand completes revoke or approve by what it may be done to.
func statusCommand(a *app, cmd *cobra.Command, action ledger.StatusAction) *cobra.Command {
	verb := action.String()
	parent(cmd)
	help := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return help(cmd, args)
		}
		return usageError(cmd, "want %[1]s key, %[1]s app or %[1]s developer", verb) // the argument may be a consumer key
	}
	cmd.Annotations = map[string]string{holdsKeys: ""}
	title := strings.ToUpper(verb[:1]) + verb[1:]
	key := &cobra.Command{
		Use:   "key KEYID... | -",
		Short: title + " consumer keys, or products on them",
		Long: title + ` consumer keys by their ids (keygate key-id prints them), or with - the
one key on standard input. With --product it is the flag of that product on each
key, and not the key's own. --from-file, --app and --developer stand for many
keys; those of an app and a developer are found by records and indexes, which
etcdctl does not write.

More than one change is shown first, and asked for unless --yes is given. Keys
that are not there are named, the rest is done, and the exit code is 4.`,
		Example: fmt.Sprintf(`  printf %%s "$KEY" | keygate %[1]s key - --product Weather-Product --wait
  keygate %[1]s key --from-file ids.txt --yes --wait -o json
  keygate %[1]s key --developer Z2S37rxX2Suzkwtg --product Weather-Product`, verb),
		Annotations: map[string]string{holdsKeys: ""},
	}
	c := &statusChange{a: a, cmd: key, action: action}
	key.Flags().StringArrayVar(&c.products, "product", nil, "API `product` on the key; may be given more than once")
	key.Flags().StringVar(&c.fromFile, "from-file", "", "`file` with a key id in each line; # begins a comment")
	key.Flags().StringVar(&c.app, "app", "", "all keys of the app with this `id`")
	key.Flags().StringVar(&c.developer, "developer", "", "all keys of all apps of the developer with this `id` or e-mail address")
	key.Args = c.keyArguments
	c.wire()

	app := &cobra.Command{
		Use:         "app APPID | NAME --developer D",
		Short:       title + " a developer app, and with it all its keys",
		Annotations: map[string]string{holdsKeys: ""}, // one lands here by mistake
		Example: fmt.Sprintf(`  keygate %[1]s app 6ed3a4d1-4733-439a-80a4-0d71149ec9ad --wait
  keygate %[1]s app AnotherTestApp --developer ann@example.com --org acme`, verb),
	}
	c = &statusChange{a: a, cmd: app, action: action}
	app.Flags().StringVar(&c.developer, "developer", "", "whose app, by e-mail `address` or id; the app is then its name")
	c.wire()
	app.Args = oneID

	status := map[ledger.StatusAction]string{ledger.Revoke: "inactive", ledger.Approve: "active"}[action]
	developer := &cobra.Command{
		Use:         "developer DEVELOPERID | E-MAIL",
		Short:       title + " a developer, who becomes " + status,
		Annotations: map[string]string{holdsKeys: ""},
		Example: fmt.Sprintf(`  keygate %[1]s developer Z2S37rxX2Suzkwtg --wait
  keygate %[1]s developer ann@example.com --org acme -o json`, verb),
	}
	c = &statusChange{a: a, cmd: developer, action: action}
	c.wire()
	developer.Args = oneID
	cmd.AddCommand(key, app, developer)
	return cmd
}

// statusChange is one run of revoke or approve.
type statusChange struct {
	a      *app
	cmd    *cobra.Command
	action ledger.StatusAction
	output *outputFormat
	change *client.Change
	wait   bool
	yes    bool
	at     place // where it works

	products                 []string
	fromFile, app, developer string
}

// wire makes the command run c, with the flags that all share.
func (c *statusChange) wire() {
	fs := c.cmd.Flags()
	fs.BoolVar(&c.wait, "wait", false, "return when no replica answers by what was before, and say so")
	fs.BoolVar(&c.yes, "yes", false, "do not ask, however many it changes")
	c.change = changeFlags(c.cmd)
	c.output = outputFlag(c.cmd, "table", "json")
	flags := config.Register(fs, config.Org, config.Client, config.External, config.Embedded, config.Keys)
	c.cmd.RunE = func(cmd *cobra.Command, args []string) error {
		cfg, err := c.a.loadFor(flags)
		if err != nil {
			return err
		}
		return c.run(cmd.Context(), cfg, args)
	}
}

// named tells whether one argument is what changes, and not keys.
func (c *statusChange) named() bool { return c.cmd.Name() != "key" }

func oneID(cmd *cobra.Command, args []string) error {
	if len(args) != 1 || args[0] == "" {
		return usageError(cmd, "want one id, got %d", len(args))
	}
	return nil
}

// keyArguments checks what can be checked without etcd. No error shows an
// argument: it may be a consumer key.
func (c *statusChange) keyArguments(cmd *cobra.Command, args []string) error {
	ways := 0
	for _, given := range []bool{len(args) > 0, c.fromFile != "", c.app != "", c.developer != ""} {
		if given {
			ways++
		}
	}
	switch {
	case ways == 0:
		return usageError(cmd, "no key; give its id, or - and the key on standard input")
	case ways > 1:
		return usageError(cmd, "give key ids, --from-file, --app or --developer: one of them")
	case slices.Contains(args, "-") && len(args) > 1:
		return usageError(cmd, "- stands for one key, and alone")
	case slices.Contains(c.products, ""):
		return usageError(cmd, "a product has no name")
	}
	c.products = distinct(c.products)
	for i, arg := range args {
		if _, err := authz.ParseKeyID(arg); err != nil && arg != "-" {
			return notKeyID(cmd, i)
		}
	}
	return nil
}

func (c *statusChange) run(ctx context.Context, cfg *config.Config, args []string) error {
	ids, err := c.ids(ctx, args)
	if err != nil {
		return err
	}
	if c.at, err = findPlace(ctx, c.cmd, cfg); err != nil {
		return err
	}
	flags, err := c.a.statusPlace(ctx, cfg, c.at)
	if err != nil {
		return err
	}
	defer flags.close()

	args, err = c.resolve(ctx, flags, args)
	if err != nil {
		return c.statusError(cfg, err, args)
	}
	targets, err := c.targets(ctx, flags, args, ids)
	if err != nil {
		return c.statusError(cfg, err, args)
	}
	done, err := c.set(ctx, flags, targets)
	if len(done.flags) == 0 {
		return c.statusError(cfg, err, args)
	}
	if c.change.DryRun {
		return errors.Join(c.printDryRun(done), c.statusError(cfg, err, args))
	}
	var waited error
	if c.wait && done.await != nil {
		done.receipt, waited = c.await(ctx, done)
	}
	if printErr := c.print(cfg, args, done, len(targets), waited, err); printErr != nil && err == nil {
		err = printErr // the change stands all the same
	}
	if waited != nil && err == nil {
		return exitWith(exitInterrupted, fmt.Errorf("interrupted: the %s stands at revision %d; the same again with --wait waits again", c.noun(), done.revision))
	}
	if done.receipt != nil && strings.HasPrefix(done.receipt.AcknowledgementsUnread, ledger.ErrReplaced.Error()) && err == nil {
		return exitWith(exitFailed, fmt.Errorf("%s: look at what it holds now, and repeat it", done.receipt.AcknowledgementsUnread))
	}
	return c.statusError(cfg, err, args)
}

// resolve returns the ids that names in args stand for, and makes ids of the
// flags that may hold names.
func (c *statusChange) resolve(ctx context.Context, flags statusPlace, args []string) (ids []string, err error) {
	switch name := c.cmd.Name(); {
	case name == "app" && c.developer != "":
		id, err := flags.app(ctx, c.developer, args[0])
		return []string{id}, err
	case name == "developer" && strings.Contains(args[0], "@"):
		id, err := flags.developer(ctx, args[0])
		return []string{id}, err
	case name == "key" && strings.Contains(c.developer, "@"):
		c.developer, err = flags.developer(ctx, c.developer)
	}
	return args, err
}

// noun for what has been done.
func (c *statusChange) noun() string {
	return [...]string{ledger.Revoke: "revocation", ledger.Approve: "approval"}[c.action]
}

// done is the participle.
func (c *statusChange) done() string {
	return [...]string{ledger.Revoke: "revoked", ledger.Approve: "approved"}[c.action]
}

// statusError gives an error of the ledger its exit code.
func (c *statusChange) statusError(cfg *config.Config, err error, args []string) error {
	var missing *ledger.NotFoundError
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ledger.ErrListDenied):
		err = fmt.Errorf("%w (without --wait)", err)
	// Interrupted or not, what an error says of the work is not to be cut down to
	// "interrupted".
	case errors.Is(err, ledger.ErrOutcomeUnknown):
		return exitWith(exitUnreachable, errors.New(err.Error()))
	case errors.Is(err, context.Canceled) && errors.As(err, new(*ledger.PartialError)):
		return exitWith(exitInterrupted, fmt.Errorf("interrupted: %v", err))
	case errors.As(err, &missing) && len(missing.Targets) == 1 && missing.Targets[0].Record.Kind != keyspace.KindKey:
		// The id is an argument, which nobody knows to be one.
		t := missing.Targets[0]
		length := count(utf8.RuneCountInString(t.Record.Name), "character")
		t.Record.Name = hint(t.Record.Name)
		return exitWith(exitNotFound, fmt.Errorf("%v: not in organization %q: %v of %s. If that was a consumer key, others may have seen it (ps, shell history): "+
			"give keygate %[1]v key - and the key on standard input", c.action, string(cfg.Organization), t, length))
	case errors.Is(err, ledger.ErrNotFound):
		return exitWith(exitNotFound, err)
	case errors.Is(err, ledger.ErrConflict):
		return exitWith(exitConflict, err)
	}
	return apiError(err, append(args, c.app, c.developer)...)
}

// hint at an argument that was not found: enough for whoever typed it, and too
// little of a consumer key for whoever reads the log. No rule tells the one from
// the other, for app ids, developer ids and keys are made of the same characters.
func hint(arg string) string {
	all := []rune(arg)
	return string(all[:min(4, len(all)/4)]) + "…"
}

// ids of the keys that arguments, standard input or --from-file name, each once.
func (c *statusChange) ids(ctx context.Context, args []string) (ids []authz.KeyID, err error) {
	switch {
	case c.named():
		return nil, nil
	case c.fromFile != "":
		ids, err := readKeyIDs(c.fromFile)
		return distinct(ids), err
	case len(args) == 1 && args[0] == "-":
		id, err := c.a.readKeyID(ctx)
		return []authz.KeyID{id}, err
	}
	for _, arg := range args {
		id, err := authz.ParseKeyID(arg)
		if err != nil {
			return nil, exitWith(exitUsage, err)
		}
		ids = append(ids, id)
	}
	return distinct(ids), nil
}

// distinct keeps the first of each.
func distinct[T comparable](all []T) (once []T) {
	seen := map[T]bool{}
	for _, v := range all {
		if !seen[v] {
			seen[v] = true
			once = append(once, v)
		}
	}
	return once
}

// readKeyIDs reads a file of ids. Nothing of a bad line is shown: it may be a
// consumer key.
func readKeyIDs(name string) (ids []authz.KeyID, err error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, exitWith(exitUsage, fmt.Errorf("--from-file: %w", err))
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		text, _, _ := strings.Cut(lines.Text(), "#")
		text = strings.TrimSpace(text)
		if text == "" {
			continue
		}
		id, err := authz.ParseKeyID(text)
		if err != nil {
			return nil, &exitError{code: exitUsage, placed: true,
				err: fmt.Errorf("%s:%d: not a key id: want 64 lower-case hex digits, which keygate key-id prints; nothing has been done", name, n)}
		}
		ids = append(ids, id)
	}
	switch err := lines.Err(); {
	case err != nil:
		return nil, exitWith(exitUsage, fmt.Errorf("--from-file: %s: %w", name, err))
	case len(ids) == 0:
		return nil, exitWith(exitUsage, fmt.Errorf("--from-file: no key id in %s", name))
	}
	return ids, nil
}

// targets finds what is to be changed. More than one is shown, and agreed to.
func (c *statusChange) targets(ctx context.Context, flags statusPlace, args []string, ids []authz.KeyID) ([]client.Target, error) {
	switch c.cmd.Name() {
	case "app":
		return []client.Target{{App: args[0]}}, nil
	case "developer":
		return []client.Target{{Developer: args[0]}}, nil
	}
	through := c.app != "" || c.developer != "" // the keys were found, not named
	if len(ids) == 1 && len(c.products) <= 1 {
		return c.flagsOf(client.SelectedKey{Key: ids[0].String()}, true), nil
	}
	by := client.SelectBy{App: c.app, Developer: c.developer}
	for _, id := range ids {
		by.Keys = append(by.Keys, id.String())
	}
	found, err := flags.find(ctx, by)
	if err != nil {
		return nil, err
	}
	for _, note := range found.Notes {
		fmt.Fprintln(c.a.stderr, "note: "+printable(note))
	}
	if len(found.Keys) == 0 {
		return nil, exitWith(exitNotFound, errors.New("no keys: nothing to "+c.action.String()))
	}
	var targets []client.Target
	for _, k := range found.Keys {
		// Among many keys, those without the product are left out. A single key is
		// named for it, and so is one that is not there at all.
		targets = append(targets, c.flagsOf(k, len(found.Keys) == 1 && !through || !k.There)...)
	}
	if len(targets) == 0 {
		return nil, exitWith(exitNotFound, fmt.Errorf("none of %s has %s", count(len(found.Keys), "key"), c.productNames()))
	}
	return targets, c.agree(ctx, found.Keys, targets)
}

func (c *statusChange) productNames() string { return strings.Join(c.products, ", ") }

// flagsOf lists the flags of one key that are asked for. all: also of products
// that are not on it.
func (c *statusChange) flagsOf(k client.SelectedKey, all bool) (targets []client.Target) {
	if len(c.products) == 0 {
		return []client.Target{{Key: k.Key}}
	}
	for _, p := range c.products {
		if all || slices.ContainsFunc(k.Products, func(r client.ProductRef) bool { return r.Product == p }) {
			targets = append(targets, client.Target{Key: k.Key, Product: p})
		}
	}
	return targets
}

// agree shows what would be changed, and asks.
func (c *statusChange) agree(ctx context.Context, keys []client.SelectedKey, targets []client.Target) error {
	apps, products := map[string]bool{}, map[string]bool{}
	already, gone := 0, 0
	byID := make(map[string]client.SelectedKey, len(keys))
	for _, k := range keys {
		byID[k.Key] = k
	}
	touched := map[string]bool{}
	for _, t := range targets {
		k := byID[t.Key]
		if !touched[k.Key] && !k.There {
			gone++
		}
		touched[k.Key] = true
		if k.App != "" {
			apps[k.App] = true
		}
		flag := k.Status
		if t.Product != "" {
			flag = ""
		}
		for _, r := range k.Products {
			switch t.Product {
			case r.Product:
				flag = r.Status
				fallthrough
			case "":
				products[r.Product] = true
			}
		}
		if t.Product != "" {
			products[t.Product] = true
		}
		if k.There && flag == c.done() {
			already++
		}
	}
	what := fmt.Sprintf("%s of %s, with %s on them", count(len(touched), "key"), count(len(apps), "app"), count(len(products), "product"))
	if len(c.products) > 0 {
		what = fmt.Sprintf("%s (%s) on %s of %s, %s", count(len(products), "product"), c.productNames(), count(len(touched), "key"), count(len(apps), "app"), count(len(targets), "flag"))
	}
	fmt.Fprintf(c.a.stderr, "%s %s; %d %s already, %d not there\n", c.action, printable(what), already, c.done(), gone)
	if len(targets) == 1 || c.yes || c.change.DryRun {
		return nil
	}
	return c.a.agree(ctx, count(len(targets), "flag")+" would change")
}

// agree asks whoever sits at the terminal.
func (a *app) agree(ctx context.Context, what string) error {
	in, ok := a.stdin.(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return exitWith(exitUsage, fmt.Errorf("%s, and there is no terminal to ask at: give --yes", what))
	}
	fmt.Fprintf(a.stderr, "Go on? [y/N] ")
	answer := bufio.NewScanner(a.input(ctx))
	if !answer.Scan() && ctx.Err() != nil {
		return ctx.Err()
	}
	if text := strings.ToLower(strings.TrimSpace(answer.Text())); text != "y" && text != "yes" {
		return exitWith(exitFailed, errors.New("not agreed to: nothing has been done"))
	}
	return nil
}

// set changes the flags, with a bar when it takes long.
func (c *statusChange) set(ctx context.Context, flags statusPlace, targets []client.Target) (statusDone, error) {
	bar := progressbar.NewOptions(len(targets),
		progressbar.OptionSetWriter(c.a.stderr), progressbar.OptionSetVisibility(isTerminal(c.a.stderr) && len(targets) > 1000),
		progressbar.OptionFullWidth(), progressbar.OptionClearOnFinish(), progressbar.OptionSetDescription(c.action.String()),
	)
	done, err := flags.set(ctx, c.action, targets, c.wait, *c.change, func(n int) { _ = bar.Set(n) })
	_ = bar.Finish()
	return done, err
}

// await waits for the receipt, and says so when that takes long.
func (c *statusChange) await(ctx context.Context, done statusDone) (*ledger.ReceiptJSON, error) {
	if isTerminal(c.a.stderr) {
		hint := time.AfterFunc(time.Second, func() {
			fmt.Fprintf(c.a.stderr, "%s at revision %d; waiting for replicas that do not answer, %v at most\n",
				c.done(), done.revision, time.Until(done.latest).Round(time.Second))
		})
		defer hint.Stop()
	}
	receipt, err := done.await(ctx)
	return &receipt, err
}

// changeAnswer is the JSON of revoke and approve, after what a receipt says.
// Stable.
type changeAnswer struct {
	Action      string   `json:"action"`
	Changed     int      `json:"changed"`
	Unchanged   int      `json:"unchanged"` // they were so already
	ByDeletion  bool     `json:"byDeletion,omitempty"`
	NoSpace     bool     `json:"noSpace,omitempty"`   // in etcd: no replica can acknowledge
	NoReceipt   bool     `json:"noReceipt,omitempty"` // though it was asked for
	Interrupted bool     `json:"interrupted,omitempty"`
	Error       string   `json:"error,omitempty"`
	Undo        []string `json:"undo"`
}

// print says what has been done. waited says why the receipt, if there is one,
// is not complete, failed why not all has been done.
func (c *statusChange) print(cfg *config.Config, args []string, done statusDone, targets int, waited, failed error) error {
	undo := c.undo(cfg, args, done)
	changed, receipt := done.changed(), done.receipt
	unregisteredBy := done.unregisteredBy.UTC().Truncate(time.Second)
	if c.output.value == "json" {
		answer := changeAnswer{
			Action: c.action.String(), Changed: changed, Unchanged: len(done.flags) - changed,
			ByDeletion: done.byDeletion, NoSpace: done.noSpace, NoReceipt: c.wait && receipt == nil,
			Interrupted: waited != nil, Undo: undo,
		}
		if failed != nil {
			answer.Error = failed.Error()
		}
		if receipt == nil {
			return printJSON(c.a.stdout, struct {
				Revision       int64     `json:"revision"`
				UnregisteredBy time.Time `json:"unregisteredBy"`
				changeAnswer
			}{done.revision, unregisteredBy, answer})
		}
		return printJSON(c.a.stdout, struct {
			ledger.ReceiptJSON
			changeAnswer
		}{*receipt, answer})
	}
	var text strings.Builder
	text.WriteString(c.summary(done, targets))
	switch {
	case receipt != nil:
		text.WriteString("; " + applied(*receipt, waited))
	case c.wait:
		text.WriteString("; no receipt, for the replicas were not asked: repeat it")
	}
	by := unregisteredBy.Format(time.RFC3339)
	refuses := [...]string{ledger.Revoke: "refuses", ledger.Approve: "has applied it, or refuses,"}[c.action]
	switch {
	case receipt != nil:
		fmt.Fprintf(&text, "\na replica that does not register %s by %s at the latest\n", refuses, by)
	case c.wait:
		fmt.Fprintf(&text, "\nevery replica %s by %s at the latest, as a rule in milliseconds\n", refuses, by)
	default:
		fmt.Fprintf(&text, "\nevery replica %s by %s at the latest, as a rule in milliseconds; --wait tells when\n", refuses, by)
	}
	if done.byDeletion {
		text.WriteString("etcd has no space left: flags were deleted instead, which refuses as well\n")
	}
	if done.noSpace {
		text.WriteString("while etcd has no space left no replica can acknowledge anything: what is known is the time\n")
	}
	if receipt != nil {
		for _, r := range receipt.NotAnswered {
			name := fmt.Sprintf("%s pid %d (%s)", r.Host, r.Pid, r.ID)
			if r.Problem != "" {
				name = "unreadable registration " + r.ID
			}
			if r.Vanished {
				name += "; its registration is gone: it has ended, or lost etcd"
			}
			fmt.Fprintf(&text, "no answer: %s\n", printable(name))
		}
		if receipt.AcknowledgementsUnread != "" {
			fmt.Fprintf(&text, "answers could not be read: %s\n", printable(receipt.AcknowledgementsUnread))
		}
	}
	for _, line := range undo {
		fmt.Fprintf(&text, "undo: %s\n", line)
	}
	if left := changed - len(c.restorable(done)); left > 0 {
		fmt.Fprintf(&text, "%s not approved before, and not in the undo: to approve would open more than was open\n", wasOrWere(left))
	}
	_, err := io.WriteString(c.a.stdout, text.String())
	return err
}

// dryRunAnswer is the JSON of revoke and approve with --dry-run. Stable.
type dryRunAnswer struct {
	DryRun    bool          `json:"dryRun"`
	Action    string        `json:"action"`
	Revision  int64         `json:"revision"`
	Changed   int           `json:"changed"`
	Unchanged int           `json:"unchanged"`
	Stops     []client.Stop `json:"stops"`
}

func (c *statusChange) printDryRun(done statusDone) error {
	changed := done.changed()
	if c.output.value == "json" {
		return printJSON(c.a.stdout, dryRunAnswer{true, c.action.String(), done.revision, changed, len(done.flags) - changed, append([]client.Stop{}, done.stops...)})
	}
	if _, err := fmt.Fprintf(c.a.stdout, "would %s %s at revision %d, %d already; %s would stop\n",
		c.action, count(changed, "flag"), done.revision, len(done.flags)-changed, count(len(done.stops), "use")); err != nil {
		return err
	}
	return c.a.printPreview(client.Done{Stops: done.stops})
}

func wasOrWere(n int) string {
	if n == 1 {
		return "1 flag was"
	}
	return fmt.Sprintf("%d flags were", n)
}

// summary is the line that everybody reads, without the replicas.
func (c *statusChange) summary(done statusDone, targets int) string {
	changed := done.changed()
	what := c.done()
	switch {
	case targets == 1 && changed == 0:
		what = "already " + what + ","
	case targets > 1:
		what += fmt.Sprintf(" %d of %d", changed, targets)
		if already := len(done.flags) - changed; already > 0 {
			what += fmt.Sprintf(" (%d already)", already)
		}
	}
	return fmt.Sprintf("%s at revision %d", what, done.revision)
}

// applied says how far it has come in the fleet.
func applied(r ledger.ReceiptJSON, waited error) string {
	if r.Replicas.Total == 0 {
		return "no replica is registered"
	}
	text := fmt.Sprintf("applied on %d/%d replicas", r.Replicas.Applied, r.Replicas.Total)
	if r.Replicas.Applied > 0 {
		text += fmt.Sprintf(", slowest %d ms", r.SlowestMs)
	}
	switch n := r.Replicas.Fenced; {
	case n == 1:
		text += "; 1 did not answer: by now it has applied it, or refuses"
	case n > 1:
		text += fmt.Sprintf("; %d did not answer: by now each has applied it, or refuses", n)
	}
	if waited != nil {
		text += ", so far"
	}
	return text
}

// count is a number with its noun.
func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
