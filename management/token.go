package management

import (
	"cmp"
	"errors"
	"net/http"
	"slices"
	"time"

	"keygate/access"
	"keygate/audit"
	"keygate/authz"
	"keygate/ledger"
)

// listedToken is a token without its secret.
type listedToken struct {
	ID           string             `json:"id"`
	Name         string             `json:"name"`
	Role         access.Role        `json:"role"`
	Organization authz.Organization `json:"organization"`
	CreatedAt    int64              `json:"createdAt"`
	CreatedBy    string             `json:"createdBy"`
	ExpiresAt    int64              `json:"expiresAt"`
	LastUsed     int64              `json:"lastUsed"` // 0 is never
}

func shownToken(t access.Token) listedToken {
	return listedToken{t.ID, t.Name, t.Role, t.Organization, t.CreatedAt, t.CreatedBy, t.ExpiresAt, t.LastUsed}
}

// reach is what tokens the caller may see: those of the organization, and for
// one that is for all organizations those as well.
func (c *call) reach() authz.Organization {
	if c.who.organization == access.AllOrganizations {
		return access.AllOrganizations
	}
	return c.org
}

func (c *call) listTokens() (answer, error) {
	all, err := c.cfg.Ledger.Tokens(c.ctx, c.reach())
	if err != nil {
		return answer{}, err
	}
	told := struct {
		Tokens []listedToken `json:"tokens"`
	}{[]listedToken{}}
	for _, t := range all {
		if t.In(c.org) {
			told.Tokens = append(told.Tokens, shownToken(t))
		}
	}
	slices.SortStableFunc(told.Tokens, func(a, b listedToken) int { return cmp.Compare(a.CreatedAt, b.CreatedAt) })
	return answer{body: marshal(told)}, nil
}

// madeToken is a token with its secret, which is shown this once.
type madeToken struct {
	listedToken
	Token string `json:"token"`
}

func (c *call) createToken() (answer, error) {
	spec := access.Token{Organization: c.org, ExpiresAt: access.NeverExpires}
	var role, expiresIn string
	if err := decode("", c.body, members{"name": &spec.Name, "role": &role, "organization": &spec.Organization, "expiresIn": &expiresIn}); err != nil {
		return answer{}, err
	}
	var err error
	if spec.Role, err = access.ParseRole(role); err != nil {
		return answer{}, invalid("/role", "want viewer, operator, admin or auditor")
	}
	spec.Organization = cmp.Or(spec.Organization, c.org)
	if !c.who.in(spec.Organization) { // all of them, or another's
		return answer{}, &refusal{status: http.StatusNotFound, code: "keygate.organization_doesnot_exist", message: "/organization: there is no such organization"}
	}
	if expiresIn != "" {
		d, err := time.ParseDuration(expiresIn)
		if err != nil || d <= 0 {
			return answer{}, invalid("/expiresIn", "want a duration such as 720h; absent is never")
		}
		spec.ExpiresAt = c.cfg.Now().Add(d).UnixMilli()
	}
	render := func(t ledger.CreatedToken) []byte { return marshal(madeToken{shownToken(t.Token), t.Secret}) }
	return change(c, http.StatusCreated, render, func(by ledger.By) (t ledger.CreatedToken, done ledger.Done, err error) {
		t.Secret, t.Token, done, err = c.cfg.Ledger.CreateToken(c.ctx, by, spec)
		return t, done, err
	})
}

func (c *call) revokeToken() (answer, error) {
	render := func(t access.Token) []byte { return marshal(shownToken(t)) }
	return change(c, http.StatusOK, render, func(by ledger.By) (access.Token, ledger.Done, error) {
		return c.cfg.Ledger.RevokeToken(c.ctx, by, c.org, c.params["token"])
	})
}

func (c *call) listAudit() (answer, error) {
	q := audit.Query{Action: c.query.get("action"), Object: c.query.get("object"), Actor: c.query.get("actor"), PageToken: c.query.get("pageToken")}
	var err error
	if q.From, err = c.query.instant("from"); err != nil {
		return answer{}, err
	}
	if q.To, err = c.query.instant("to"); err != nil {
		return answer{}, err
	}
	if q.Reverse, err = c.query.flag("reverse", false); err != nil {
		return answer{}, err
	}
	if q.PageSize, err = c.query.page(defaultRecords, "pageSize"); err != nil {
		return answer{}, err
	}
	page, err := audit.List(c.ctx, c.cfg.Store, c.cfg.Space, c.org, q)
	switch {
	case errors.Is(err, audit.ErrQuery): // all but the token has been looked at
		return answer{}, invalid("?pageToken", "is not one that this list gave: begin without it")
	case err != nil:
		return answer{}, err
	}
	return answer{body: marshal(struct {
		Records       []audit.Record `json:"records"`
		NextPageToken string         `json:"nextPageToken,omitempty"`
	}{append([]audit.Record{}, page.Records...), page.NextPageToken})}, nil
}

// defaultRecords in one answer, if no number is asked for.
const defaultRecords = 100
