package keyspace

import (
	"net/url"

	"keygate/authz"
)

// The management indexes. They are derived and advisory: whoever writes with
// etcdctl does not write them, and a check never reads them.
//
//	<prefix>.index/<org>/apps/<appId>/keys/<id>          empty
//	<prefix>.index/<org>/developers/<id>/apps/<name>     the app's id
//	<prefix>.index/<org>/products/<product>/keys/<id>    empty
//	<prefix>.index/<org>/emails/<e-mail>                 the developer's id
//
// An app's name is unique under its developer, so the second one finds an app
// by its name too.

// IndexAppKeys is the prefix of the keys of an app, with its final slash. A
// KeyID follows it.
func (s Space) IndexAppKeys(org authz.Organization, app authz.AppID) string {
	return s.Index(org) + "apps/" + url.PathEscape(string(app)) + "/keys/"
}

// IndexDeveloperApps is the prefix of the apps of a developer, with its final
// slash.
func (s Space) IndexDeveloperApps(org authz.Organization, developer authz.DeveloperID) string {
	return s.Index(org) + "developers/" + url.PathEscape(string(developer)) + "/apps/"
}

// IndexDeveloperApp is the path that holds the id of a developer's app, by the
// app's name.
func (s Space) IndexDeveloperApp(org authz.Organization, developer authz.DeveloperID, name string) string {
	return s.IndexDeveloperApps(org, developer) + url.PathEscape(name)
}

// IndexProductKeys is the prefix of the keys that a product is on, whatever its
// status there, with its final slash. A KeyID follows it.
func (s Space) IndexProductKeys(org authz.Organization, product authz.ProductName) string {
	return s.Index(org) + "products/" + url.PathEscape(string(product)) + "/keys/"
}

// IndexEmail is the path that holds the id of the developer with an e-mail
// address, which is in lower case.
func (s Space) IndexEmail(org authz.Organization, email string) string {
	return s.IndexEmails(org) + url.PathEscape(email)
}

// IndexEmails is the prefix of them all, with its final slash.
func (s Space) IndexEmails(org authz.Organization) string { return s.Index(org) + "emails/" }
