package ledger

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/audit"
	"keygate/authz"
	"keygate/statestore/keyspace"
)

const (
	// onceFor is how long at least the answer to a request is kept.
	onceFor = 24 * time.Hour
	// onceShared is how long a lease takes further answers: one lease for each
	// would cost etcd more than the answers.
	onceShared = time.Hour
	// MaxOnceKey of an Idempotency-Key, in bytes.
	MaxOnceKey = 255
)

// Once makes a change that is asked for twice happen once: the answer is kept
// for a day, in the transaction of the change.
type Once struct {
	// Key as the client gave it. It is not stored: the answer is sealed under
	// it, for it may hold a secret that is shown once.
	Key string
	// Request is a hash of everything that makes two requests the same.
	Request [32]byte
	// Body renders the answer.
	Body func(result any) ([]byte, error)
}

// kept is the stored form.
type kept struct {
	Version int    `json:"v"`
	Request string `json:"request"`
	Answer  []byte `json:"answer"` // nonce and AES-256-GCM
}

// digest derives what the key is used for; actors do not share keys.
func (o *Once) digest(use string, actor audit.Actor) [32]byte {
	return sha256.Sum256(fmt.Appendf(nil, "keygate %s\x00%s\x00%s\x00%s\x00%s", use, actor.Kind, actor.Token, actor.Name, o.Key))
}

func (o *Once) path(space keyspace.Space, org authz.Organization, actor audit.Actor) string {
	name := o.digest("name", actor)
	return space.Once(org, hex.EncodeToString(name[:16]))
}

// aead under the key. Whoever does not know the key cannot derive it from the
// path: both are hashes of it.
func (o *Once) aead(actorless string) (cipher.AEAD, error) {
	secret := sha256.Sum256(fmt.Appendf(nil, "keygate answer\x00%s\x00%s", actorless, o.Key))
	block, err := aes.NewCipher(secret[:])
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// replay returns the answer that was kept.
func (o *Once) replay(value string) ([]byte, error) {
	var k kept
	if err := json.Unmarshal([]byte(value), &k); err != nil || k.Version != keyspace.Version {
		return nil, errors.New("the answer that was kept for this Idempotency-Key cannot be read; use another key")
	}
	if k.Request != hex.EncodeToString(o.Request[:]) {
		return nil, errorf(Mismatch, "keygate.idempotency_key", "this Idempotency-Key was used for another request: use a new one")
	}
	aead, err := o.aead(k.Request)
	if err != nil {
		return nil, err
	}
	if len(k.Answer) < aead.NonceSize() {
		return nil, errors.New("the answer that was kept for this Idempotency-Key is damaged; use another key")
	}
	answer, err := aead.Open([]byte{}, k.Answer[:aead.NonceSize()], k.Answer[aead.NonceSize():], nil)
	if err != nil {
		return nil, errors.New("the answer that was kept for this Idempotency-Key is damaged; use another key")
	}
	return answer, nil
}

// keepOnce returns the write that keeps the answer.
func (l *Ledger) keepOnce(ctx context.Context, o *Once, org authz.Organization, actor audit.Actor, result any) (clientv3.Op, error) {
	answer := []byte{}
	if o.Body != nil {
		var err error
		if answer, err = o.Body(result); err != nil {
			return clientv3.Op{}, err
		}
	}
	k := kept{Version: keyspace.Version, Request: hex.EncodeToString(o.Request[:])}
	aead, err := o.aead(k.Request)
	if err != nil {
		return clientv3.Op{}, err
	}
	nonce := make([]byte, aead.NonceSize())
	_, _ = rand.Read(nonce) // never fails
	k.Answer = aead.Seal(nonce, nonce, answer, nil)
	value, err := json.Marshal(k)
	if err != nil {
		return clientv3.Op{}, err
	}
	lease, err := l.once.lease(ctx, l.store)
	if err != nil {
		return clientv3.Op{}, fmt.Errorf("lease for the answer: %w", err)
	}
	return clientv3.OpPut(o.path(l.space, org, actor), string(value), clientv3.WithLease(lease)), nil
}

// onceLease hands out a lease that lives for onceFor at least.
type onceLease struct {
	sync.Mutex
	id    clientv3.LeaseID
	until time.Time // when it takes no more
}

func (o *onceLease) lease(ctx context.Context, store Store) (clientv3.LeaseID, error) {
	o.Lock()
	defer o.Unlock()
	if time.Now().Before(o.until) {
		return o.id, nil
	}
	resp, err := store.Grant(ctx, int64((onceFor + onceShared).Seconds()))
	if err != nil {
		return 0, err
	}
	o.id, o.until = resp.ID, time.Now().Add(onceShared)
	return o.id, nil
}

func (o *onceLease) forget() {
	o.Lock()
	defer o.Unlock()
	o.until = time.Time{}
}
