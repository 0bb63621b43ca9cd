package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"keygate/authz"
	"keygate/client"
	"keygate/config"
)

func newCreateCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "create",
		Short:   "Create a developer, an app, a key or an API product",
		Long:    "Create a developer, an app with its first key, a further key, or an API product.\n" + whereHelp,
		GroupID: groupUse,
		Example: `  keygate create product Weather-Product --approval manual
  keygate create app MyApp --developer ann@example.com --product Weather-Product`,
	}
	parent(cmd)
	cmd.AddCommand(createDeveloperCommand(a), createAppCommand(a), createKeyCommand(a), createProductCommand(a))
	return cmd
}

// creation is what the four have in common.
type creation struct {
	a      *app
	cmd    *cobra.Command
	change *client.Change
	output *outputFormat
	file   string
	config *config.Flags
}

// wire adds the flags that all have. create makes it, and returns what to show.
func (c *creation) wire(takesFile bool, create func(ctx context.Context, api *client.Client, body json.RawMessage, args []string) (created, error)) {
	if takesFile {
		c.cmd.Flags().StringVarP(&c.file, "file", "f", "", "Apigee's JSON instead of flags: a `file`, or - for standard input")
	}
	c.change = changeFlags(c.cmd)
	c.output = outputFlag(c.cmd, "table", "json", "yaml", "name")
	c.config = config.Register(c.cmd.Flags(), managed()...)
	c.cmd.Annotations = map[string]string{holdsKeys: ""}
	c.cmd.RunE = func(cmd *cobra.Command, args []string) error {
		cfg, err := c.a.loadFor(c.config)
		if err != nil {
			return err
		}
		var body json.RawMessage
		if c.file != "" {
			if body, err = c.a.readBody(cmd.Context(), c.file); err != nil {
				return err
			}
		}
		api, release, err := c.a.manage(cmd, cfg, createAbsent, false)
		if err != nil {
			return err
		}
		defer release()
		made, err := create(cmd.Context(), api, body, args)
		if err != nil {
			return apiError(err, args...)
		}
		return c.print(made)
	}
}

// oneName wants the one argument, which a file may hold instead.
func (c *creation) oneName(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case c.file != "" && len(args) > 0:
			return usageError(cmd, "the name stands in --file: give no other")
		case c.file == "" && (len(args) != 1 || args[0] == ""):
			return usageError(cmd, "want one %s, got %d arguments", what, len(args))
		}
		return nil
	}
}

// created is what was.
type created struct {
	item
	client.Done
	key, secret string // shown this once
}

func (c *creation) print(made created) error {
	switch {
	case c.change.DryRun || c.output.value == "name":
		return c.a.printChanged(made.name, "created", *c.change, made.Done, c.output.value)
	case c.output.value != "table":
		return printDocument(c.a.stdout, made.raw, c.output.value)
	}
	if err := c.a.printChanged(made.name, "created", *c.change, made.Done, "table"); err != nil || made.key == "" {
		return err
	}
	rows := [][]string{{"consumer key", made.key}}
	if made.secret != "" {
		rows = append(rows, []string{"consumer secret", made.secret})
	}
	return printTable(c.a.stdout, rows...)
}

// maxBody of a file, in bytes.
const maxBody = 1 << 20

// readBody reads one JSON object.
func (a *app) readBody(ctx context.Context, file string) (json.RawMessage, error) {
	text, err := a.readInput(ctx, file, maxBody)
	if err != nil {
		return nil, exitWith(exitUsage, fmt.Errorf("--file: %w", err))
	}
	var object map[string]json.RawMessage
	if err := json.Unmarshal(text, &object); err != nil {
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			line := 1 + bytes.Count(text[:min(int(syntax.Offset), len(text))], []byte("\n"))
			return nil, exitWith(exitUsage, fmt.Errorf("--file: line %d: %w", line, err))
		}
		return nil, exitWith(exitUsage, errors.New("--file: want one JSON object"))
	}
	return text, nil
}

// readInput reads a file, or standard input for -, of at most limit bytes.
func (a *app) readInput(ctx context.Context, file string, limit int64) ([]byte, error) {
	var input io.Reader
	if file == "-" {
		input = a.input(ctx)
	} else {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		input = f
	}
	text, err := io.ReadAll(io.LimitReader(input, limit+1))
	if err == nil && int64(len(text)) > limit {
		err = fmt.Errorf("more than %d bytes", limit)
	}
	return text, err
}

// readSecret reads the one line of a file, or of standard input for -.
func (a *app) readSecret(ctx context.Context, flag, file string) (client.Secret, error) {
	text, err := a.readInput(ctx, file, authz.MaxKeyLength+2)
	if err != nil {
		return "", exitWith(exitUsage, fmt.Errorf("--%s: %w", flag, err))
	}
	line := strings.TrimSuffix(strings.TrimSuffix(string(text), "\n"), "\r")
	if line == "" || strings.ContainsAny(line, "\r\n") {
		return "", exitWith(exitUsage, fmt.Errorf("--%s: want one line", flag))
	}
	return client.Secret(line), nil
}

// attributesFlag adds --attribute.
func attributesFlag(cmd *cobra.Command) *[]string {
	return cmd.Flags().StringArray("attribute", nil, "a custom attribute, as `name=value`; may be given more than once")
}

func parseAttributes(cmd *cobra.Command, given []string) (attributes []client.Attribute, err error) {
	for _, g := range given {
		name, value, ok := strings.Cut(g, "=")
		if !ok || name == "" {
			return nil, usageError(cmd, "--attribute: want name=value")
		}
		attributes = append(attributes, client.Attribute{Name: name, Value: value})
	}
	return attributes, nil
}

func createDeveloperCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "developer E-MAIL", Aliases: []string{"developers", "dev"}, Short: "Create a developer, who is active",
		Example: `  keygate create developer ann@example.com --first-name Ann --last-name Lee
  keygate create developer -f developer.json --server https://keygate.example`,
	}
	first := cmd.Flags().String("first-name", "", "`name`")
	last := cmd.Flags().String("last-name", "", "`name`")
	user := cmd.Flags().String("user-name", "", "`name` (default the e-mail address)")
	given := attributesFlag(cmd)
	c := &creation{a: a, cmd: cmd}
	cmd.Args = c.oneName("e-mail address")
	c.wire(true, func(ctx context.Context, api *client.Client, body json.RawMessage, args []string) (created, error) {
		var spec any = body
		name := "developer in " + c.file
		if body == nil {
			attributes, err := parseAttributes(cmd, *given)
			if err != nil {
				return created{}, err
			}
			d := client.Developer{Email: args[0], FirstName: *first, LastName: *last, UserName: *user, Attributes: attributes}
			if d.UserName == "" {
				d.UserName = d.Email
			}
			spec, name = d, "developer/"+d.Email
		}
		d, done, err := api.CreateDeveloper(ctx, spec, *c.change)
		made := created{item: developerItem(d), Done: done}
		if c.change.DryRun {
			made.name = name
		}
		return made, err
	})
	return cmd
}

func createAppCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "app NAME --developer D", Aliases: []string{"apps"}, Short: "Create an app, with its first key",
		Long: `Create an app for a developer, with its first consumer key, which is approved
for the products, or pending for those that are approved by hand. The key and
its secret are shown; without a sealing key this is the only time.`,
		Example: `  keygate create app MyApp --developer ann@example.com --product Weather-Product
  keygate create app -f app.json --developer ann@example.com -o json`,
	}
	developer := cmd.Flags().String("developer", "", "whose app, by e-mail `address` or id")
	products := cmd.Flags().StringArray("product", nil, "API `product` on its key; may be given more than once")
	expires := cmd.Flags().Duration("key-expires-in", 0, "`duration` until its key expires, such as 2160h (default never)")
	callback := cmd.Flags().String("callback-url", "", "`url`")
	scopes := cmd.Flags().StringArray("scope", nil, "OAuth `scope`; may be given more than once")
	given := attributesFlag(cmd)
	c := &creation{a: a, cmd: cmd}
	name := c.oneName("name")
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		switch {
		case *developer == "":
			return usageError(cmd, "no --developer")
		case *expires < 0:
			return usageError(cmd, "--key-expires-in: want a duration such as 2160h")
		}
		return name(cmd, args)
	}
	c.wire(true, func(ctx context.Context, api *client.Client, body json.RawMessage, args []string) (created, error) {
		var spec any = body
		name := "app in " + c.file
		if body == nil {
			attributes, err := parseAttributes(cmd, *given)
			if err != nil {
				return created{}, err
			}
			spec, name = client.AppSpec{
				Name: args[0], Products: *products, CallbackURL: *callback, Scopes: *scopes, Attributes: attributes, KeyExpiresIn: *expires,
			}, "app/"+args[0]
		}
		app, done, err := api.CreateApp(ctx, *developer, spec, *c.change)
		if err != nil || c.change.DryRun {
			return created{item: item{name: name}, Done: done}, apiError(err, *developer)
		}
		return withKey(appItem(app), app, done), nil
	})
	return cmd
}

// withKey shows the newest key of an app beside what was created.
func withKey(i item, a client.App, done client.Done) created {
	made := created{item: i, Done: done}
	if len(a.Credentials) > 0 {
		made.key, made.secret = a.Credentials[0].ConsumerKey, a.Credentials[0].ConsumerSecret
	}
	return made
}

func createKeyCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "key --developer D --app A", Aliases: []string{"keys"}, Short: "Give an app one more key",
		Long: `Give an app one more consumer key, made by keygate and shown, or with --key-file
one of your own. A key of your own has no products yet: those of --product are
added by a second change.

A consumer key or secret is never an argument, where others can see it (ps,
shell history).`,
		Example: `  keygate create key --developer ann@example.com --app MyApp --product Weather
  keygate create key --developer ann@example.com --app MyApp --key-file key.txt`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError(cmd, "create key takes no arguments, got %d. If one is a consumer key, others may have seen it (ps, shell history): "+
					"give --key-file - and the key on standard input", len(args))
			}
			return nil
		},
	}
	developer := cmd.Flags().String("developer", "", "whose app, by e-mail `address` or id")
	app := cmd.Flags().String("app", "", "the app's `name`")
	keyFile := cmd.Flags().String("key-file", "", "a consumer key of your own: `file`, or - for standard input")
	secretFile := cmd.Flags().String("secret-file", "", "its secret: `file`, or - for standard input (default keygate makes one)")
	products := cmd.Flags().StringArray("product", nil, "API `product` on it; may be given more than once")
	expires := cmd.Flags().Duration("expires-in", 0, "`duration` until it expires, such as 2160h (default never)")
	c := &creation{a: a, cmd: cmd}
	c.wire(false, func(ctx context.Context, api *client.Client, _ json.RawMessage, _ []string) (created, error) {
		switch {
		case *developer == "" || *app == "":
			return created{}, usageError(cmd, "no --developer or no --app")
		case *secretFile != "" && *keyFile == "":
			return created{}, usageError(cmd, "--secret-file is given without --key-file")
		case *secretFile == "-" && *keyFile == "-":
			return created{}, usageError(cmd, "standard input can be read once: give a file for one of the two")
		case *expires < 0:
			return created{}, usageError(cmd, "--expires-in: want a duration such as 2160h")
		}
		made, err := c.key(ctx, api, *developer, *app, *keyFile, *secretFile, *products, *expires)
		return made, apiError(err, *developer, *app)
	})
	return cmd
}

func (c *creation) key(ctx context.Context, api *client.Client, developer, app, keyFile, secretFile string, products []string, expires time.Duration) (created, error) {
	if keyFile == "" {
		// The call that makes a key replaces what the app says of itself: so it is
		// said again, as of this ETag.
		now, err := api.DeveloperApp(ctx, developer, app)
		if err != nil {
			return created{}, err
		}
		ch := *c.change
		ch.IfMatch = now.ETag
		spec := client.AppSpec{Products: products, CallbackURL: now.CallbackURL, Scopes: now.Scopes, Attributes: now.Attributes, KeyExpiresIn: expires}
		a, done, err := api.AddKey(ctx, developer, app, spec, ch)
		if err != nil || ch.DryRun || len(a.Credentials) == 0 {
			return created{item: item{name: "key of app/" + app}, Done: done}, err
		}
		k := listedKey(a, a.Credentials[0])
		return withKey(item{name: "key/" + k.ID, raw: a.Credentials[0].Raw}, a, done), nil
	}
	key, err := c.a.readSecret(ctx, "key-file", keyFile)
	if err != nil {
		return created{}, err
	}
	id, err := keyID(key.Reveal())
	if err != nil {
		return created{}, exitWith(exitUsage, fmt.Errorf("--key-file: %w", err))
	}
	secret := client.Secret(authz.NewSecret())
	if secretFile != "" {
		if secret, err = c.a.readSecret(ctx, "secret-file", secretFile); err != nil {
			return created{}, err
		}
	}
	made := created{item: item{name: "key/" + id.String()}}
	k, done, err := api.CreateKey(ctx, developer, app, client.KeySpec{Key: key, Secret: secret, ExpiresIn: expires}, *c.change)
	made.raw, made.Done, made.key, made.secret = k.Raw, done, k.ConsumerKey, k.ConsumerSecret
	if err != nil || c.change.DryRun || len(products) == 0 {
		return made, err
	}
	with, done, err := api.AddProducts(ctx, developer, app, id, products, nil, *c.change)
	if err != nil {
		return made, fmt.Errorf("the key is there, and has no products yet: %w", err)
	}
	if made.Done = done; with.ConsumerKey == made.key {
		made.raw = with.Raw
	}
	return made, nil
}

func createProductCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "product NAME", Aliases: []string{"products", "apiproduct"}, Short: "Create an API product",
		Long: `Create an API product. With --approval manual it is pending on every key until
somebody approves it there.`,
		Example: `  keygate create product Weather-Product --display-name Weather
  keygate create product -f product.json -o json`,
	}
	display := cmd.Flags().String("display-name", "", "`name` for people (default NAME)")
	description := cmd.Flags().String("description", "", "`text`")
	approval := &outputFormat{"auto", []string{"auto", "manual"}}
	cmd.Flags().Var(approval, "approval", "how it is approved on a key, auto or manual")
	proxies := cmd.Flags().StringArray("proxy", nil, "API `proxy`; may be given more than once")
	environments := cmd.Flags().StringArray("environment", nil, "`environment`; may be given more than once")
	resources := cmd.Flags().StringArray("resource", nil, "`path` such as /weather/**; may be given more than once")
	scopes := cmd.Flags().StringArray("scope", nil, "OAuth `scope`; may be given more than once")
	given := attributesFlag(cmd)
	c := &creation{a: a, cmd: cmd}
	cmd.Args = c.oneName("name")
	c.wire(true, func(ctx context.Context, api *client.Client, body json.RawMessage, args []string) (created, error) {
		var spec any = body
		name := "product in " + c.file
		if body == nil {
			attributes, err := parseAttributes(cmd, *given)
			if err != nil {
				return created{}, err
			}
			p := client.Product{
				Name: args[0], DisplayName: *display, Description: *description, ApprovalType: approval.value,
				Proxies: *proxies, Environments: *environments, Resources: *resources, Scopes: *scopes, Attributes: attributes,
			}
			if p.DisplayName == "" {
				p.DisplayName = p.Name
			}
			spec, name = p, "product/"+p.Name
		}
		p, done, err := api.CreateProduct(ctx, spec, *c.change)
		made := created{item: productItem(p), Done: done}
		if c.change.DryRun {
			made.name = name
		}
		return made, err
	})
	return cmd
}
