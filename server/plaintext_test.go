package server

import (
	"slices"
	"testing"

	"keygate/statestore"
)

func TestInPlainText(t *testing.T) {
	for _, test := range []struct {
		name string
		etcd statestore.EtcdConfig
		want []string
	}{
		{"loopback", statestore.EtcdConfig{Endpoints: []string{"http://127.0.0.1:2379", "http://[::1]:2379", "http://localhost:2379"}}, nil},
		{"socket", statestore.EtcdConfig{Endpoints: []string{"unix:///run/etcd.sock"}}, nil},
		{"TLS", statestore.EtcdConfig{Endpoints: []string{"https://etcd-0:2379"}}, nil},
		{"TLS by its certificates", statestore.EtcdConfig{Endpoints: []string{"etcd-0:2379"}, CACert: "ca.crt"}, nil},
		{"network", statestore.EtcdConfig{Endpoints: []string{"http://127.0.0.1:2379", "http://etcd-1:2379"}}, []string{"http://etcd-1:2379"}},
		{"network without a scheme", statestore.EtcdConfig{Endpoints: []string{"10.0.0.7:2379", "127.0.0.1:2379"}}, []string{"10.0.0.7:2379"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := inPlainText(test.etcd); !slices.Equal(got, test.want) {
				t.Errorf("inPlainText(%v) = %v, want %v", test.etcd.Endpoints, got, test.want)
			}
		})
	}
}
