package server

import (
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"keygate/statestore"
)

// Status is the JSON of /status.
type Status struct {
	Version string `json:"version"`
	// Ready tells whether the replica should be sent checks.
	Ready   bool   `json:"ready"`
	Problem string `json:"problem,omitempty"`
	// UptimeSeconds since the process was made.
	UptimeSeconds float64 `json:"uptimeSeconds"`
	Etcd          struct {
		Endpoints []string `json:"endpoints"`
		Embedded  bool     `json:"embedded"`
		Pid       int      `json:"pid,omitempty"`
		Restarts  int      `json:"restarts"`
	} `json:"etcd"`
	Store statestore.Status `json:"store"`
}

// Status of the replica, now.
func (s *Server) Status() Status {
	st := Status{Version: s.cfg.Version, Ready: true, UptimeSeconds: time.Since(s.began).Seconds(), Store: s.store.Status()}
	if err := s.ready(); err != nil {
		st.Ready, st.Problem = false, err.Error()
	}
	st.Etcd.Endpoints = s.cfg.Etcd.Endpoints
	if c := s.cfg.Child; c != nil {
		st.Etcd.Embedded, st.Etcd.Pid, st.Etcd.Restarts = true, c.Pid(), c.Restarts()
	}
	return st
}

// newHTTP returns the server of health, metrics and version, with the paths and
// meanings that Kubernetes gives them.
func (s *Server) newHTTP() *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", s.readyz)
	mux.HandleFunc("GET /healthz", s.readyz)
	mux.HandleFunc("GET /version", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, map[string]string{"version": s.cfg.Version})
	})
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, s.Status()) })
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.metrics.registry, promhttp.HandlerOpts{}))
	return &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		WriteTimeout:      10 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
	}
}

// readyz answers 200 only under a proof; ?verbose says of each part how it is.
func (s *Server) readyz(w http.ResponseWriter, r *http.Request) {
	st := s.Status()
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	if !st.Ready {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	line := func(ok bool, format string, args ...any) {
		mark := map[bool]string{true: "[+]", false: "[-]"}[ok]
		fmt.Fprintf(w, mark+format+"\n", args...)
	}
	if r.URL.Query().Has("verbose") {
		line(!s.draining.Load(), "accepting checks")
		if st.Etcd.Embedded {
			line(st.Etcd.Pid != 0, "embedded etcd: pid %d, %d restarts", st.Etcd.Pid, st.Etcd.Restarts)
		}
		if st.Store.ProofAge < 0 {
			line(false, "proof of freshness: none yet, staleness budget %v", st.Store.StalenessBudget)
		} else {
			line(st.Store.Fresh, "proof of freshness: %.3f s old, staleness budget %v", st.Store.ProofAge.Seconds(), st.Store.StalenessBudget)
		}
		switch st.Store.Registration {
		case statestore.RegistrationOff:
			line(true, "registration: off, outside the fleet's receipts")
		case statestore.Registered:
			line(true, "registration: %s, acknowledged revision %d", st.Store.ReplicaID, st.Store.Acknowledged)
		default:
			line(false, "registration: none")
		}
		switch st.Store.Index {
		case statestore.IndexReady:
			line(true, "index: %d records", st.Store.IndexRecords)
		case statestore.IndexOff, statestore.IndexFull: // no fault
			line(true, "index: %s, records are read through the cache", st.Store.Index)
		default:
			line(false, "index: %s, %d records so far; they are read through the cache", st.Store.Index, st.Store.IndexRecords)
		}
		line(st.Store.AppliedRevision > 0, "watch: applied revision %d, %d gaps", st.Store.AppliedRevision, st.Store.Gaps)
	}
	if st.Ready {
		fmt.Fprintln(w, "ok")
	} else {
		fmt.Fprintln(w, "not ready: "+st.Problem)
	}
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	_ = e.Encode(v) // the client has gone, or the answer is whole
}
