package management

import (
	"net/http"
	"strings"

	"keygate/apigee"
	"keygate/ledger"
)

func (c *call) organization() (answer, error) {
	return answer{body: c.edition.Organization(apigee.Organization{Name: c.org})}, nil
}

// shownDeveloper is a developer as it is rendered.
func (c *call) shownDeveloper(d ledger.Developer) apigee.Developer {
	return apigee.Developer{Developer: d.Developer, LastModifiedAt: d.LastModified, Organization: c.org, Apps: d.Apps}
}

func (c *call) renderDeveloper(d ledger.Developer) []byte {
	return c.edition.Developer(c.shownDeveloper(d))
}

func (c *call) listDevelopers() (answer, error) {
	expand, err := c.query.flag("expand", false)
	if err != nil {
		return answer{}, err
	}
	count, err := c.query.page(maxPage, "count")
	if err != nil {
		return answer{}, err
	}
	q := ledger.DeveloperQuery{StartKey: c.query.get("startKey"), Count: count, App: c.query.get("app"), Expand: expand}
	if ids := c.query.get("ids"); ids != "" {
		q.IDs = strings.Split(ids, ",")
	}
	found, err := c.cfg.Ledger.Developers(c.ctx, c.org, q)
	if err != nil {
		return answer{}, err
	}
	shown := make([]apigee.Developer, 0, len(found))
	for _, d := range found {
		shown = append(shown, c.shownDeveloper(d))
	}
	return answer{body: c.edition.Developers(shown, expand)}, nil
}

func (c *call) getDeveloper() (answer, error) {
	d, err := c.cfg.Ledger.Developer(c.ctx, c.org, c.developer())
	if err != nil {
		return answer{}, err
	}
	return answer{body: c.renderDeveloper(d), etag: d.Revision}, nil
}

func (c *call) createDeveloper() (answer, error) {
	d, err := apigee.ParseDeveloper(c.body)
	if err != nil {
		return answer{}, err
	}
	return change(c, http.StatusCreated, c.renderDeveloper, func(by ledger.By) (ledger.Developer, ledger.Done, error) {
		return c.cfg.Ledger.CreateDeveloper(c.ctx, by, c.org, d)
	})
}

func (c *call) updateDeveloper() (answer, error) {
	d, err := apigee.ParseDeveloper(c.body)
	if err != nil {
		return answer{}, err
	}
	return change(c, http.StatusOK, c.renderDeveloper, func(by ledger.By) (ledger.Developer, ledger.Done, error) {
		return c.cfg.Ledger.UpdateDeveloper(c.ctx, by, c.org, c.developer(), d)
	})
}

func (c *call) deleteDeveloper() (answer, error) {
	return change(c, http.StatusOK, c.renderDeveloper, func(by ledger.By) (ledger.Developer, ledger.Done, error) {
		return c.cfg.Ledger.DeleteDeveloper(c.ctx, by, c.org, c.developer())
	})
}
