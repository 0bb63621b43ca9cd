// Package proxytest gives tests the pinned Envoy.
package proxytest

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"keygate/envoy"
	"keygate/envoy/proxy"
)

// Binary returns the path of the Envoy that tests run: $TEST_ENVOY,
// else .tools/envoy beside go.mod. A test without one fails.
func Binary(tb testing.TB) string {
	tb.Helper()
	if path := os.Getenv("TEST_ENVOY"); path != "" {
		if _, err := os.Stat(path); err != nil {
			tb.Fatalf("$TEST_ENVOY: %v; run `make tools`", err)
		}
		return path
	}
	dir, err := os.Getwd()
	if err != nil {
		tb.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			tb.Fatal("no go.mod above the test's folder, so no .tools/envoy; set TEST_ENVOY")
		}
		dir = parent
	}
	path := filepath.Join(dir, ".tools", "envoy")
	if _, err := os.Stat(path); err != nil {
		tb.Fatalf("no Envoy for tests: %v; run `make tools`", err)
	}
	return path
}

// MustStart runs the test's Envoy with one worker, on a port of Envoy's choice
// unless b says otherwise, and stops it when the test ends.
func MustStart(tb testing.TB, b envoy.Bootstrap) *proxy.Proxy {
	tb.Helper()
	if b.Listen == "" {
		b.Listen = "127.0.0.1:0"
	}
	// Not the test's context: that ends before its cleanups run.
	p, err := proxy.Start(context.Background(), proxy.Config{Binary: Binary(tb), Bootstrap: b, Concurrency: 1})
	if err != nil {
		tb.Fatalf("start Envoy: %v", err)
	}
	tb.Cleanup(p.Stop)
	return p
}
