package authz

import "time"

// Rung is one level of the ladder: what was asked, and how it was answered.
type Rung struct {
	// Level is "key", "key status", "expiry", "app status", "developer status"
	// or "product on key".
	Level string
	// Status is the word found, where the level has one.
	Status Status
	// Reason is Allowed, or why this level by itself refuses.
	Reason Reason
	// Problem details RecordUnreadable, and KeyExpired where the clock says
	// otherwise.
	Problem string
}

// The ladder, in Apigee's order (apid's performValidations, with expiry where
// Apigee's proxy has it): the first rung that refuses is the reason.
const (
	rungKey = iota
	rungKeyStatus
	rungExpiry
	rungApp
	rungDeveloper
	rungProduct
	numRungs
)

// latestExpiry is 9999-12-31T23:59:59.999Z in ms. A later one is a mistake
// (seconds, microseconds, a default of some language), and so unreadable.
const latestExpiry = 253402300799999

// climb answers every rung; the caller takes the first refusal. It always
// climbs the whole ladder, so that explain and the data path cannot differ, and
// so that an expiry is seen whatever refuses above it.
func climb(req Request, r *Records, now time.Time, expired *latch) (rungs [numRungs]Rung, product ProductName) {
	c := &r.Credential
	// What a rung says if nothing leads to it.
	unknown := Rung{Reason: RecordUnreadable, Problem: "nothing is known of it"}
	if !c.Exists {
		unknown = Rung{Reason: KeyUnknown}
	}
	for i, level := range [numRungs]string{"key", "key status", "expiry", "app status", "developer status", "product on key"} {
		rungs[i] = unknown
		rungs[i].Level = level
	}
	product = req.Products[0]
	if !c.Exists {
		return rungs, product
	}
	rungs[rungKey].Reason, rungs[rungKey].Problem = Allowed, ""
	rungs[rungKeyStatus].judge(c.Status, keyReasons)
	rungs[rungExpiry].expiry(req.KeyID, c, now, expired)
	rungs[rungApp].app(c, &r.App)
	rungs[rungDeveloper].developer(&r.App, &r.Developer)
	product = rungs[rungProduct].product(req.Products, c.Products)
	return rungs, product
}

// reasons maps the status found at one level to its reason. A status that is
// not in the table, StatusNone above all, is unreadable.
type reasons [numStatuses]Reason

var (
	keyReasons       = reasons{StatusApproved: Allowed, StatusRevoked: KeyRevoked, StatusPending: KeyPending}
	appReasons       = reasons{StatusApproved: Allowed, StatusRevoked: AppRevoked, StatusPending: AppPending}
	developerReasons = reasons{StatusActive: Allowed, StatusInactive: DeveloperInactive}
	productReasons   = reasons{StatusApproved: Allowed, StatusRevoked: ProductRevoked, StatusPending: ProductPending}
)

func (g *Rung) judge(f Flag, table reasons) {
	g.Status, g.Reason, g.Problem = f.Status, RecordUnreadable, f.Problem
	if f.Status < numStatuses && table[f.Status] != Internal {
		g.Reason = table[f.Status]
	}
}

func (g *Rung) expiry(id KeyID, c *Credential, now time.Time, expired *latch) {
	switch {
	case c.Problem != "":
		g.Problem = c.Problem
	case c.ExpiresAt == NeverExpires:
		g.Reason, g.Problem = Allowed, ""
	case c.ExpiresAt < 0 || c.ExpiresAt > latestExpiry:
		g.Problem = "expiresAt is neither -1 nor a time in milliseconds"
	case now.UnixMilli() >= c.ExpiresAt:
		g.Reason, g.Problem = KeyExpired, ""
		expired.add(id, c)
	case expired.has(id, c):
		g.Reason, g.Problem = KeyExpired, "seen expired before the clock was set back; to open it write the credential again, or restart keygate"
	default:
		g.Reason, g.Problem = Allowed, ""
	}
}

func (g *Rung) app(c *Credential, a *App) {
	if !a.Exists {
		g.Problem = "the credential's app does not exist"
		if c.Problem != "" {
			g.Problem = c.Problem
		}
		return
	}
	g.judge(a.Status, appReasons)
	if g.Reason != Allowed {
		return
	}
	switch {
	case a.Problem != "":
		g.Reason, g.Problem = RecordUnreadable, a.Problem
	case a.Developer != c.Developer:
		g.Reason, g.Problem = RecordUnreadable, "the credential and its app name different developers"
	}
}

func (g *Rung) developer(a *App, d *Developer) {
	if !d.Exists {
		if a.Exists {
			g.Problem = "the app's developer does not exist"
		}
		return
	}
	g.judge(d.Status, developerReasons)
	if g.Reason == Allowed && d.Problem != "" {
		g.Reason, g.Problem = RecordUnreadable, d.Problem
	}
}

// product settles on the first product of asked that is approved; if none is,
// on the first of asked with its reason.
func (g *Rung) product(asked []ProductName, on map[ProductName]Flag) ProductName {
	var first Rung
	for i, p := range asked {
		f, ok := on[p]
		if ok {
			g.judge(f, productReasons)
		} else {
			g.Status, g.Reason, g.Problem = StatusNone, ProductNotOnKey, ""
		}
		if g.Reason == Allowed {
			return p
		}
		if i == 0 {
			first = *g
		}
	}
	*g = first
	return asked[0]
}
