package ledger_test

import (
	"testing"
	"time"

	"keygate/authz"
	"keygate/config"
	"keygate/keygatetest"
	"keygate/keygatetest/etcdtest"
	"keygate/ledger"
	"keygate/statestore"
)

// Over real replicas: after a receipt none of them says yes, also the one that
// is cut off and said nothing.
func TestReceiptOfRealReplicas(t *testing.T) {
	const n, budget = 3, 5 * time.Second
	s := newStore(t).prepared()
	s.set(keyFolder+"products/Weather-Product", "approved")
	var fleet []*keygatetest.Keygate
	var proxies []*etcdtest.Proxy
	for range n {
		p := etcdtest.NewProxy(t, s.kv.Endpoints()[0])
		proxies = append(proxies, p)
		fleet = append(fleet, keygatetest.Start(t, keygatetest.Options{
			Etcd:     statestore.EtcdConfig{Endpoints: []string{p.Endpoint()}},
			Writer:   s.kv,
			Settings: func(c *config.Config) { c.Organization, c.StalenessBudget = org, budget },
		}))
	}
	ask := func(k *keygatetest.Keygate) authz.Reason {
		a := authz.Authorizer{Source: k.Server.Store()}
		return a.Decide(s.ctx(), authz.Request{Organization: org, KeyID: weatherID, Products: []authz.ProductName{"Weather-Product"}}).Reason
	}
	for _, k := range fleet {
		keygatetest.Eventually(t, keygatetest.Patience, "a replica to allow", func() bool { return ask(k) == authz.Allowed })
	}
	for range 20 {
		c := s.mustSet(ledger.Revoke, keyTarget)
		r, err := c.Wait(s.ctx())
		for i, k := range fleet {
			if got := ask(k); got != authz.KeyRevoked {
				t.Errorf("replica %d: got %v after the receipt, want key_revoked", i, got)
			}
		}
		if err != nil || r.Count(ledger.Applied) != n {
			t.Errorf("got %+v, %v: want %d applied", r, err, n)
		}
		t.Logf("applied on %d, slowest %v", r.Count(ledger.Applied), r.Slowest())
		if r, err := s.mustSet(ledger.Approve, keyTarget).Wait(s.ctx()); err != nil || r.Count(ledger.Applied) != n {
			t.Errorf("approve: got %+v, %v", r, err)
		}
		for i, k := range fleet {
			if got := ask(k); got != authz.Allowed {
				t.Errorf("replica %d: got %v after an approval's receipt, want allowed", i, got)
			}
		}
	}

	proxies[1].Freeze()
	began := time.Now()
	r, err := s.mustSet(ledger.Revoke, keyTarget).Wait(s.ctx())
	took := time.Since(began)
	for i, k := range fleet {
		if got := ask(k); got == authz.Allowed || i == 1 && got != authz.Stale {
			t.Errorf("replica %d: got %v after the receipt", i, got)
		}
	}
	if err != nil || r.Count(ledger.Applied) != n-1 || r.Count(ledger.Fenced) != 1 || took < budget {
		t.Errorf("got %+v, %v after %v: want one fenced after %v", r, err, took, budget+time.Second)
	}
	proxies[1].Thaw()
}
