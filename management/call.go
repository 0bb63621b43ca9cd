package management

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"keygate/access"
	"keygate/apigee"
	"keygate/authz"
	"keygate/jsonobject"
	"keygate/ledger"
	"keygate/statestore/keyspace"
)

const (
	// changeTimeout of a request that changes one thing, its sign-in included.
	changeTimeout = 4500 * time.Millisecond
	// readTimeout of one that reads, and manyTimeout of one that changes many.
	readTimeout = 10 * time.Second
	manyTimeout = time.Minute
	// maxBody in bytes, and maxDepth of the nesting in it.
	maxBody  = 1 << 20
	maxDepth = 16
	// maxText of a reason or a ticket, in bytes.
	maxText = 1024
)

// mounts of the API, each with its rendering.
var mounts = []struct {
	prefix  string
	edition apigee.Edition
}{
	{"/v1/organizations/", apigee.X},
	{"/v1/o/", apigee.Edge},
	{"/edge/v1/organizations/", apigee.Edge},
}

// editionOf tells how errors of a request are rendered.
func editionOf(r *http.Request) apigee.Edition {
	for _, m := range mounts {
		if strings.HasPrefix(r.URL.EscapedPath(), m.prefix) {
			return m.edition
		}
	}
	return apigee.X
}

// segments of the path below the mount, unescaped; the first is the
// organization. ok is false for a path outside the mounts.
func segments(r *http.Request) (parts []string, ok bool) {
	path := r.URL.EscapedPath()
	for _, m := range mounts {
		rest, found := strings.CutPrefix(path, m.prefix)
		if !found {
			continue
		}
		if org, slash, cut := strings.Cut(rest, "/"); cut && slash == "" {
			rest = org // the organization itself, as some address it
		}
		for s := range strings.SplitSeq(rest, "/") {
			s, err := url.PathUnescape(s)
			if err != nil || s == "" {
				return nil, false
			}
			parts = append(parts, s)
		}
		return parts, true
	}
	return nil, false
}

// call is one request on its way to a handler.
type call struct {
	*Server
	ctx     context.Context // of reads and of the change; ends by itself
	r       *http.Request
	rq      *request
	edition apigee.Edition
	who     principal
	org     authz.Organization
	route   *route
	params  map[string]string
	query   query
	body    []byte
	empty   bool // there was no body
}

// serve answers a request of the API.
func (s *Server) serve(w http.ResponseWriter, r *http.Request, signIn func(*http.Request) (principal, error)) {
	rq := requestOf(r)
	a, err := s.handle(w, r, rq, signIn)
	if err == nil {
		writeAnswer(w, a)
		return
	}
	refused := refusalOf(err)
	var own *refusal
	if refused.status >= http.StatusInternalServerError && !errors.As(err, &own) && r.Context().Err() == nil {
		s.cfg.Logger.Error("a request could not be handled", "requestId", rq.id, "route", rq.pattern, "cause", err)
	}
	writeError(w, rq, refused)
}

var errNoOrganization = &refusal{status: http.StatusNotFound, code: "keygate.organization_doesnot_exist", message: "there is no such organization"}

var errNoRoute = &refusal{status: http.StatusNotFound, code: "keygate.no_such_path", message: "there is no such path in this API; /docs describes it"}

func (s *Server) handle(w http.ResponseWriter, r *http.Request, rq *request, signIn func(*http.Request) (principal, error)) (answer, error) {
	began := time.Now()
	path, inside := segments(r)
	if !inside && !strings.HasPrefix(r.URL.EscapedPath(), "/v1/") && !strings.HasPrefix(r.URL.EscapedPath(), "/edge/") {
		return answer{}, errNoRoute
	}
	who, err := signIn(r)
	if err != nil {
		return answer{}, err
	}
	rq.actor = who.actor.Name
	if !inside {
		return answer{}, errNoRoute
	}
	org := authz.Organization(path[0])
	// The word for all of them is for those who may in all of them.
	if !who.in(org) || org != keyspace.AllOrganizations && keyspace.CheckOrganization(org) != nil {
		return answer{}, errNoOrganization
	}
	rq.org = string(org)
	c := &call{Server: s, r: r, rq: rq, edition: rq.edition, who: who, org: org}
	q, queryErr := parseQuery(r.URL.RawQuery)
	rt, params, err := match(r.Method, path[1:], q.has("action"))
	switch {
	case err != nil:
		return answer{}, err
	case org == keyspace.AllOrganizations && !rt.common:
		return answer{}, errNoOrganization
	}
	rq.pattern, c.route, c.params, c.query = rt.pattern, rt, params, q
	if !who.can(rt.right) {
		return answer{}, s.forbidden(r, who, org, rt)
	}
	if queryErr != nil {
		return answer{}, queryErr
	}
	// The body is read to its end, looked at or not: the rest of it would be
	// waited for later.
	body, err := readBody(w, r)
	if err != nil {
		return answer{}, err
	}
	if rt.body {
		if c.body, err = checkBody(body); err != nil {
			return answer{}, err
		}
		if c.empty = len(c.body) == 0; c.empty {
			c.body = []byte("{}")
		}
	}
	if !who.all {
		if rq.release, err = s.places.take(who.actor.Token); err != nil {
			rq.release = func() {}
			return answer{}, err
		}
		defer rq.release()
	}
	limit := readTimeout
	switch {
	case rt.many:
		limit = manyTimeout
	case rt.write:
		limit = changeTimeout
	}
	var cancel context.CancelFunc
	c.ctx, cancel = context.WithDeadline(r.Context(), began.Add(limit))
	defer cancel()
	return rt.handle(c)
}

// readBody reads a body within its bounds.
func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		return nil, &refusal{status: http.StatusRequestEntityTooLarge, code: "keygate.body_too_large", message: fmt.Sprintf("the body has more than %d bytes", maxBody)}
	case err != nil:
		return nil, &refusal{status: http.StatusBadRequest, code: "keygate.body", message: fmt.Sprintf("the body ended too early, or was not here within %v", bodyTimeout)}
	}
	// From here on the server reads only to see the client go away.
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{})
	return body, nil
}

// checkBody looks at a body. It is JSON, whatever its content type says; of one
// that is empty nothing is left.
func checkBody(body []byte) ([]byte, error) {
	switch {
	case len(bytes.TrimSpace(body)) == 0:
		return nil, nil
	case depth(body) > maxDepth:
		return nil, &refusal{status: http.StatusBadRequest, code: "keygate.body", message: fmt.Sprintf("the body is nested deeper than %d", maxDepth)}
	}
	if err := jsonobject.Check(body); err != nil {
		message := "the body is not JSON that can be taken: " + err.Error()
		if errors.Is(err, jsonobject.ErrDuplicate) {
			message = "a member stands twice in one object of the body" // its name may be anything, a key too
		}
		return nil, &refusal{status: http.StatusBadRequest, code: "keygate.body", message: message}
	}
	return body, nil
}

// depth of the nesting in JSON, which need not be valid.
func depth(data []byte) (deepest int) {
	now, quoted := 0, false
	for i := 0; i < len(data); i++ {
		switch c := data[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{' || c == '[':
			now++
			deepest = max(deepest, now)
		case c == '}' || c == ']':
			now--
		}
	}
	return deepest
}

// developer that the path names. One client escapes the "@" of an address twice,
// so what has the look of that is unescaped once more, unless there is a
// developer of that very name.
func (c *call) developer() string {
	d := c.params["developer"]
	if !strings.Contains(d, "%40") {
		return d
	}
	again, err := url.QueryUnescape(d)
	if err != nil {
		return d
	}
	if _, err := c.cfg.Ledger.DeveloperTarget(c.ctx, c.org, d); notFound(err) {
		return again
	}
	return d
}

// notFound tells whether that is the ledger's refusal.
func notFound(err error) bool {
	var refused *ledger.Error
	return errors.As(err, &refused) && refused.Kind == ledger.NotFound
}

func (c *call) product() authz.ProductName { return authz.ProductName(c.params["product"]) }

// by says on whose behalf, and how, the request changes something.
func (c *call) by() (by ledger.By, err error) {
	by = ledger.By{Actor: c.who.actor, RequestID: c.rq.id}
	if by.DryRun, err = c.query.flag("dryRun", false); err != nil {
		return by, err
	}
	for name, to := range map[string]*string{"reason": &by.Reason, "ticket": &by.Ticket} {
		if *to = c.query.get(name); len(*to) > maxText {
			return by, invalid("?"+name, "has %d bytes, want at most %d", len(*to), maxText)
		}
	}
	if by.IfMatch, err = ifMatch(c.r.Header); err != nil {
		return by, err
	}
	keys := c.r.Header.Values("Idempotency-Key")
	switch {
	case len(keys) == 0:
	case len(keys) > 1 || keys[0] == "" || len(keys[0]) > ledger.MaxOnceKey:
		return by, invalid("", "Idempotency-Key: want one, of 1 to %d characters", ledger.MaxOnceKey)
	case !by.DryRun:
		by.Once = &ledger.Once{Key: keys[0], Request: c.digest()}
	}
	return by, nil
}

// digest is of everything that makes two requests the same.
func (c *call) digest() (d [32]byte) {
	h := sha256.New()
	for _, part := range []string{c.r.Method, c.r.URL.EscapedPath(), c.query.values.Encode(), c.r.Header.Get("If-Match"), string(c.body)} {
		fmt.Fprintf(h, "%d ", len(part))
		io.WriteString(h, part)
	}
	return [32]byte(h.Sum(nil))
}

// ifMatch reads the header of that name: none or * is any revision.
func ifMatch(h http.Header) (int64, error) {
	tags := h.Values("If-Match")
	switch {
	case len(tags) == 0 || len(tags) == 1 && tags[0] == "*":
		return 0, nil
	case len(tags) > 1 || len(tags[0]) < 2 || tags[0][0] != '"' || strings.IndexByte(tags[0][1:], '"') != len(tags[0])-2:
		return 0, invalid("", `If-Match: want * or one entity tag as ETag has it, such as "123"`)
	}
	revision, err := strconv.ParseInt(strings.Trim(tags[0], `"`), 10, 64)
	if err != nil || revision <= 0 {
		return -1, nil // a tag of something else, which nothing has
	}
	return revision, nil
}

// reveals tells whether the answer shows consumer keys and secrets.
func (c *call) reveals() (bool, error) {
	wanted, err := c.query.flag("reveal", true)
	return wanted && c.who.can(access.Reveal), err
}

// reveal opens what is sealed of credentials, if the request is one whose
// answer shows it. The audit record is written first.
func (c *call) reveal(credentials []*ledger.Credential) error {
	show, err := c.reveals()
	if err != nil || !show || len(credentials) == 0 {
		return err
	}
	_, err = c.cfg.Ledger.Reveal(c.ctx, ledger.By{Actor: c.who.actor, Reason: c.query.get("reason"), Ticket: c.query.get("ticket"), RequestID: c.rq.id}, c.org, credentials...)
	return err
}

// presented shows the consumer key that the request itself has named a
// credential by, to whom it may be revealed.
func (c *call) presented(k *ledger.Credential, key string) {
	if k.ConsumerKey != "" || !c.who.can(access.Reveal) {
		return
	}
	if parsed, reason := authz.ParseConsumerKey(key); reason == authz.Allowed && parsed.ID() == k.Key {
		k.ConsumerKey = key
	}
}

// keyIDs are the ids that what a client calls a key may mean, in the order in
// which they are tried: the id of that consumer key, and the id that it is.
func keyIDs(key string) (ids []authz.KeyID) {
	if parsed, reason := authz.ParseConsumerKey(key); reason == authz.Allowed {
		ids = append(ids, parsed.ID())
	}
	if id, err := authz.ParseKeyID(strings.TrimPrefix(key, "sha256:")); err == nil {
		ids = append(ids, id)
	}
	return ids
}

// keyID reads a key's id in hex, with or without its prefix.
func keyID(text, pointer string) (authz.KeyID, error) {
	id, err := authz.ParseKeyID(strings.TrimPrefix(text, "sha256:"))
	if err != nil {
		return id, invalid(pointer, "is not the id of a key: want %d lower-case hex digits; POST keys:search finds it by the key", hex.EncodedLen(len(id)))
	}
	return id, nil
}

// invalid refuses a request; pointer is as in ledger.Error.
func invalid(pointer, format string, args ...any) error {
	code := "keygate.body"
	switch {
	case pointer == "":
		code = "keygate.header"
	case pointer[0] == '?':
		code = "keygate.query"
	}
	return &ledger.Error{Kind: ledger.Invalid, Code: code, Pointer: pointer, Message: fmt.Sprintf(format, args...)}
}
