package management

import (
	"net/http"
	"slices"
	"strings"

	"keygate/access"
)

// route is one thing that the API does.
type route struct {
	method string
	// pattern of the path below the organization; a segment in braces is any
	// one, under that name.
	pattern string
	// right that is needed.
	right  access.Right
	handle func(*call) (answer, error)
	// action: only with ?action=; the row of the same pattern without it, if
	// there is one, is for the rest. Its body is not looked at.
	action bool
	// write: it changes something.
	write bool
	// body is read.
	body bool
	// many: it may change more than one transaction holds.
	many bool
	// secret: its answer may show a key, a secret or a token that was made.
	secret bool
	// common: also of what belongs to no one organization, under the word for
	// all of them.
	common bool
}

// routes is all that there is. Of several patterns that a path fits the first
// counts: what is literal stands before a parameter.
var routes = []route{
	{method: "GET", pattern: "", right: access.Read, handle: (*call).organization},

	{method: "GET", pattern: "developers", right: access.Read, handle: (*call).listDevelopers},
	{method: "POST", pattern: "developers", right: access.Write, write: true, body: true, handle: (*call).createDeveloper},
	{method: "GET", pattern: "developers/{developer}", right: access.Read, handle: (*call).getDeveloper},
	{method: "PUT", pattern: "developers/{developer}", right: access.Write, write: true, body: true, handle: (*call).updateDeveloper},
	{method: "DELETE", pattern: "developers/{developer}", right: access.Write, write: true, handle: (*call).deleteDeveloper},
	{method: "POST", pattern: "developers/{developer}", right: access.Status, action: true, write: true, handle: (*call).setDeveloperStatus},
	{method: "GET", pattern: "developers/{developer}/attributes", right: access.Read, handle: (*call).listAttributes},
	{method: "POST", pattern: "developers/{developer}/attributes", right: access.Write, write: true, body: true, handle: (*call).setAttributes},
	{method: "GET", pattern: "developers/{developer}/attributes/{attribute}", right: access.Read, handle: (*call).getAttribute},
	{method: "POST", pattern: "developers/{developer}/attributes/{attribute}", right: access.Write, write: true, body: true, handle: (*call).setAttribute},
	{method: "DELETE", pattern: "developers/{developer}/attributes/{attribute}", right: access.Write, write: true, handle: (*call).deleteAttribute},

	{method: "GET", pattern: "developers/{developer}/apps", right: access.Read, handle: (*call).listDeveloperApps},
	{method: "POST", pattern: "developers/{developer}/apps", right: access.Write, write: true, body: true, secret: true, handle: (*call).createApp},
	{method: "GET", pattern: "developers/{developer}/apps/{app}", right: access.Read, handle: (*call).getDeveloperApp},
	{method: "PUT", pattern: "developers/{developer}/apps/{app}", right: access.Write, write: true, body: true, secret: true, handle: (*call).updateApp},
	{method: "DELETE", pattern: "developers/{developer}/apps/{app}", right: access.Write, write: true, handle: (*call).deleteApp},
	{method: "POST", pattern: "developers/{developer}/apps/{app}", right: access.Status, action: true, write: true, handle: (*call).setAppStatus},
	{method: "POST", pattern: "developers/{developer}/apps/{app}", right: access.Write, write: true, body: true, secret: true, handle: (*call).addAppKey},
	{method: "GET", pattern: "developers/{developer}/apps/{app}/attributes", right: access.Read, handle: (*call).listAttributes},
	{method: "POST", pattern: "developers/{developer}/apps/{app}/attributes", right: access.Write, write: true, body: true, handle: (*call).setAttributes},
	{method: "GET", pattern: "developers/{developer}/apps/{app}/attributes/{attribute}", right: access.Read, handle: (*call).getAttribute},
	{method: "POST", pattern: "developers/{developer}/apps/{app}/attributes/{attribute}", right: access.Write, write: true, body: true, handle: (*call).setAttribute},
	{method: "DELETE", pattern: "developers/{developer}/apps/{app}/attributes/{attribute}", right: access.Write, write: true, handle: (*call).deleteAttribute},

	{method: "POST", pattern: "developers/{developer}/apps/{app}/keys", right: access.Write, write: true, body: true, secret: true, handle: (*call).createKey},
	{method: "POST", pattern: "developers/{developer}/apps/{app}/keys/create", right: access.Write, write: true, body: true, secret: true, handle: (*call).createKey},
	{method: "GET", pattern: "developers/{developer}/apps/{app}/keys/{key}", right: access.Read, handle: (*call).getKey},
	{method: "PUT", pattern: "developers/{developer}/apps/{app}/keys/{key}", right: access.Write, write: true, body: true, handle: (*call).updateKey},
	{method: "DELETE", pattern: "developers/{developer}/apps/{app}/keys/{key}", right: access.Write, write: true, handle: (*call).deleteKey},
	{method: "POST", pattern: "developers/{developer}/apps/{app}/keys/{key}", right: access.Status, action: true, write: true, handle: (*call).setKeyStatus},
	{method: "POST", pattern: "developers/{developer}/apps/{app}/keys/{key}", right: access.Write, write: true, body: true, handle: (*call).updateKey},
	{method: "POST", pattern: "developers/{developer}/apps/{app}/keys/{key}/apiproducts/{product}", right: access.Status, action: true, write: true, handle: (*call).setKeyProductStatus},
	{method: "DELETE", pattern: "developers/{developer}/apps/{app}/keys/{key}/apiproducts/{product}", right: access.Write, write: true, handle: (*call).removeKeyProduct},

	{method: "GET", pattern: "apps", right: access.Read, handle: (*call).listApps},
	{method: "GET", pattern: "apps/{appId}", right: access.Read, handle: (*call).getApp},

	{method: "GET", pattern: "apiproducts", right: access.Read, handle: (*call).listProducts},
	{method: "POST", pattern: "apiproducts", right: access.Write, write: true, body: true, handle: (*call).createProduct},
	{method: "GET", pattern: "apiproducts/{product}", right: access.Read, handle: (*call).getProduct},
	{method: "PUT", pattern: "apiproducts/{product}", right: access.Write, write: true, body: true, handle: (*call).updateProduct},
	{method: "DELETE", pattern: "apiproducts/{product}", right: access.Write, write: true, handle: (*call).deleteProduct},
	{method: "GET", pattern: "apiproducts/{product}/attributes", right: access.Read, handle: (*call).listAttributes},
	{method: "POST", pattern: "apiproducts/{product}/attributes", right: access.Write, write: true, body: true, handle: (*call).setAttributes},
	{method: "GET", pattern: "apiproducts/{product}/attributes/{attribute}", right: access.Read, handle: (*call).getAttribute},
	{method: "POST", pattern: "apiproducts/{product}/attributes/{attribute}", right: access.Write, write: true, body: true, handle: (*call).setAttribute},
	{method: "DELETE", pattern: "apiproducts/{product}/attributes/{attribute}", right: access.Write, write: true, handle: (*call).deleteAttribute},

	// What Apigee has not.
	{method: "POST", pattern: "keys:search", right: access.Read, body: true, handle: (*call).searchKey},
	{method: "GET", pattern: "keys", right: access.Read, handle: (*call).listKeys},
	{method: "POST", pattern: "check", right: access.Read, body: true, handle: (*call).check},
	{method: "POST", pattern: "statuses", right: access.Status, write: true, body: true, many: true, handle: (*call).setStatuses},
	{method: "POST", pattern: "statuses:select", right: access.Read, body: true, handle: (*call).selectKeys},
	{method: "GET", pattern: "audit", right: access.Audit, common: true, handle: (*call).listAudit},
	{method: "GET", pattern: "tokens", right: access.Tokens, common: true, handle: (*call).listTokens},
	{method: "POST", pattern: "tokens", right: access.Tokens, write: true, body: true, secret: true, handle: (*call).createToken},
	{method: "DELETE", pattern: "tokens/{token}", right: access.Tokens, write: true, common: true, handle: (*call).revokeToken},
}

// patternOf has the patterns of routes as segments.
var patternOf = func() (all [][]string) {
	for _, rt := range routes {
		var parts []string
		if rt.pattern != "" {
			parts = strings.Split(rt.pattern, "/")
		}
		all = append(all, parts)
	}
	return all
}()

// match finds the route of a path below the organization. HEAD is answered as
// GET. The parameter action decides by its presence, whatever it says: on a path
// that knows no action it means nothing, and a path that knows nothing else asks
// for one.
func match(method string, path []string, action bool) (*route, map[string]string, error) {
	if method == http.MethodHead {
		method = http.MethodGet
	}
	first := slices.IndexFunc(patternOf, func(pattern []string) bool { return fits(pattern, path) })
	if first < 0 {
		return nil, nil, errNoRoute
	}
	var found *route
	var allow []string
	for i := range routes {
		rt := &routes[i]
		switch {
		case rt.pattern != routes[first].pattern:
		case rt.method != method:
			allow = append(allow, rt.method)
		case found == nil || found.action && !action: // the row behind one with an action takes the rest
			found = rt
		}
	}
	if found != nil {
		params := map[string]string{}
		for i, p := range patternOf[first] {
			if p[0] == '{' {
				params[p[1:len(p)-1]] = path[i]
			}
		}
		return found, params, nil
	}
	slices.Sort(allow)
	allow = slices.Compact(allow)
	return nil, nil, &refusal{status: http.StatusMethodNotAllowed, code: "keygate.method", allow: strings.Join(allow, ", "),
		message: "this path takes " + oneOf(allow)}
}

// fits tells whether a path is of a pattern.
func fits(pattern, path []string) bool {
	return slices.EqualFunc(pattern, path, func(p, segment string) bool { return p[0] == '{' || p == segment })
}
