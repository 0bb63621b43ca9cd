package etcdtest

import (
	"net"
	"testing"
)

// A port that somebody took between the choice and the start is told apart from
// other failures, and the cluster starts with other ones.
func TestPortTaken(t *testing.T) {
	t.Parallel()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	taken := l.Addr().(*net.TCPAddr).Port
	for _, test := range []struct {
		name string
		at   int
	}{{"client", 0}, {"peer", 1}} {
		t.Run(test.name, func(t *testing.T) {
			p := &Process{t: t, dataDir: DataDir(t)}
			t.Cleanup(p.end)
			c := &Cluster{t: t, members: []*Process{p}}
			ports := freePorts(t, 2)
			ports[test.at] = taken
			if err := c.start(ports); err == nil || !c.portTaken() {
				t.Fatalf("start on a taken port: got %v, port taken %v, want an error and true", err, c.portTaken())
			}
			c.clear()
			if err := c.start(freePorts(t, 2)); err != nil {
				t.Errorf("start on other ports: got %v, want nil", err)
			}
		})
	}
}
