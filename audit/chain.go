package audit

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/statestore/keyspace"
)

// chainVersion is the "v" of links and of the head.
const chainVersion = 1

// link of the chain, in the order of its stored members.
type link struct {
	Version int   `json:"v"`
	From    int64 `json:"from"`
	To      int64 `json:"to"`
	At      int64 `json:"at"` // ms
	Genesis bool  `json:"genesis,omitempty"`
	Gap     bool  `json:"gap,omitempty"`
	// Cluster id in hex, of a genesis.
	Cluster string  `json:"cluster,omitempty"`
	Note    string  `json:"note,omitempty"`
	Entries []entry `json:"entries"`
	Prev    string  `json:"prev"`
	Hash    string  `json:"hash,omitempty"`
}

// entry is what a link says of one revision. It is stored as an array.
type entry struct {
	revision int64
	hash     string
	records  []listed
}

// listed is an audit record that a revision put.
type listed struct{ path, hash string }

// MarshalJSON writes the array.
func (e entry) MarshalJSON() ([]byte, error) {
	b := append(strconv.AppendInt([]byte{'['}, e.revision, 10), ',')
	b = append(b, quoted(e.hash)...)
	for i, r := range e.records {
		if i == 0 {
			b = append(b, ",["...)
		} else {
			b = append(b, ',')
		}
		b = append(append(append(append(append(b, '['), quoted(r.path)...), ','), quoted(r.hash)...), ']')
	}
	if len(e.records) > 0 {
		b = append(b, ']')
	}
	return append(b, ']'), nil
}

func quoted(s string) []byte {
	b, _ := json.Marshal(s) // a string
	return b
}

// UnmarshalJSON reads the array.
func (e *entry) UnmarshalJSON(data []byte) error {
	var members []json.RawMessage
	if err := json.Unmarshal(data, &members); err != nil {
		return err
	}
	if len(members) < 2 || len(members) > 3 {
		return fmt.Errorf("an entry has %d members, want 2 or 3", len(members))
	}
	var records [][2]string
	err := json.Unmarshal(members[0], &e.revision)
	if err == nil {
		err = json.Unmarshal(members[1], &e.hash)
	}
	if err == nil && len(members) == 3 {
		err = json.Unmarshal(members[2], &records)
	}
	for _, r := range records {
		e.records = append(e.records, listed{r[0], r[1]})
	}
	return err
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// closed sets the hash and returns the stored text.
func (l *link) closed() string {
	l.Hash = ""
	if l.Entries == nil {
		l.Entries = []entry{}
	}
	body, err := json.Marshal(l)
	if err != nil { // it has only strings and numbers
		panic("audit: " + err.Error())
	}
	l.Hash = digest(body)
	return string(body[:len(body)-1]) + `,"hash":"` + l.Hash + `"}`
}

// parseLink reads a stored link and checks its hash.
func parseLink(value []byte) (link, error) {
	var l link
	if err := json.Unmarshal(value, &l); err != nil {
		return l, fmt.Errorf("it cannot be read: %w", err)
	}
	if l.Version != chainVersion {
		return l, fmt.Errorf("\"v\" is %d, want %d", l.Version, chainVersion)
	}
	was := l.Hash
	// Written again it must be the same, byte for byte: a member that nobody
	// knows, or one that stands twice, is none of the chain.
	if again := l.closed(); again != string(value) {
		if l.Hash != was {
			return l, fmt.Errorf("its hash is %s, its text has %s", was, l.Hash)
		}
		return l, errors.New("it is not in the form that a follower writes")
	}
	return l, nil
}

// head is the newest link, as its own value says.
type head struct {
	Version int    `json:"v"`
	To      int64  `json:"to"`
	Hash    string `json:"hash"`
	Cluster string `json:"cluster"`

	mod int64 // the value's ModRevision, that of the link's transaction; 0: there is no head
}

func (h head) value() string {
	b, err := json.Marshal(h)
	if err != nil { // it has only strings and numbers
		panic("audit: " + err.Error())
	}
	return string(b)
}

// idle tells that revision rev, reached without a change, needs no link: there
// is only the transaction of the newest one after it.
func (h head) idle(rev int64) bool {
	return rev <= h.To || h.mod == h.To+1 && rev <= h.mod
}

func parseHead(value []byte, mod int64) (head, error) {
	h := head{}
	if err := json.Unmarshal(value, &h); err != nil {
		return head{mod: mod}, fmt.Errorf("head of the audit chain: %w", err)
	}
	if h.Version != chainVersion || h.To < 1 || len(h.Hash) != 2*sha256.Size {
		return head{mod: mod}, errors.New("head of the audit chain: it is not in the form that a follower writes")
	}
	h.mod = mod
	return h, nil
}

func clusterName(id uint64) string { return strconv.FormatUint(id, 16) }

// folder of what the chain knows.
type folder uint8

const (
	folderNone   folder = iota // not covered
	folderRecord               // flags and records
	folderAudit
	folderToken
)

// folderOf a path in etcd.
func folderOf(space keyspace.Space, path string) folder {
	switch {
	case strings.HasPrefix(path, space.Audits()):
		return folderAudit
	case strings.HasPrefix(path, space.Tokens()):
		return folderToken
	case !strings.HasPrefix(path, space.Watched()):
		return folderNone
	}
	if strings.HasSuffix(path, "/.barrier") {
		if p, err := space.Parse(path); err == nil && p.Record.Kind == keyspace.KindNone {
			return folderNone
		}
	}
	return folderRecord
}

// maxPath of a record that an entry lists as it is, in bytes.
const maxPath = 512

// listedPath is how an entry lists a path: as it is, if it can be read.
func listedPath(path string) string {
	if len(path) <= maxPath && !strings.ContainsFunc(path, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return path
	}
	return "sha256:" + digest([]byte(path))
}

// TimeOf returns when revision rev had been seen, in milliseconds since the
// Unix epoch: when the first link at or after it was written. ok is false if
// there is none, or if the revision is older than the chain.
func TimeOf(ctx context.Context, kv clientv3.KV, space keyspace.Space, rev int64) (ms int64, ok bool, err error) {
	resp, err := kv.Get(ctx, space.ChainLink(max(rev, 0)), clientv3.WithRange(space.ChainHead()), clientv3.WithLimit(1))
	if err != nil {
		return 0, false, fmt.Errorf("time of revision %d: %w", rev, err)
	}
	if len(resp.Kvs) == 0 {
		return 0, false, nil
	}
	// Without the entries, which may be many. No string holds this text: a quote
	// in it would be escaped.
	text, _, _ := strings.Cut(string(resp.Kvs[0].Value), `,"entries":`)
	var l link
	if err := json.Unmarshal([]byte(text+"}"), &l); err != nil {
		return 0, false, fmt.Errorf("time of revision %d: %s: %w", rev, resp.Kvs[0].Key, err)
	}
	return l.At, !l.Genesis, nil
}
