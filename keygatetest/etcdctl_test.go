package keygatetest_test

import (
	"context"
	"os/exec"
	"strings"
	"testing"
	"time"

	"keygate/authz"
	"keygate/examples/quickstart"
	"keygate/keygatetest"
	"keygate/statestore/keyspace"
)

// Every level is revoked, approved and deleted by the etcdctl that users have,
// over the child's unix socket, and each is seen through Envoy.
func TestEtcdctl(t *testing.T) {
	t.Parallel()
	for _, version := range []struct {
		name, path string
		environ    []string
	}{
		{"3.7", tool(t, "TEST_ETCDCTL", "etcdctl"), nil},
		{"3.4", tool(t, "TEST_ETCDCTL_34", "etcdctl-3.4"), []string{"ETCDCTL_API=3"}},
	} {
		t.Run(version.name, func(t *testing.T) {
			t.Parallel()
			k := keygatetest.Start(t, keygatetest.Options{Child: true, Envoy: true})
			k.ImportQuickstart(t)
			etcdctl := func(args ...string) string {
				t.Helper()
				ctx, cancel := context.WithTimeout(t.Context(), keygatetest.Patience)
				defer cancel()
				cmd := exec.CommandContext(ctx, version.path, append([]string{"--endpoints", k.Child.Endpoint()}, args...)...)
				cmd.Env = append(cmd.Environ(), version.environ...)
				out, err := cmd.CombinedOutput()
				if err != nil {
					t.Fatalf("etcdctl %s: %v: %s", strings.Join(args, " "), err, out)
				}
				return strings.TrimSpace(string(out))
			}
			path := "/orders"
			var slowest time.Duration
			seen := func(want authz.Reason) {
				t.Helper()
				status := map[bool]int{true: 200, false: 401}[want == authz.Allowed]
				var got keygatetest.Reply
				took := keygatetest.Eventually(t, 2*time.Second, want.String()+" through Envoy", func() bool {
					got = k.Get(t, path, header(quickstart.OrdersKey))
					return got.Status == status && (want == authz.Allowed || got.Body == bodies[want])
				})
				slowest = max(slowest, took)
				wantReply(t, got, want)
			}
			seen(authz.Allowed)

			space := k.Settings.Space
			key := keyspace.KeyRecord("default", quickstart.KeyID(quickstart.OrdersKey))
			for _, level := range []struct {
				path, open, closed string
				revoked, deleted   authz.Reason
			}{
				{space.KeyProduct(key, orders), "approved", "revoked", authz.ProductRevoked, authz.ProductNotOnKey},
				{space.KeyProduct(key, orders), "approved", "pending", authz.ProductPending, authz.ProductNotOnKey},
				{space.Status(key), "approved", "revoked", authz.KeyRevoked, authz.RecordUnreadable},
				{space.Status(keyspace.AppRecord("default", quickstart.OrdersApp)), "approved", "revoked", authz.AppRevoked, authz.RecordUnreadable},
				{space.Status(keyspace.DeveloperRecord("default", quickstart.OrdersDeveloper)), "active", "inactive", authz.DeveloperInactive, authz.RecordUnreadable},
			} {
				if got := etcdctl("get", "--print-value-only", level.path); got != level.open {
					t.Errorf("etcdctl get %s: got %q, want %q", level.path, got, level.open)
				}
				etcdctl("put", level.path, level.closed)
				seen(level.revoked)
				etcdctl("put", level.path, level.open)
				seen(authz.Allowed)
				if got := etcdctl("del", level.path); got != "1" {
					t.Errorf("etcdctl del %s: got %q, want 1", level.path, got)
				}
				seen(level.deleted)
				etcdctl("put", level.path, level.open)
				seen(authz.Allowed)
			}
			// The whole record at once, and a word with a blank behind it.
			etcdctl("put", space.Status(key), "approved ")
			seen(authz.RecordUnreadable)
			etcdctl("del", "--prefix", space.Folder(key))
			seen(authz.KeyUnknown)
			// The page's own app: its product is revoked as it was imported.
			path = "/weather"
			wantReply(t, k.Get(t, path, header(quickstart.WeatherKey)), authz.ProductRevoked)
			etcdctl("put", space.KeyProduct(keyspace.KeyRecord("default", quickstart.KeyID(quickstart.WeatherKey)), weather), "approved")
			keygatetest.Eventually(t, 2*time.Second, "the page's key to be allowed", func() bool {
				return k.Get(t, path, header(quickstart.WeatherKey)).Status == 200
			})
			t.Logf("etcdctl %s: slowest change seen through Envoy %v after etcdctl had ended", version.name, slowest.Round(100*time.Microsecond))
		})
	}
}
