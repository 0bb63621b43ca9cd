package management

import (
	"net/http"
	"strings"

	"keygate/apigee"
	"keygate/authz"
	"keygate/ledger"
)

func shownCredential(k ledger.Credential) apigee.Credential {
	return apigee.Credential{Credential: k.Credential, ConsumerKey: k.ConsumerKey, ConsumerSecret: k.ConsumerSecret}
}

func shownApp(a ledger.App) apigee.App {
	shown := apigee.App{App: a.App, LastModifiedAt: a.LastModified, Email: a.Email}
	for _, k := range a.Credentials {
		shown.Credentials = append(shown.Credentials, shownCredential(k))
	}
	return shown
}

func (c *call) renderApp(a ledger.App) []byte { return c.edition.App(shownApp(a)) }

// revealApps opens what is sealed in apps that are answered.
func (c *call) revealApps(apps ...ledger.App) error {
	var all []*ledger.Credential
	for _, a := range apps {
		for i := range a.Credentials {
			all = append(all, &a.Credentials[i])
		}
	}
	return c.reveal(all)
}

// expanded reads whether a list shows the apps whole, and with their
// credentials.
func (c *call) expanded() (expand, credentials bool, err error) {
	if expand, err = c.query.flag("expand", false); err != nil {
		return false, false, err
	}
	credentials, err = c.query.flag("includeCred", true)
	return expand, expand && credentials, err
}

// shownApps prepares a list.
func (c *call) shownApps(apps []ledger.App, credentials bool) ([]apigee.App, error) {
	if !credentials {
		for i := range apps {
			apps[i].Credentials = nil
		}
	}
	if err := c.revealApps(apps...); err != nil {
		return nil, err
	}
	shown := make([]apigee.App, 0, len(apps))
	for _, a := range apps {
		shown = append(shown, shownApp(a))
	}
	return shown, nil
}

// defaultApps of a developer in one answer, if no number is asked for.
const defaultApps = 100

func (c *call) listDeveloperApps() (answer, error) {
	expand, credentials, err := c.expanded()
	if err != nil {
		return answer{}, err
	}
	count, err := c.query.page(defaultApps, "count")
	if err != nil {
		return answer{}, err
	}
	found, err := c.cfg.Ledger.DeveloperApps(c.ctx, c.org, c.developer(), ledger.AppQuery{StartKey: c.query.get("startKey"), Count: count, Expand: expand})
	if err != nil {
		return answer{}, err
	}
	shown, err := c.shownApps(found, credentials)
	if err != nil {
		return answer{}, err
	}
	return answer{body: c.edition.DeveloperApps(shown, expand)}, nil
}

func (c *call) getDeveloperApp() (answer, error) {
	a, err := c.cfg.Ledger.DeveloperApp(c.ctx, c.org, c.developer(), c.params["app"])
	if err != nil {
		return answer{}, err
	}
	if err := c.revealApps(a); err != nil {
		return answer{}, err
	}
	return answer{body: c.renderApp(a), etag: a.Revision}, nil
}

func (c *call) getApp() (answer, error) {
	a, err := c.cfg.Ledger.App(c.ctx, c.org, authz.AppID(c.params["appId"]))
	if err != nil {
		return answer{}, err
	}
	if err := c.revealApps(a); err != nil {
		return answer{}, err
	}
	return answer{body: c.edition.OrganizationApp(shownApp(a)), etag: a.Revision}, nil
}

func appSpec(b apigee.AppBody) ledger.AppSpec {
	return ledger.AppSpec{Name: b.Name, Products: b.Products, KeyExpiresIn: b.KeyExpiresIn, Details: b.Details}
}

func (c *call) createApp() (answer, error) {
	b, err := apigee.ParseApp(c.body, "")
	if err != nil {
		return answer{}, err
	}
	return change(c, http.StatusCreated, c.renderApp, func(by ledger.By) (ledger.App, ledger.Done, error) {
		return c.cfg.Ledger.CreateApp(c.ctx, by, c.org, c.developer(), appSpec(b))
	})
}

func (c *call) updateApp() (answer, error) {
	b, err := apigee.ParseApp(c.body, c.params["app"])
	if err != nil {
		return answer{}, err
	}
	return change(c, http.StatusOK, c.renderApp, func(by ledger.By) (ledger.App, ledger.Done, error) {
		return c.cfg.Ledger.UpdateApp(c.ctx, by, c.org, c.developer(), c.params["app"], appSpec(b))
	})
}

// addAppKey gives an app one more key. Edge changes the status by the body too.
func (c *call) addAppKey() (answer, error) {
	b, err := apigee.ParseApp(c.body, c.params["app"])
	if err != nil {
		return answer{}, err
	}
	switch {
	case b.Action != "" && c.edition == apigee.Edge:
		return c.setFlagTo(b.Action, "/status", statusActions, c.appTarget)
	case b.Action != "":
		return answer{}, invalid("?action", "is missing: want %s there, not as the status in the body", oneOf(statusActions))
	}
	if c.empty {
		return answer{}, invalid("?action", "is missing, and so is a body for a new key: want %s, or a body such as {\"apiProducts\":[\"name\"]}", oneOf(statusActions))
	}
	return change(c, http.StatusOK, c.renderApp, func(by ledger.By) (ledger.App, ledger.Done, error) {
		return c.cfg.Ledger.AddAppKey(c.ctx, by, c.org, c.developer(), c.params["app"], appSpec(b))
	})
}

func (c *call) deleteApp() (answer, error) {
	return change(c, http.StatusOK, c.renderApp, func(by ledger.By) (ledger.App, ledger.Done, error) {
		return c.cfg.Ledger.DeleteApp(c.ctx, by, c.org, c.developer(), c.params["app"])
	})
}

// filters of the list of all apps: each is a parameter of its own, or a part of
// filter.
var filters = []string{"developerEmail", "apiProduct", "consumerKey", "status", "appId", "appName", "appType", "appGroup", "keyStatus"}

// appFilter reads filter: name=value, several joined by AND.
func (c *call) appFilter(q *ledger.AppsQuery) error {
	given := map[string]string{"apiProduct": c.query.get("apiProduct"), "status": c.query.get("status"), "keyStatus": c.query.get("keyStatus")}
	if filter := c.query.get("filter"); filter != "" {
		for part := range strings.SplitSeq(filter, " AND ") {
			name, value, ok := strings.Cut(strings.TrimSpace(part), "=")
			known := false
			for _, f := range filters {
				known = known || f == name
			}
			if !ok || !known || value == "" || given[name] != "" {
				return invalid("?filter", "want name=value, joined by \" AND \", each name once: %s", oneOf(filters))
			}
			given[name] = strings.Trim(value, `"`)
		}
	}
	for name, to := range map[string]*authz.Status{"status": &q.Status, "keyStatus": &q.KeyStatus} {
		var err error
		if *to, err = statusWord(given[name], "?"+name); err != nil {
			return err
		}
	}
	switch given["appType"] {
	case "", "Developer":
	default:
		return invalid("?filter", "appType: there are only apps of a Developer here")
	}
	if given["appGroup"] != "" {
		return invalid("?filter", "appGroup: there are no app groups here")
	}
	if key := given["consumerKey"]; key != "" {
		if q.Keys = keyIDs(key); len(q.Keys) == 0 {
			return invalid("?filter", "consumerKey: is not in the form of a consumer key, nor the id of one")
		}
	}
	q.DeveloperEmail, q.Product, q.Name = given["developerEmail"], authz.ProductName(given["apiProduct"]), given["appName"]
	if id := given["appId"]; id != "" {
		q.IDs = append(q.IDs, authz.AppID(id))
	}
	return nil
}

// statusWord reads the status of an app or a key; none is none.
func statusWord(word, pointer string) (authz.Status, error) {
	words := []string{"approved", "revoked", "pending"}
	for i, s := range []authz.Status{authz.StatusApproved, authz.StatusRevoked, authz.StatusPending} {
		if strings.EqualFold(word, words[i]) {
			return s, nil
		}
	}
	if word != "" {
		return authz.StatusNone, invalid(pointer, "want %s", oneOf(words))
	}
	return authz.StatusNone, nil
}

func (c *call) listApps() (answer, error) {
	expand, credentials, err := c.expanded()
	if err != nil {
		return answer{}, err
	}
	size, err := c.query.page(maxPage, "pageSize", "rows")
	if err != nil {
		return answer{}, err
	}
	q := ledger.AppsQuery{PageSize: size, PageToken: c.query.get("pageToken"), StartKey: c.query.get("startKey"), Expand: expand}
	for id := range strings.SplitSeq(c.query.get("ids"), ",") {
		if id != "" {
			q.IDs = append(q.IDs, authz.AppID(id))
		}
	}
	if err := c.appFilter(&q); err != nil {
		return answer{}, err
	}
	// Who pages by the last name of a full page takes a short one for the end.
	q.Whole = c.edition == apigee.Edge || q.PageToken == "" && (q.StartKey != "" || c.query.get("rows") != "")
	page, err := c.cfg.Ledger.Apps(c.ctx, c.org, q)
	if err != nil {
		return answer{}, err
	}
	shown, err := c.shownApps(page.Apps, credentials)
	if err != nil {
		return answer{}, err
	}
	told := apigee.Page{NextToken: page.NextPageToken}
	if q.PageToken == "" && q.StartKey == "" && page.NextPageToken == "" { // these are all
		told.Total = len(shown)
	}
	return answer{body: c.edition.OrganizationApps(shown, expand, told)}, nil
}
