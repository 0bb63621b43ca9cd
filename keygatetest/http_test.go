package keygatetest_test

import (
	"io"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"keygate/authz"
	"keygate/config"
	"keygate/envoy"
	"keygate/envoy/proxy"
	"keygate/envoy/proxy/proxytest"
	"keygate/keygatetest"
	"keygate/keygatetest/etcdtest"
	"keygate/statestore"
)

// Envoy's HTTP ext_authz beside gRPC, at one replica over real records: every
// reason that a record can give is the same answer, a revocation is seen, and
// without keygate nothing passes.
func TestHTTPDoorThroughEnvoy(t *testing.T) {
	t.Parallel()
	var made decisions
	var bootstrap envoy.Bootstrap
	k := keygatetest.Start(t, keygatetest.Options{Envoy: true, OnDecision: made.add,
		Settings: func(c *config.Config) { c.AuthzHTTPListen = config.Address{Network: "tcp", Address: "127.0.0.1:0"} },
		Bootstrap: func(b *envoy.Bootstrap) {
			b.Routes = append(b.Routes, envoy.Route{Prefix: "/unnamed"},
				envoy.Route{Prefix: "/any", Products: []string{string(orders), string(weather)}},
				envoy.Route{Prefix: "/acme", Products: []string{string(weather)}, Organization: "acme"})
			bootstrap = *b
		}})
	doors := map[string]*proxy.Proxy{"gRPC": k.Envoy}
	bootstrap.Authz = []string{k.Server.AuthzHTTPAddr()}
	for _, version := range []string{envoy.DoorHTTP1, envoy.DoorHTTP2} {
		bootstrap.HTTP = version
		doors[version] = proxytest.MustStart(t, bootstrap)
	}
	// through makes a door the one that k.Get goes through.
	through := func(name string) { k.Envoy = doors[name] }

	product := func(status string) map[authz.ProductName]string {
		return map[authz.ProductName]string{weather: status}
	}
	const acme = "key-of-another-organization"
	keys := []struct {
		key  keygatetest.Key
		want authz.Reason
	}{
		{keygatetest.Key{Scopes: []string{"read", "write"}}, authz.Allowed},
		{keygatetest.Key{Status: "revoked", AppStatus: "revoked"}, authz.KeyRevoked},
		{keygatetest.Key{Status: "pending"}, authz.KeyPending},
		{keygatetest.Key{ExpiresAt: 1}, authz.KeyExpired},
		{keygatetest.Key{AppStatus: "revoked"}, authz.AppRevoked},
		{keygatetest.Key{AppStatus: "pending"}, authz.AppPending},
		{keygatetest.Key{DeveloperStatus: "inactive"}, authz.DeveloperInactive},
		{keygatetest.Key{Products: product("revoked")}, authz.ProductRevoked},
		{keygatetest.Key{Products: product("pending")}, authz.ProductPending},
		{keygatetest.Key{Products: product(keygatetest.Absent)}, authz.ProductNotOnKey},
		{keygatetest.Key{Status: "aproved"}, authz.RecordUnreadable},
	}
	all := []keygatetest.Key{{Key: acme, Organization: "acme"}}
	for i := range keys {
		keys[i].key.Key = "key-at-both-doors-000000" + string(rune('a'+i))
		all = append(all, keys[i].key)
	}
	k.PutKeys(t, all...)
	good := keys[0].key

	for name := range doors {
		through(name)
		ask := func(path string, want authz.Reason, headers ...string) keygatetest.Reply {
			passed := k.Passed()
			got := k.Get(t, path, headers...)
			if reason := made.last().Reason; reason != want {
				t.Errorf("%s: %s: got %v, want %v", name, path, reason, want)
				return got
			}
			wantReply(t, got, want)
			if reached := k.Passed() > passed; reached != (want == authz.Allowed) {
				t.Errorf("%s: %s, %v: upstream reached: got %v, want %v", name, path, want, reached, !reached)
			}
			return got
		}
		for _, one := range keys {
			ask("/weather", one.want, header(one.key.Key))
		}
		ask("/weather", authz.KeyMissing)
		ask("/weather", authz.KeyMalformed, header(good.Key), header(good.Key))
		ask("/weather", authz.KeyMalformed, header(good.Key+","+good.Key))
		ask("/weather", authz.KeyUnknown, header("no-such-key-at-any-door0"))
		ask("/orders", authz.ProductNotOnKey, header(good.Key))
		ask("/any", authz.Allowed, header(good.Key))
		ask("/unnamed", authz.ProductUnresolved, header(good.Key), "x-keygate-product: "+string(weather))
		ask("/no/such/route", authz.ProductUnresolved, header(good.Key))
		ask("/v1/check/product/"+string(weather), authz.ProductUnresolved, header(good.Key))
		ask("/acme", authz.KeyUnknown, header(good.Key))
		ask("/acme", authz.Allowed, header(acme))
		got := ask("/weather", authz.Allowed, header(good.Key), "x-keygate-app: evil", "X-Keygate-Organization: evil")
		for h, want := range map[string][]string{
			"X-Keygate-Organization": {"default"}, "X-Keygate-App": {"app-" + keygatetest.KeyID(t, good.Key).String()[:8]}, "X-Keygate-Product": {string(weather)},
			"X-Keygate-Key-Id": {keygatetest.KeyID(t, good.Key).String()}, "X-Keygate-Scopes": {"read write"}, "X-Api-Key": nil,
		} {
			if v := got.Upstream.Headers[h]; !slices.Equal(v, want) {
				t.Errorf("%s: %s: the upstream saw %q, want %q", name, h, v, want)
			}
		}
	}

	// A revocation at any level is seen through every door as soon as it is applied.
	space := k.Settings.Space
	for _, step := range []struct {
		path, word string
		want       int
	}{
		{space.Status(good.Record(t)), "revoked", 401}, {space.Status(good.Record(t)), "approved", 200},
		{space.Status(good.AppRecord(t)), "revoked", 401}, {space.Status(good.AppRecord(t)), "approved", 200},
		{space.Status(good.DeveloperRecord(t)), "inactive", 401}, {space.Status(good.DeveloperRecord(t)), "active", 200},
		{space.KeyProduct(good.Record(t), weather), "revoked", 401}, {space.KeyProduct(good.Record(t), weather), "approved", 200},
	} {
		k.Applied(t, k.Put(t, step.path, step.word))
		for name := range doors {
			through(name)
			if got := k.Get(t, "/weather", header(good.Key)); got.Status != step.want {
				t.Errorf("%s: %s is %s: got %d, want %d", name, step.path, step.word, got.Status, step.want)
			}
		}
	}

	k.Stop(t)
	passed := k.Passed()
	for name := range doors {
		through(name)
		if got := k.Get(t, "/weather", header(good.Key)); got.Status != http.StatusServiceUnavailable {
			t.Errorf("%s: without keygate: got %d, want 503", name, got.Status)
		}
	}
	if k.Passed() != passed {
		t.Error("a request passed without keygate")
	}
}

// A replica that stops says so first, goes on answering for the drain, and Envoy
// has turned to the other one by then: no request fails.
func TestHTTPDoorDrains(t *testing.T) {
	t.Parallel()
	settings := func(c *config.Config) { c.AuthzHTTPListen = config.Address{Network: "tcp", Address: "127.0.0.1:0"} }
	etcd := statestore.EtcdConfig{Endpoints: []string{etcdtest.Start(t).Endpoint()}}
	leaving := keygatetest.Start(t, keygatetest.Options{Etcd: etcd, Settings: settings, Drain: 2 * time.Second})
	var bootstrap envoy.Bootstrap
	k := keygatetest.Start(t, keygatetest.Options{Etcd: etcd, Settings: settings, Envoy: true, Bootstrap: func(b *envoy.Bootstrap) { bootstrap = *b }})
	const key = "key-while-a-replica-stops"
	revision := k.PutKeys(t, keygatetest.Key{Key: key})
	k.Applied(t, revision)
	leaving.Applied(t, revision)
	bootstrap.Authz = []string{leaving.Server.AuthzHTTPAddr(), k.Server.AuthzHTTPAddr()}
	var wg sync.WaitGroup
	stopped := make(chan struct{})
	for _, version := range []string{envoy.DoorHTTP1, envoy.DoorHTTP2} {
		bootstrap.HTTP = version
		url := proxytest.MustStart(t, bootstrap).URL() + "/weather"
		for range 4 {
			wg.Go(func() {
				n := 0
				for ended := false; !ended; n++ {
					select {
					case <-stopped:
						ended = true // after one more
					default:
					}
					req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
					if err != nil {
						t.Error(err)
						return
					}
					req.Header.Set("x-api-key", key)
					resp, err := http.DefaultClient.Do(req)
					if err != nil {
						t.Errorf("%s: %v", version, err)
						return
					}
					_, _ = io.Copy(io.Discard, resp.Body)
					_ = resp.Body.Close()
					if resp.StatusCode != http.StatusOK {
						t.Errorf("%s: request %d: got %s, want 200", version, n, resp.Status)
					}
					time.Sleep(2 * time.Millisecond) // a pace, no wait
				}
			})
		}
	}
	health := "http://" + leaving.Server.AuthzHTTPAddr() + envoy.HTTPHealthPath
	if code, err := statusOf(health); code != http.StatusNoContent {
		t.Errorf("health before the stop: got %d, %v, want 204", code, err)
	}
	leaving.Terminate()
	keygatetest.Eventually(t, keygatetest.Patience, "health to say that the replica stops", func() bool {
		code, _ := statusOf(health)
		return code == http.StatusServiceUnavailable
	})
	leaving.Stop(t)
	close(stopped)
	wg.Wait()
	if _, err := statusOf(health); err == nil {
		t.Error("the listener is still there after the stop")
	}
}

func statusOf(url string) (int, error) {
	resp, err := http.Get(url)
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}
