package faults

import (
	"context"
	"strings"
	"testing"
	"time"

	"keygate/keygatetest/etcdtest"
	"keygate/keygatetest/variant"
)

// The network between the replicas and etcd flips bits. With TLS that is a
// connection that ends, and nothing else. Without, a flipped bit in the path of
// an event is a revocation that is never heard of: it is the guard here, and why
// keygate warns of plain text.
func TestCorruptNetwork(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "corrupt network", Faults: "one bit in about 16 kB is flipped on every link to etcd, under TLS",
		Guarantees: []Guarantee{G3, G5, G7, G8},
		Options:    Options{Keys: 160, TLS: true},
		Run:        corruptNetwork,
		Guards: []Guard{{
			Name: "TLS to etcd", Guarantee: G8,
			Options: func(o *Options) { o.TLS = false },
		}},
	})
}

func corruptNetwork(w *World) {
	w.Checks(600)
	w.Wait(500 * time.Millisecond)
	over := w.Fault(Everyone, "bits are flipped on every link")
	for _, r := range w.Replicas {
		for _, l := range r.Links {
			l.Corrupt(16 << 10)
		}
	}
	changes := w.Changes(100)
	up, looks := 0, 0
	for end := w.Rec.Now() + w.For(6*time.Second, 40*time.Second); w.Rec.Now() < end; w.Wait(50 * time.Millisecond) {
		for _, r := range w.Replicas {
			if code, _, _ := r.Ask("/readyz"); code == 200 {
				up++
			}
			looks++
		}
	}
	changes.Stop()
	w.Wait(w.Options.S) // for what has not been heard of
	for _, r := range w.Replicas {
		for _, l := range r.Links {
			l.Heal()
		}
	}
	for i, r := range w.Replicas {
		w.Eventually(G3, 15*time.Second, "a replica to be ready again", func() bool { code, _, _ := r.Ask("/readyz"); return code == 200 })
		w.Expect(G3, r.Running(), "replica %d has ended", i)
	}
	over()
	failed := 0.0
	for _, r := range w.Replicas {
		for _, name := range []string{"keygate_probe_errors_total", "keygate_load_errors_total", "keygate_acknowledgement_errors_total", "keygate_watches_replaced_total"} {
			n, _ := r.Metric(name)
			failed += n
		}
	}
	w.Figure(G3, "corrupt network: replicas ready meanwhile", "%d %% of the time, %.0f calls failed", 100*up/max(looks, 1), failed)
}

// What the replicas show to etcd is taken from them while they run: the
// password is changed, the token with it, the certificate ends. With the new one
// in the file they go on, without a restart; without it they refuse, and say why.
func TestCredentials(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "credentials", Faults: "etcd password changed, token void, client certificate expired and renewed while replicas run",
		Guarantees: []Guarantee{G3, G5},
		Options:    Options{Keys: 16, Replicas: 2, TLS: true},
		Run:        credentials,
		Guards: []Guard{
			{
				Name: "the password file, read again", Guarantee: G3,
				Mutations: []variant.Mutation{{File: "cmd/keygate/reach.go", Old: "User: cfg.EtcdUser, ReadPassword: cfg.EtcdPassword,",
					New: "User: cfg.EtcdUser, Password: func() string { p, _ := cfg.EtcdPassword(); return p }(),"}},
			},
			{
				Name: "the certificate's file, read again", Guarantee: G3,
				Mutations: []variant.Mutation{{File: "statestore/etcd.go",
					Old: "t.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }",
					New: "var once *tls.Certificate\n\t\tt.GetClientCertificate = func(*tls.CertificateRequestInfo) (_ *tls.Certificate, err error) {\n\t\t\tif once == nil {\n\t\t\t\tonce, err = load()\n\t\t\t}\n\t\t\treturn once, err\n\t\t}"}},
			},
		},
	})
}

func credentials(w *World) {
	w.Checks(200)
	w.Changes(10)
	ready := func(r *Replica) bool { code, _, _ := r.Ask("/readyz"); return code == 200 }
	change := func(password string) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if _, err := w.Client.UserChangePassword(ctx, etcdtest.ReplicaUser, password); err != nil {
			w.T.Fatalf("change the password: %v", err)
		}
	}
	refuses := func(r *Replica, word string) {
		w.Eventually(G3, 2*w.Options.S+3*time.Second, "the replica to refuse", func() bool { return !ready(r) })
		_, body, _ := r.Ask("/readyz?verbose")
		_, ok := w.Eventually(G3, 3*time.Second, "a cause with the word "+word, func() bool { _, body, _ = r.Ask("/readyz?verbose"); return strings.Contains(body, word) })
		if !ok {
			w.Note("it says: %s", body)
		}
	}
	first, second := w.Replicas[0], w.Replicas[1]
	within := w.Options.S + 5*time.Second
	var back Times
	for n := range w.Rounds(1, 2) {
		// The same password, said again: every token is void, and no more.
		over := w.Fault(Everyone, "tokens are void")
		change(etcdtest.ReplicaPassword)
		w.Wait(time.Second)
		for _, r := range w.Replicas {
			w.Eventually(G3, within, "a replica to log in again", func() bool { return ready(r) })
		}
		over()

		// Another password; one replica's file has it, the other's later.
		over = w.Fault(Everyone, "password changed")
		password := "another-password-" + strings.Repeat("x", n)
		first.SetPassword(password)
		change(password)
		if n == 0 {
			refuses(second, "authentication failed")
		}
		w.Eventually(G3, within, "the replica whose file has the new password to be ready", func() bool { return ready(first) })
		second.SetPassword(password)
		took, _ := w.Eventually(G3, within, "the replica to log in with the new password", func() bool { return ready(second) })
		back.Add(took)
		for _, r := range w.Replicas {
			r.SetPassword(etcdtest.ReplicaPassword)
		}
		change(etcdtest.ReplicaPassword)
		for _, r := range w.Replicas {
			w.Eventually(G3, within, "a replica to log in with the old password again", func() bool { return ready(r) })
		}
		over()

		// A certificate ends. It counts at the next connection.
		over = w.Fault(second.Index, "replica %d's certificate expires", second.Index)
		var ends time.Time
		for lasts := 4 * time.Second; ; lasts *= 2 { // a machine that is busy needs longer for a start
			ends = time.Now().Add(lasts)
			second.SetCertificate(w.TLS.Files.NewClient(ends))
			second.Kill()
			second.Start()
			for !ready(second) && time.Now().Before(ends) {
				w.Wait(10 * time.Millisecond)
			}
			if time.Now().Before(ends) || w.T.Context().Err() != nil {
				break
			}
		}
		w.Wait(time.Until(ends) + 1500*time.Millisecond) // certificates count in seconds
		w.Expect(G3, ready(second), "a connection that stands is no worse for its certificate's end")
		for _, l := range second.Links {
			l.Cut()
		}
		refuses(second, "certificate")
		second.SetCertificate(w.TLS.Files.ClientCert, w.TLS.Files.ClientKey)
		took, _ = w.Eventually(G3, within, "the replica to connect with the renewed certificate", func() bool { return ready(second) })
		back.Add(took)
		over()
	}
	w.Figure(G3, "credentials: goes on after the new one was there", "%v", &back)
}
