package proxy

import (
	"encoding/json"
	"net/http"
)

// Echoed is what the upstream of Echo received.
type Echoed struct {
	Method string `json:"method"`
	// Path with its query, as it stood in the request line.
	Path string `json:"path"`
	Host string `json:"host"`
	// Headers with every copy of each, under Go's spelling of their names.
	Headers http.Header `json:"headers"`
}

// Echo is a small upstream that answers any request with what it received of
// it, an Echoed as JSON. It does not read the body.
func Echo() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		// An error here is a client that has gone.
		_ = enc.Encode(Echoed{Method: r.Method, Path: r.RequestURI, Host: r.Host, Headers: r.Header})
	})
}
