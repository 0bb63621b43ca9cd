package keygatetest_test

import (
	"testing"

	"keygate/config"
	"keygate/keygatetest"
	"keygate/server"
	"keygate/statestore"
)

// startError is what server.New says of settings and an etcd.
func startError(t *testing.T, edit func(*config.Config), etcd statestore.EtcdConfig) error {
	t.Helper()
	settings := keygatetest.Settings()
	if edit != nil {
		edit(settings)
	}
	s, err := server.New(server.Config{Settings: settings, Etcd: etcd})
	if err == nil {
		s.Close()
	}
	return err
}
