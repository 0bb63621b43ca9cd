package management

import (
	"net/http"
	"strings"
	"time"

	"keygate/apigee"
	"keygate/authz"
	"keygate/catalog"
	"keygate/ledger"
	"keygate/statestore/keyspace"
)

// renderKey shows a credential that the path names by its key or id.
func (c *call) renderKey(k ledger.Credential) []byte {
	c.presented(&k, c.params["key"])
	return c.edition.Credential(shownCredential(k))
}

func (c *call) renderNewKey(k ledger.Credential) []byte {
	return c.edition.NewCredential(shownCredential(k))
}

func (c *call) getKey() (answer, error) {
	k, err := c.cfg.Ledger.Key(c.ctx, c.org, c.developer(), c.params["app"], c.params["key"])
	if err != nil {
		return answer{}, err
	}
	if err := c.reveal([]*ledger.Credential{&k}); err != nil {
		return answer{}, err
	}
	return answer{body: c.edition.Credential(shownCredential(k)), etag: k.Revision}, nil
}

func keySpec(b apigee.KeyBody) ledger.KeySpec {
	return ledger.KeySpec{
		Key: b.Key, Secret: b.Secret, ExpiresIn: b.ExpiresIn, Products: b.Products,
		Attributes: b.Attributes, HasAttributes: b.HasAttributes, Scopes: b.Scopes, HasScopes: b.HasScopes,
	}
}

func (c *call) createKey() (answer, error) {
	b, err := apigee.ParseNewKey(c.body)
	if err != nil {
		return answer{}, err
	}
	return change(c, http.StatusCreated, c.renderNewKey, func(by ledger.By) (ledger.Credential, ledger.Done, error) {
		return c.cfg.Ledger.CreateKey(c.ctx, by, c.org, c.developer(), c.params["app"], keySpec(b))
	})
}

func (c *call) updateKey() (answer, error) {
	b, err := apigee.ParseKey(c.body)
	if err != nil {
		return answer{}, err
	}
	key := c.params["key"]
	if _, reason := authz.ParseConsumerKey(key); reason == authz.Allowed && len(key) >= catalog.MinKeyLength {
		for i, a := range b.Attributes {
			if strings.Contains(a.Name, key) || strings.Contains(a.Value, key) {
				return answer{}, invalid(index("/attributes", i), "holds the consumer key, which is not kept in the clear")
			}
		}
	}
	return change(c, http.StatusOK, c.renderKey, func(by ledger.By) (ledger.Credential, ledger.Done, error) {
		return c.cfg.Ledger.UpdateKey(c.ctx, by, c.org, c.developer(), c.params["app"], key, keySpec(b))
	})
}

func (c *call) deleteKey() (answer, error) {
	return change(c, http.StatusOK, c.renderKey, func(by ledger.By) (ledger.Credential, ledger.Done, error) {
		return c.cfg.Ledger.DeleteKey(c.ctx, by, c.org, c.developer(), c.params["app"], c.params["key"])
	})
}

func (c *call) removeKeyProduct() (answer, error) {
	return change(c, http.StatusOK, c.renderKey, func(by ledger.By) (ledger.Credential, ledger.Done, error) {
		return c.cfg.Ledger.RemoveKeyProduct(c.ctx, by, c.org, c.developer(), c.params["app"], c.params["key"], c.product())
	})
}

// searchKey finds a key by itself. It travels in the body, so that no log of a
// proxy has it.
func (c *call) searchKey() (answer, error) {
	var key string
	if err := decode("", c.body, members{"consumerKey": &key}); err != nil {
		return answer{}, err
	}
	ids := keyIDs(key)
	if len(ids) == 0 {
		return answer{}, invalid("/consumerKey", "is not in the form of a consumer key, nor the id of one")
	}
	var app ledger.App
	var k ledger.Credential
	var err error
	for _, id := range ids {
		app, k, err = c.cfg.Ledger.FindKey(c.ctx, c.org, id)
		if !notFound(err) {
			break
		}
	}
	if err != nil {
		return answer{}, err
	}
	c.presented(&k, key)
	app.Credentials = nil
	return answer{body: marshal(struct {
		App rawJSON `json:"app"`
		Key rawJSON `json:"key"`
	}{c.edition.OrganizationApp(shownApp(app)), c.edition.Credential(shownCredential(k))})}, nil
}

// listedKey is a key in a list of keygate's own.
type listedKey struct {
	ID             authz.KeyID       `json:"keyId"`
	Hint           string            `json:"hint"`
	AppID          authz.AppID       `json:"appId"`
	AppName        string            `json:"appName"`
	DeveloperID    authz.DeveloperID `json:"developerId"`
	DeveloperEmail string            `json:"developerEmail"`
	Status         authz.Status      `json:"status"`
	ExpiresAt      int64             `json:"expiresAt"`
	Products       []productRef      `json:"apiProducts"`
}

// productRef is a product on a key.
type productRef struct {
	Product authz.ProductName `json:"apiproduct"`
	Status  authz.Status      `json:"status"`
}

// listKeys lists keys by what somebody has to do with them.
func (c *call) listKeys() (answer, error) {
	q := ledger.KeysQuery{PageToken: c.query.get("pageToken")}
	var err error
	if q.PageSize, err = c.query.page(defaultKeys, "pageSize"); err != nil {
		return answer{}, err
	}
	if q.Status, err = statusWord(c.query.get("status"), "?status"); err != nil {
		return answer{}, err
	}
	if q.Expired, err = c.query.flag("expired", false); err != nil {
		return answer{}, err
	}
	if c.query.has("expiringWithin") {
		within, err := time.ParseDuration(c.query.get("expiringWithin"))
		if err != nil || within <= 0 {
			return answer{}, invalid("?expiringWithin", "want a duration such as 720h")
		}
		q.ExpiringBefore = c.cfg.Now().Add(within)
	}
	page, err := c.cfg.Ledger.Credentials(c.ctx, c.org, q)
	if err != nil {
		return answer{}, err
	}
	told := struct {
		Keys          []listedKey `json:"keys"`
		NextPageToken string      `json:"nextPageToken,omitempty"`
	}{[]listedKey{}, page.NextPageToken}
	for _, k := range page.Keys {
		l := listedKey{
			ID: k.Credential.Key, Hint: k.Credential.Hint, AppID: k.App.ID, AppName: k.App.Name, DeveloperID: k.App.Developer,
			DeveloperEmail: k.App.Email, Status: k.Credential.Status, ExpiresAt: k.Credential.ExpiresAt, Products: []productRef{},
		}
		for _, p := range k.Credential.Products {
			l.Products = append(l.Products, productRef{p.Name, p.Status})
		}
		told.Keys = append(told.Keys, l)
	}
	return answer{body: marshal(told)}, nil
}

// defaultKeys in one answer, if no number is asked for.
const defaultKeys = 100

// explained is what a check would answer: as keygate check prints it.
type explained struct {
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
	Levels       []level            `json:"levels"`
}

type level struct {
	Level   string       `json:"level"`
	Status  authz.Status `json:"status,omitempty"`
	Reason  authz.Reason `json:"reason"`
	Problem string       `json:"problem,omitempty"`
	EtcdKey string       `json:"etcdKey,omitempty"`
}

// check explains what a check would answer, by the ladder that checks climb.
func (c *call) check() (answer, error) {
	var key string
	var product authz.ProductName
	if err := decode("", c.body, members{"consumerKey": &key, "product": &product}); err != nil {
		return answer{}, err
	}
	switch {
	case key == "":
		return answer{}, invalid("/consumerKey", "is missing: want a consumer key, or its id")
	case product == "":
		return answer{}, invalid("/product", "is missing: want the name of an API product")
	}
	req := authz.Request{Organization: c.org, Products: []authz.ProductName{product}}
	parsed, reason := authz.ParseConsumerKey(key)
	if id, err := keyID(key, ""); err == nil && key != id.String() { // sha256:…
		req.KeyID, reason = id, authz.Allowed
	} else {
		req.KeyID = parsed.ID()
	}
	d, rungs := authz.Refuse(req, reason), []authz.Rung(nil)
	if reason == authz.Allowed {
		var err error
		if d, rungs, err = c.cfg.Ledger.Explain(c.ctx, c.org, req.KeyID, req.Products); err != nil {
			return answer{}, err
		}
	}
	told := explained{
		Decision: "denied", Reason: d.Reason, Problem: d.Problem, Revision: d.Revision, Organization: d.Organization,
		KeyID: d.KeyID, Product: d.Product, App: d.App, Developer: d.Developer, Scopes: d.Scopes, Levels: []level{},
	}
	if d.Allowed() {
		told.Decision = "allowed"
	}
	paths := levelPaths(c.cfg.Space, d)
	for _, r := range rungs {
		told.Levels = append(told.Levels, level{r.Level, r.Status, r.Reason, r.Problem, paths[r.Level]})
	}
	return answer{body: marshal(told)}, nil
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

// selectedKey is what is stored of a key that a change of many would name.
type selectedKey struct {
	Key      authz.KeyID  `json:"key"`
	There    bool         `json:"there"`
	App      authz.AppID  `json:"appId"`
	Status   authz.Status `json:"status"`
	Products []productRef `json:"products"`
}

// selectKeys tells which keys a change of many would name.
func (c *call) selectKeys() (answer, error) {
	var app, developer string
	var keys []string
	if err := decode("", c.body, members{"app": &app, "developer": &developer, "keys": &keys}); err != nil {
		return answer{}, err
	}
	var found ledger.Selection
	var err error
	switch {
	case app != "" && developer == "" && keys == nil:
		found, err = ledger.AppKeys(c.ctx, c.cfg.Store, c.cfg.Space, c.org, authz.AppID(app))
	case developer != "" && app == "" && keys == nil:
		var t ledger.Target
		if t, err = c.cfg.Ledger.DeveloperTarget(c.ctx, c.org, developer); err == nil {
			found, err = ledger.DeveloperKeys(c.ctx, c.cfg.Store, c.cfg.Space, c.org, authz.DeveloperID(t.Record.Name))
		}
	case app == "" && developer == "" && len(keys) > 0 && len(keys) <= maxTargets:
		for i, text := range keys {
			id, err := keyID(text, index("/keys", i))
			if err != nil {
				return answer{}, err
			}
			found.Keys = append(found.Keys, id)
		}
	default:
		return answer{}, invalid("/", `want one of "app", "developer" and "keys", of these 1 to %d`, maxTargets)
	}
	if err != nil {
		return answer{}, err
	}
	stored, err := ledger.Keys(c.ctx, c.cfg.Store, c.cfg.Space, c.org, found.Keys)
	if err != nil {
		return answer{}, err
	}
	told := struct {
		Keys  []selectedKey `json:"keys"`
		Apps  []authz.AppID `json:"apps"`
		Notes []string      `json:"notes"`
	}{[]selectedKey{}, append([]authz.AppID{}, found.Apps...), append([]string{}, found.Notes...)}
	for _, k := range stored {
		s := selectedKey{Key: k.ID, There: k.There, App: k.Credential.App, Status: k.Credential.Status.Status, Products: []productRef{}}
		for _, p := range k.Products {
			s.Products = append(s.Products, productRef{p, k.Credential.Products[p].Status})
		}
		told.Keys = append(told.Keys, s)
	}
	return answer{body: marshal(told)}, nil
}
