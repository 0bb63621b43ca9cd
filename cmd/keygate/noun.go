package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"keygate/authz"
	"keygate/client"
)

// noun is something that is managed: what get, describe and delete know of it.
type noun struct {
	singular, plural string
	aliases          []string // besides the singular
	member           string   // of a list's JSON
	argument         string   // in the usage line
	header           []string
	// may be nil: only describe and get have flags of their own.
	listFlags func(*pflag.FlagSet, *nounFlags)
	pathFlags func(*pflag.FlagSet, *nounFlags)
	list      func(context.Context, *client.Client, *nounFlags) iter.Seq2[item, error]
	get       func(context.Context, *client.Client, *nounFlags, string) (item, error)
	remove    func(context.Context, *client.Client, *nounFlags, string, client.Change) (string, client.Done, error)
}

// nounFlags are those that lead to a noun.
type nounFlags struct {
	developer, app string
	status         string
	expired        bool
	expiring       time.Duration
	reveal         bool
}

// item is one of a noun's.
type item struct {
	name    string          // kind/name, for -o name
	raw     json.RawMessage // as the API renders it
	row     []string        // under the noun's header
	details [][]string      // for describe
}

// nouns in the order of the help.
var nouns = []noun{developerNoun, appNoun, keyNoun, productNoun}

func developerFlag(fs *pflag.FlagSet, f *nounFlags) {
	fs.StringVar(&f.developer, "developer", "", "the app's developer, by e-mail `address` or id; the app is then its name")
}

var developerNoun = noun{
	singular: "developer", plural: "developers", aliases: []string{"dev", "devs"}, member: "developer", argument: "DEVELOPER",
	header: []string{"E-MAIL", "NAME", "STATUS", "CREATED", "ID"},
	list: func(ctx context.Context, c *client.Client, _ *nounFlags) iter.Seq2[item, error] {
		return each(c.Developers(ctx), developerItem)
	},
	get: func(ctx context.Context, c *client.Client, _ *nounFlags, name string) (item, error) {
		d, err := c.Developer(ctx, name)
		return developerItem(d), err
	},
	remove: func(ctx context.Context, c *client.Client, _ *nounFlags, name string, ch client.Change) (string, client.Done, error) {
		d, done, err := c.DeleteDeveloper(ctx, name, ch)
		return developerItem(d).name, done, err
	},
}

func developerItem(d client.Developer) item {
	name := d.Email
	if name == "" {
		name = d.ID
	}
	full := strings.TrimSpace(d.FirstName + " " + d.LastName)
	return item{
		name: "developer/" + name, raw: d.Raw,
		row: []string{dash(d.Email), dash(full), dash(d.Status), date(d.CreatedAt), d.ID},
		details: append([][]string{
			{"e-mail", dash(d.Email)}, {"id", d.ID}, {"name", dash(full)}, {"user name", dash(d.UserName)}, {"status", dash(d.Status)},
			{"apps", dash(strings.Join(d.Apps, ", "))}, {"created", moment(d.CreatedAt)}, {"modified", moment(d.LastModifiedAt)},
		}, attributeRows(d.Attributes)...),
	}
}

var appNoun = noun{
	singular: "app", plural: "apps", member: "app", argument: "APPID",
	header:    []string{"NAME", "STATUS", "DEVELOPER", "KEYS", "CREATED", "ID"},
	listFlags: developerFlag, pathFlags: developerFlag,
	list: func(ctx context.Context, c *client.Client, f *nounFlags) iter.Seq2[item, error] {
		if f.developer != "" {
			return each(c.DeveloperApps(ctx, f.developer), appItem)
		}
		return each(c.Apps(ctx), appItem)
	},
	get: func(ctx context.Context, c *client.Client, f *nounFlags, name string) (item, error) {
		a, err := findApp(ctx, c, f.developer, name)
		return appItem(a), err
	},
	remove: func(ctx context.Context, c *client.Client, f *nounFlags, name string, ch client.Change) (string, client.Done, error) {
		a, err := findApp(ctx, c, f.developer, name)
		if err != nil {
			return "", client.Done{}, err
		}
		_, done, err := c.DeleteApp(ctx, a.DeveloperID, a.Name, ch)
		return appItem(a).name, done, err
	},
}

// findApp by its name under a developer, or by its id.
func findApp(ctx context.Context, c *client.Client, developer, app string) (client.App, error) {
	if developer != "" {
		return c.DeveloperApp(ctx, developer, app)
	}
	return c.App(ctx, app)
}

func appItem(a client.App) item {
	developer := a.DeveloperEmail
	if developer == "" {
		developer = a.DeveloperID
	}
	details := [][]string{
		{"name", a.Name}, {"id", a.ID}, {"developer", dash(developer)}, {"status", dash(a.Status)}, {"callback", dash(a.CallbackURL)},
		{"created", moment(a.CreatedAt)}, {"modified", moment(a.LastModifiedAt)},
	}
	details = append(details, attributeRows(a.Attributes)...)
	for _, cred := range a.Credentials {
		k := listedKey(a, cred)
		details = append(details, []string{"key", k.ID}, []string{"", strings.Join([]string{dash(k.Status), "expires " + expiry(k.ExpiresAt), dash(products(k.Products))}, ", ")})
		details = append(details, revealedRows(cred)...)
	}
	return item{
		name: "app/" + a.ID, raw: a.Raw, details: details,
		row: []string{a.Name, dash(a.Status), dash(developer), fmt.Sprint(len(a.Credentials)), date(a.CreatedAt), a.ID},
	}
}

// revealedRows show a key and its secret that somebody has asked for.
func revealedRows(c client.Credential) (rows [][]string) {
	if c.ConsumerKey != "" && !strings.HasPrefix(c.ConsumerKey, hashed) {
		rows = append(rows, []string{"consumer key", c.ConsumerKey})
	}
	if c.ConsumerSecret != "" {
		rows = append(rows, []string{"consumer secret", c.ConsumerSecret})
	}
	return rows
}

var keyNoun = noun{
	singular: "key", plural: "keys", member: "keys", argument: "KEYID",
	header: []string{"APP", "STATUS", "EXPIRES", "PRODUCTS", "ENDS IN", "ID"},
	listFlags: func(fs *pflag.FlagSet, f *nounFlags) {
		fs.StringVar(&f.app, "app", "", "keys of one app, by its `id`, or its name with --developer")
		developerFlag(fs, f)
		fs.StringVar(&f.status, "status", "", "keys with this `status`; pending also finds a product that is pending on one")
		fs.BoolVar(&f.expired, "expired", false, "keys that have expired")
		fs.DurationVar(&f.expiring, "expiring-within", 0, "keys that expire within this `duration`, such as 720h")
	},
	list: func(ctx context.Context, c *client.Client, f *nounFlags) iter.Seq2[item, error] {
		if f.app == "" {
			return each(c.Keys(ctx, client.KeyQuery{Status: f.status, Expired: f.expired, ExpiringWithin: f.expiring}), keyItem)
		}
		return func(yield func(item, error) bool) {
			a, err := findApp(ctx, c, f.developer, f.app)
			if err != nil {
				yield(item{}, err)
				return
			}
			for _, cred := range a.Credentials {
				if !yield(keyItem(listedKey(a, cred)), nil) {
					return
				}
			}
		}
	},
	get: func(ctx context.Context, c *client.Client, f *nounFlags, key string) (item, error) {
		id, err := authz.ParseKeyID(key)
		if err != nil {
			return item{}, err
		}
		found, err := c.FindKey(ctx, id)
		if err == nil && f.reveal {
			found.Key, err = c.Key(ctx, found.App.DeveloperID, found.App.Name, id)
		}
		if err != nil {
			return item{}, err
		}
		i := keyItem(listedKey(found.App, found.Key))
		i.details = append(i.details, attributeRows(found.Key.Attributes)...)
		i.details = append(i.details, revealedRows(found.Key)...)
		return i, nil
	},
	remove: func(ctx context.Context, c *client.Client, _ *nounFlags, key string, ch client.Change) (string, client.Done, error) {
		id, err := authz.ParseKeyID(key)
		if err != nil {
			return "", client.Done{}, err
		}
		found, err := c.FindKey(ctx, id)
		if err != nil {
			return "", client.Done{}, err
		}
		_, done, err := c.DeleteKey(ctx, found.App.DeveloperID, found.App.Name, id, ch)
		return "key/" + key, done, err
	},
}

// hashed begins the name of a key that is not shown.
const hashed = "sha256:"

// listedKey is a credential of an app as a list of keys has it.
func listedKey(a client.App, c client.Credential) client.ListedKey {
	k := client.ListedKey{
		AppID: a.ID, AppName: a.Name, DeveloperID: a.DeveloperID, DeveloperEmail: a.DeveloperEmail,
		Status: c.Status, ExpiresAt: c.ExpiresAt, Products: c.Products,
	}
	id, isHash := strings.CutPrefix(c.ConsumerKey, hashed)
	if !isHash {
		key, _ := authz.ParseConsumerKey(c.ConsumerKey) // it is a key: somebody holds it
		id = key.ID().String()
	}
	k.ID = id
	return k
}

func keyItem(k client.ListedKey) item {
	raw, err := json.Marshal(k)
	if err != nil { // it has only strings and numbers
		panic("keygate: " + err.Error())
	}
	app := k.AppName
	if app == "" {
		app = k.AppID
	}
	details := [][]string{
		{"id", k.ID}, {"status", dash(k.Status)}, {"expires", expiry(k.ExpiresAt)}, {"ends in", dash(k.Hint)},
		{"app", fmt.Sprintf("%s (%s)", app, k.AppID)}, {"developer", dash(strings.TrimSpace(k.DeveloperEmail + " " + k.DeveloperID))},
	}
	for _, p := range k.Products {
		details = append(details, []string{"product", p.Product + ", " + dash(p.Status)})
	}
	return item{
		name: "key/" + k.ID, raw: raw, details: details,
		row: []string{app, dash(k.Status), expiry(k.ExpiresAt), dash(products(k.Products)), dash(k.Hint), k.ID},
	}
}

// products on a key; the status of one that is not approved stands behind it.
func products(refs []client.ProductRef) string {
	var names []string
	for _, r := range refs {
		name := r.Product
		if r.Status != authz.StatusApproved.String() {
			name += " (" + dash(r.Status) + ")"
		}
		names = append(names, name)
	}
	return strings.Join(names, ", ")
}

var productNoun = noun{
	singular: "product", plural: "products", aliases: []string{"apiproduct", "apiproducts"}, member: "apiProduct", argument: "PRODUCT",
	header: []string{"NAME", "DISPLAY NAME", "APPROVAL", "PROXIES", "CREATED"},
	list: func(ctx context.Context, c *client.Client, _ *nounFlags) iter.Seq2[item, error] {
		return each(c.Products(ctx), productItem)
	},
	get: func(ctx context.Context, c *client.Client, _ *nounFlags, name string) (item, error) {
		p, err := c.Product(ctx, name)
		return productItem(p), err
	},
	remove: func(ctx context.Context, c *client.Client, _ *nounFlags, name string, ch client.Change) (string, client.Done, error) {
		p, done, err := c.DeleteProduct(ctx, name, ch)
		return productItem(p).name, done, err
	},
}

func productItem(p client.Product) item {
	list := func(words []string) string { return dash(strings.Join(words, ", ")) }
	return item{
		name: "product/" + p.Name, raw: p.Raw,
		row: []string{p.Name, dash(p.DisplayName), dash(p.ApprovalType), list(p.Proxies), date(p.CreatedAt)},
		details: append([][]string{
			{"name", p.Name}, {"display name", dash(p.DisplayName)}, {"description", dash(p.Description)}, {"approval", dash(p.ApprovalType)},
			{"proxies", list(p.Proxies)}, {"environments", list(p.Environments)}, {"resources", list(p.Resources)}, {"scopes", list(p.Scopes)},
			{"created", moment(p.CreatedAt)}, {"modified", moment(p.LastModifiedAt)},
		}, attributeRows(p.Attributes)...),
	}
}

func attributeRows(attributes []client.Attribute) (rows [][]string) {
	for _, a := range attributes {
		rows = append(rows, []string{"attribute", a.Name + " = " + a.Value})
	}
	return rows
}

// each maps a sequence; it ends with the first error.
func each[T any](all iter.Seq2[T, error], f func(T) item) iter.Seq2[item, error] {
	return func(yield func(item, error) bool) {
		for v, err := range all {
			if err != nil {
				yield(item{}, err)
				return
			}
			if !yield(f(v), nil) {
				return
			}
		}
	}
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func date(m client.Millis) string {
	if m.Time().IsZero() {
		return "-"
	}
	return m.Time().Format(time.DateOnly)
}

func moment(m client.Millis) string {
	if m.Time().IsZero() {
		return "-"
	}
	return m.Time().Format(time.RFC3339)
}

func expiry(m client.Millis) string {
	if m.Time().IsZero() {
		return "never"
	}
	return moment(m)
}

// apiError gives a refusal by the API its exit code. args are what the command
// line named: one that may be a consumer key is not repeated.
func apiError(err error, args ...string) error {
	var refusal *client.Error
	if !errors.As(err, &refusal) {
		return err
	}
	text := err.Error()
	if refusal.RequestID != "" && refusal.Status >= 500 {
		text += " (request " + refusal.RequestID + ")"
	}
	for _, arg := range args {
		if len(arg) < 16 || !strings.Contains(text, arg) {
			continue
		}
		if _, reason := authz.ParseConsumerKey(arg); reason == authz.Allowed {
			text = strings.ReplaceAll(text, arg, hint(arg)) +
				"; if that was a consumer key, others may have seen it (ps, shell history): give - and the key on standard input"
		}
	}
	return exitWith(clientExit(refusal), errors.New(printable(text)))
}
