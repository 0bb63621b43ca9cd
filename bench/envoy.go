package main

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"time"

	"keygate/bench/load"
	"keygate/envoy"
	"keygate/envoy/proxy"
	"keygate/examples/quickstart"
)

// envoyRate of requests a second, at which two processors have room for Envoy,
// the server, the upstream and the generator.
const envoyRate = 1000

// Connections of the client to Envoy, and requests in flight on each of them
// when it is saturated.
const (
	envoyConnections = 4
	envoyStreams     = 8
)

// envoyKeys is how many keys there are; api_key_auth has them in its
// configuration.
const envoyKeys = 100

// way of checking a request in Envoy.
type way struct {
	name string
	// authz address that Envoy asks, and the process that answers there; nil if it
	// asks nobody.
	authz  string
	server *process
	// bootstrap may change the hardened configuration, before and after it is
	// rendered.
	bootstrap func(*envoy.Bootstrap)
	edit      func(filters []any) ([]any, error)
}

// runEnvoy measures requests through a real Envoy: without any check, with
// Envoy's own api_key_auth in its process, and with ext_authz.
func runEnvoy(ctx context.Context, b *bench) (*Result, error) {
	binary, err := b.build(ctx, "./cmd/keygate")
	if err != nil {
		return nil, err
	}
	noop, err := b.noop(ctx)
	if err != nil {
		return nil, err
	}
	defer noop.stop()
	upstream, err := b.noop(ctx)
	if err != nil {
		return nil, err
	}
	defer upstream.stop()
	keygate, err := b.seeded(ctx, binary, envoyKeys, "--authz-http-listen", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer keygate.stop()
	door := httpDoor.FindStringSubmatch(keygate.log.String())
	if door == nil {
		return nil, fmt.Errorf("keygate does not say where its HTTP door is:\n%s", keygate.log)
	}
	return b.ways(ctx, upstream.health, []way{
		{name: "no auth", authz: noop.authz, edit: func(filters []any) ([]any, error) { return filters[1:], nil }},
		{name: "api_key_auth", authz: noop.authz, edit: apiKeyAuth},
		{name: "no-op, gRPC", authz: noop.authz, server: noop},
		{name: "keygate, gRPC", authz: keygate.authz, server: keygate},
		{name: "keygate, HTTP/1.1", authz: door[1], server: keygate, bootstrap: func(b *envoy.Bootstrap) { b.HTTP = envoy.DoorHTTP1 }},
	})
}

var httpDoor = regexp.MustCompile(`HTTP ext_authz is served","address":"([^"]+)"`)

// apiKeyAuth puts Envoy's own filter, with all keys, where ext_authz was.
func apiKeyAuth(filters []any) ([]any, error) {
	var credentials []any
	for i := range envoyKeys {
		credentials = append(credentials, map[string]any{"key": keyText(i), "client": fmt.Sprintf("app-%d", i/keysPerApp)})
	}
	filters[0] = map[string]any{"name": "envoy.filters.http.api_key_auth", "typed_config": map[string]any{
		"@type":       "type.googleapis.com/envoy.extensions.filters.http.api_key_auth.v3.ApiKeyAuth",
		"credentials": credentials,
		"key_sources": []any{map[string]any{"header": envoy.DefaultKeyHeader}},
	}}
	return filters, nil
}

// ways measures each way by turns. The first is what the others are compared
// with.
func (b *bench) ways(ctx context.Context, upstream string, ways []way) (*Result, error) {
	result := &Result{
		Title: "Through a real Envoy",
		About: []string{
			"A client sends a request with 13 headers over HTTP/2 to an Envoy with one worker, which asks the server and forwards to an upstream that answers 200, all on one machine.",
			"The configuration is the hardened one; for the first two rows its ext_authz filter is removed, or replaced by Envoy's own api_key_auth, which knows a list of keys from its configuration and nothing of apps, developers and products.",
			fmt.Sprintf("Latencies are at %s requests a second on %d connections, from the time at which a request should have been sent. CPU time is that of Envoy and of the server together.", number(envoyRate), envoyConnections),
			fmt.Sprintf("Saturated means a closed loop with %d requests in flight on each connection.", envoyStreams),
		},
	}
	var subjects []string
	figures := []Figure{
		{Name: "p50", Unit: "µs"}, {Name: "p99", Unit: "µs"},
		{Name: "added p50", Unit: "µs", Plain: true}, {Name: "added p99", Unit: "µs", Plain: true},
		{Name: "CPU a request", Unit: "µs"}, {Name: "CPU a request, saturated", Unit: "µs"}, {Name: "saturated", Unit: "requests/s"},
	}
	for i := range figures {
		figures[i].Values = make([][]float64, len(ways))
	}
	request, err := load.NewRequest(clientRequest())
	if err != nil {
		return nil, err
	}
	generators, pids := make([]*load.Generator, len(ways)), make([][]int, len(ways))
	for i, w := range ways {
		subjects = append(subjects, w.name)
		bootstrap := envoy.Bootstrap{Listen: "127.0.0.1:0", Authz: []string{w.authz}, Upstream: upstream, Routes: envoy.QuickstartRoutes()}
		if w.bootstrap != nil {
			w.bootstrap(&bootstrap)
		}
		config := proxy.Config{Binary: b.envoy, Bootstrap: bootstrap, Concurrency: 1}
		if w.edit != nil {
			config.Edit = func(bootstrap []byte) ([]byte, error) { return editFilters(bootstrap, w.edit) }
		}
		p, err := proxy.Start(ctx, config)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", w.name, err)
		}
		defer p.Stop()
		pids[i] = []int{p.Pid()}
		if w.server != nil {
			pids[i] = append(pids[i], w.server.pid())
		}
		g, err := load.Dial(load.Config{Address: p.Address(), Connections: envoyConnections, Request: request, Key: cycle(envoyKeys)})
		if err != nil {
			return nil, err
		}
		defer g.Close()
		generators[i] = g
		if _, _, err := b.runOn(ctx, w.name, g, load.Plan{Streams: envoyStreams, Duration: min(time.Second, b.duration)}, pids[i]); err != nil {
			return nil, fmt.Errorf("warm %s up: %w", w.name, err)
		}
	}
	for round := range b.rounds {
		for i, w := range ways {
			paced, pacedCPU, err := b.runOn(ctx, w.name, generators[i], load.Plan{Rate: envoyRate, Duration: b.duration}, pids[i])
			if err != nil {
				return nil, fmt.Errorf("%s: %w", w.name, err)
			}
			saturated, saturatedCPU, err := b.runOn(ctx, w.name, generators[i], load.Plan{Streams: envoyStreams, Duration: b.duration}, pids[i])
			if err != nil {
				return nil, fmt.Errorf("%s: %w", w.name, err)
			}
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			a, s := window{Result: paced, cpu: pacedCPU}, window{Result: saturated, cpu: saturatedCPU}
			p50, p99 := a.quantile(0.5), a.quantile(0.99)
			added := func(figure int, v float64) float64 {
				if i == 0 {
					return 0
				}
				return v - figures[figure].Values[0][round]
			}
			for f, v := range []float64{p50, p99, added(0, p50), added(1, p99), a.cpuPerCheck(), s.cpuPerCheck(), s.perSecond()} {
				figures[f].Values[i] = append(figures[f].Values[i], v)
			}
			b.progress("round %d/%d, %s: p50 %.0f µs, p99 %.0f µs, %.0f µs of CPU; saturated %.0f µs of CPU, %.0f/s", round+1, b.rounds, w.name,
				p50, p99, a.cpuPerCheck(), s.cpuPerCheck(), s.perSecond())
		}
	}
	const ofLatency = 4
	result.Tables = []Table{
		{Title: "Latency at " + number(envoyRate) + "/s", Subjects: subjects, Figures: figures[:ofLatency]},
		{Title: "Cost", Subjects: subjects, Figures: figures[ofLatency:]},
	}
	return result, nil
}

// runOn runs a plan and tells the CPU time that some processes took meanwhile.
func (b *bench) runOn(ctx context.Context, name string, g *load.Generator, plan load.Plan, pids []int) (load.Result, time.Duration, error) {
	all := func() (sum time.Duration, err error) {
		for _, pid := range pids {
			d, err := processCPU(pid)
			if err != nil {
				return 0, err
			}
			sum += d
		}
		return sum, nil
	}
	before, err := all()
	if err != nil {
		return load.Result{}, 0, err
	}
	r, err := g.Run(ctx, plan)
	if err != nil {
		return r, 0, err
	}
	after, err := all()
	if err == nil && ctx.Err() == nil {
		err = b.accept(name, r)
	}
	return r, after - before, err
}

// clientRequest is what a client sends to Envoy.
func clientRequest() load.Captured {
	c := load.Captured{Key: quickstart.OrdersKey, Headers: []load.Header{
		{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "http"},
		{Name: ":authority", Value: "api.example.com"}, {Name: ":path", Value: "/weather/forecast?city=Paris"},
	}}
	for _, h := range clientHeaders {
		c.Headers = append(c.Headers, load.Header{Name: strings.ToLower(h[0]), Value: h[1]})
	}
	return c
}
