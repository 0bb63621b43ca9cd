package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"keygate/authz"
	"keygate/client"
	"keygate/config"
)

// whereHelp says of every command of the management where it works.
const whereHelp = `
It asks the management API of --server, with the token of --token-file or of
KEYGATE_TOKEN in the environment; or works on the etcd that --data-dir or
--etcd-endpoints names, without a server; or else asks the keygate that serves
the data directory of this machine, by its admin token.`

func newGetCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "get",
		Short:   "List developers, apps, keys or API products",
		Long:    "List developers, apps, keys or API products, or show those that are named.\n" + whereHelp,
		GroupID: groupUse,
		Example: `  keygate get apps --org acme
  keygate get keys --status pending -o json`,
	}
	parent(cmd)
	for _, n := range nouns {
		cmd.AddCommand(getCommand(a, n))
	}
	return cmd
}

// examples of get and describe.
var getExamples = map[string]string{
	"developer": `  keygate get developers --org acme
  keygate get developer ann@example.com -o yaml`,
	"app": `  keygate get apps --developer ann@example.com
  keygate get app 6ed3a4d1-4733-439a-80a4-0d71149ec9ad -o json`,
	"key": `  keygate get keys --expiring-within 720h
  printf %s "$KEY" | keygate get key -`,
	"product": `  keygate get products
  keygate get product Weather-Product -o json`,
}

var describeExamples = map[string]string{
	"developer": `  keygate describe developer ann@example.com
  keygate describe developer Z2S37rxX2Suzkwtg --org acme`,
	"app": `  keygate describe app AnotherTestApp --developer ann@example.com
  keygate describe app 6ed3a4d1-4733-439a-80a4-0d71149ec9ad`,
	"key": `  printf %s "$KEY" | keygate describe key -
  keygate describe key $(printf %s "$KEY" | keygate key-id -) --org acme`,
	"product": `  keygate describe product Weather-Product
  keygate describe product Weather-Product --server https://keygate.example`,
}

func getCommand(a *app, n noun) *cobra.Command {
	cmd := n.command("["+n.argument+"...]", n.plural, "List "+n.plural+", or show those that are named")
	if n.singular == "key" {
		cmd.Long = "List keys, or show those that are named by their ids (keygate key-id prints\nthem), or with - the one key on standard input."
	}
	cmd.Example = getExamples[n.singular]
	var f nounFlags
	if n.listFlags != nil {
		n.listFlags(cmd.Flags(), &f)
	}
	output := outputFlag(cmd, "table", "json", "yaml", "name")
	noHeaders := cmd.Flags().Bool("no-headers", false, "no header in the table")
	revealFlag(cmd, &f)
	flags := config.Register(cmd.Flags(), managed()...)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		cfg, err := a.loadFor(flags)
		if err != nil {
			return err
		}
		if err := f.check(cmd, n, args); err != nil {
			return err
		}
		if args, err = a.keyArguments(cmd, n, args); err != nil {
			return err
		}
		c, release, err := a.manage(cmd, cfg, refuseAbsent, f.reveal)
		if err != nil {
			return err
		}
		defer release()
		all := n.list(cmd.Context(), c, &f)
		if len(args) > 0 {
			all = named(cmd.Context(), c, n, &f, args)
		}
		p := listPrinter{noun: n, format: output.value, single: len(args) == 1, headers: !*noHeaders}
		return apiError(p.print(a, all), append(args, f.developer, f.app)...)
	}
	return cmd
}

// command begins one of a noun's commands.
func (n noun) command(arguments, name, short string) *cobra.Command {
	cmd := &cobra.Command{
		Use: strings.TrimSpace(name + " " + arguments), Short: short,
		Annotations: map[string]string{holdsKeys: ""}, // a key lands anywhere by mistake
	}
	for _, other := range append([]string{n.plural, n.singular}, n.aliases...) {
		if other != name {
			cmd.Aliases = append(cmd.Aliases, other)
		}
	}
	return cmd
}

// check tells what does not go together.
func (f *nounFlags) check(cmd *cobra.Command, n noun, args []string) error {
	if n.singular != "key" {
		return nil
	}
	ways := 0
	for _, given := range []bool{len(args) > 0, f.app != "", f.status != "", f.expired, f.expiring != 0} {
		if given {
			ways++
		}
	}
	switch {
	case ways > 1:
		return usageError(cmd, "give key ids, --app, --status, --expired or --expiring-within: one of them")
	case f.developer != "" && f.app == "":
		return usageError(cmd, "--developer is given without --app")
	case f.expiring < 0:
		return usageError(cmd, "--expiring-within: want a duration such as 720h")
	}
	return nil
}

func revealFlag(cmd *cobra.Command, f *nounFlags) {
	cmd.Flags().BoolVar(&f.reveal, "reveal", false, "show consumer keys and secrets that are kept; it is audited")
}

// named gets what arguments name.
func named(ctx context.Context, c *client.Client, n noun, f *nounFlags, args []string) iter.Seq2[item, error] {
	return func(yield func(item, error) bool) {
		for _, arg := range args {
			i, err := n.get(ctx, c, f, arg)
			if !yield(i, err) || err != nil {
				return
			}
		}
	}
}

// keyArguments checks the names of a noun. Those of keys are ids, or - for the
// one key on standard input. No error shows an argument: it may be a consumer
// key.
func (a *app) keyArguments(cmd *cobra.Command, n noun, args []string) ([]string, error) {
	if n.singular != "key" {
		if slices.Contains(args, "") {
			return nil, usageError(cmd, "the name of %s is empty", n.plural)
		}
		return args, nil
	}
	if slices.Contains(args, "-") {
		if len(args) > 1 {
			return nil, usageError(cmd, "- stands for one key, and alone")
		}
		id, err := a.readKeyID(cmd.Context())
		return []string{id.String()}, err
	}
	for i, arg := range args {
		if _, err := authz.ParseKeyID(arg); err != nil {
			return nil, notKeyID(cmd, i)
		}
	}
	return args, nil
}

// notKeyID refuses the argument at an index.
func notKeyID(cmd *cobra.Command, i int) error {
	return usageError(cmd, "argument %d is not a key id of 64 lower-case hex digits. If it is a consumer key, others may have seen it (ps, shell history): "+
		"give - and the key on standard input, or its id, which keygate key-id prints", i+1)
}

// readKeyID returns the id of the one key on standard input.
func (a *app) readKeyID(ctx context.Context) (authz.KeyID, error) {
	text, err := a.readKey(ctx)
	if err != nil {
		return authz.KeyID{}, err
	}
	id, err := keyID(text)
	if err != nil {
		return authz.KeyID{}, exitWith(exitUsage, fmt.Errorf("standard input: %w", err))
	}
	return id, nil
}

func newDescribeCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "describe",
		Short:   "Show all that is known of a developer, app, key or product",
		Long:    "Show all that is known of developers, apps, keys or API products.\n" + whereHelp,
		GroupID: groupUse,
		Example: `  keygate describe app AnotherTestApp --developer ann@example.com
  printf %s "$KEY" | keygate describe key -`,
	}
	parent(cmd)
	for _, n := range nouns {
		cmd.AddCommand(describeCommand(a, n))
	}
	return cmd
}

func describeCommand(a *app, n noun) *cobra.Command {
	argument := n.argument + "..."
	if n.singular == "key" {
		argument += " | -"
	}
	cmd := n.command(argument, n.singular, "Show all that is known of "+n.plural)
	cmd.Example = describeExamples[n.singular]
	var f nounFlags
	if n.pathFlags != nil {
		n.pathFlags(cmd.Flags(), &f)
	}
	output := outputFlag(cmd, "table", "json", "yaml")
	revealFlag(cmd, &f)
	flags := config.Register(cmd.Flags(), managed()...)
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usageError(cmd, "name at least one %s", n.singular)
		}
		return nil
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		cfg, err := a.loadFor(flags)
		if err != nil {
			return err
		}
		if args, err = a.keyArguments(cmd, n, args); err != nil {
			return err
		}
		c, release, err := a.manage(cmd, cfg, refuseAbsent, f.reveal)
		if err != nil {
			return err
		}
		defer release()
		all := named(cmd.Context(), c, n, &f, args)
		if output.value == "table" {
			err = describe(a.stdout, all)
		} else {
			p := listPrinter{noun: n, format: output.value, single: len(args) == 1}
			err = p.print(a, all)
		}
		return apiError(err, append(args, f.developer)...)
	}
	return cmd
}

func describe(w io.Writer, all iter.Seq2[item, error]) error {
	first := true
	for i, err := range all {
		if err != nil {
			return err
		}
		if !first {
			fmt.Fprintln(w)
		}
		first = false
		if err := printTable(w, i.details...); err != nil {
			return err
		}
	}
	return nil
}

// listPrinter writes items in a format.
type listPrinter struct {
	noun    noun
	format  string
	single  bool // one object in JSON, not a list
	headers bool
}

// print writes all items. What came before an error is written too, but for a
// table.
func (p listPrinter) print(a *app, all iter.Seq2[item, error]) error {
	progress := a.counter("reading " + p.noun.plural)
	defer func() { _ = progress.Finish() }()
	var rows [][]string
	if p.headers {
		rows = append(rows, slices.Clone(p.noun.header))
	}
	var objects []json.RawMessage
	for i, err := range all {
		if err != nil {
			return err
		}
		_ = progress.Add(1)
		switch p.format {
		case "name":
			if _, err := fmt.Fprintln(a.stdout, printable(i.name)); err != nil {
				return err
			}
		case "table":
			rows = append(rows, i.row)
		default:
			objects = append(objects, i.raw)
		}
	}
	_ = progress.Finish()
	switch {
	case p.format == "name":
		return nil
	case p.format == "table":
		if len(rows) == 0 || p.headers && len(rows) == 1 {
			fmt.Fprintf(a.stderr, "no %s\n", p.noun.plural)
			return nil
		}
		return printTable(a.stdout, rows...)
	case p.single:
		return printDocument(a.stdout, objects[0], p.format)
	case objects == nil:
		objects = []json.RawMessage{}
	}
	list, err := json.Marshal(map[string][]json.RawMessage{p.noun.member: objects})
	if err != nil {
		return err
	}
	return printDocument(a.stdout, list, p.format)
}

// counter shows on a terminal that something goes on.
func (a *app) counter(what string) *progressbar.ProgressBar {
	return progressbar.NewOptions(-1,
		progressbar.OptionSetDescription(what), progressbar.OptionSetWriter(a.stderr),
		progressbar.OptionSetVisibility(isTerminal(a.stderr) && !isTerminal(a.stdout)),
		progressbar.OptionShowCount(), progressbar.OptionClearOnFinish(),
	)
}
