// Package management serves Apigee's management API over the ledger: the same
// calls, bodies, answers and errors, in both of Apigee's renderings, and what
// keygate adds in their style.
//
// # Mounts
//
//	/v1/organizations/{org}/…        as Apigee X answers
//	/v1/o/{org}/…                    as Edge answers
//	/edge/v1/organizations/{org}/…   the same, for clients that only take a base
//	/openapi.json /openapi.yaml      the document, for everybody
//	/docs                            the document as a page, for everybody
//
// # A request
//
// In this order: a name in Host that this server is known by (else 421); no
// other site's page behind it (403); a token (401, or 429 after too many that
// were none); its organization (404, as for one that is not there); a route
// (404, 405); the right that the route asks for (403); a body within bounds
// (413, 400); a place among the requests under way (503, or 429 if the token
// has taken its part of them); the handler. The place is given back before the
// answer is written, so whoever sends or reads slowly holds none. One table,
// routes, says what there is and who may.
//
// Consumer keys stand in paths and bodies here. They are not logged: the access
// log names the route, never the path.
package management

import (
	"errors"
	"log/slog"
	"net/http"
	"time"

	"keygate/access"
	"keygate/audit"
	"keygate/authz"
	"keygate/ledger"
	"keygate/statestore/keyspace"
)

// Config of a Server.
type Config struct {
	// Ledger makes the changes and reads; required.
	Ledger *ledger.Ledger
	// Store and Space are the ledger's own; required.
	Store ledger.Store
	Space keyspace.Space
	// Organization whose audit trail takes the attempts to sign in that failed;
	// required.
	Organization authz.Organization
	// AllowedHosts are names, without a port, that a request may have in Host:
	// besides localhost, the loopback addresses and the address that the
	// connection came in on.
	AllowedHosts []string
	// RequestsPerSecond of one token; 0 means 2000. As many again may come at
	// once.
	RequestsPerSecond float64
	// Concurrent requests; 0 means 256. One token may have a quarter of them.
	// Those that wait for the fleet do not count; of them there are four times
	// as many.
	Concurrent int
	// Version of keygate, for the document.
	Version string
	// Logger takes a line for each request; nil discards.
	Logger *slog.Logger
	// Now is the wall clock; nil means time.Now.
	Now func() time.Time
}

const (
	defaultRequestsPerSecond = 2000
	defaultConcurrent        = 256
)

// Server of the API. It is safe for concurrent use.
type Server struct {
	cfg    Config
	gate   gate
	places *places
	waits  chan struct{} // one for each that waits for the fleet
	doc    document
}

// New returns a Server. It talks to nobody yet.
func New(cfg Config) (*Server, error) {
	switch {
	case cfg.Ledger == nil || cfg.Store == nil || cfg.Space == keyspace.Space{}:
		return nil, errors.New("management: the ledger, its store or its space is missing")
	case keyspace.CheckOrganization(cfg.Organization) != nil:
		return nil, keyspace.CheckOrganization(cfg.Organization)
	}
	if cfg.RequestsPerSecond == 0 {
		cfg.RequestsPerSecond = defaultRequestsPerSecond
	}
	if cfg.Concurrent == 0 {
		cfg.Concurrent = defaultConcurrent
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	doc, err := newDocument(cfg.Version)
	if err != nil {
		return nil, err
	}
	return &Server{
		cfg:    cfg,
		gate:   newGate(cfg.RequestsPerSecond),
		places: newPlaces(cfg.Concurrent),
		waits:  make(chan struct{}, 4*cfg.Concurrent),
		doc:    doc,
	}, nil
}

// Handler serves whoever has a token.
func (s *Server) Handler() http.Handler {
	return s.guard(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if s.doc.serve(w, r) {
			return
		}
		s.serve(w, r, s.authenticate)
	}))
}

// Local serves one caller in this process, which reaches the store by itself:
// actor, with every right in every organization and without a token.
func (s *Server) Local(actor audit.Actor) http.Handler {
	all := principal{actor: actor, organization: access.AllOrganizations, all: true}
	return s.observe(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.serve(w, r, func(*http.Request) (principal, error) { return all, nil })
	}))
}
