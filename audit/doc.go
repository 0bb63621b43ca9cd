// Package audit holds the trail of the changes: the record that stands beside
// each change, and the chain that makes the records tamper-evident.
//
// # Records
//
// Whoever changes something with keygate writes a [Record] at
// <prefix>.audit/<org>/<id> in the transaction of the change. It is written
// once. A change that carries none was made by etcdctl or something else: the
// [Follower] sees it and writes the record, with what the values were before. So
// a revocation under a full etcd, whose record waits in a spool, has two: the
// follower's, and later the one that says who.
//
// # Chain
//
// A follower watches everything below the prefix and appends links. A link
// stands at <prefix>.chain/<its last revision, 16 hex digits> and is one line
// of JSON, without blanks, with its members in this order:
//
//	{"v":1,"from":F,"to":T,"at":MS,"genesis":true,"gap":true,"cluster":"ID",
//	 "note":"…","entries":[[REV,"HASH",[["PATH","VALUEHASH"],…]],…],
//	 "prev":"HASH","hash":"HASH"}
//
// Without breaks; genesis, gap, cluster, note and the third member of an entry
// are absent when there is nothing to say. The link covers the revisions from F
// to T; F is the T of the link before it, plus 1. MS is when it was written, in
// milliseconds since the Unix epoch. All hashes are SHA-256 in lower-case hex.
// "prev" is the "hash" of the link before it, and "hash" is of the link's own
// text without that member:
//
//	etcdctl get --print-value-only /keygate.chain/0000000000000123 |
//	  tr -d '\n' | sed 's/,"hash":"[0-9a-f]*"}$/}/' | sha256sum
//
// An entry stands for each revision that touched what is covered: the flags and
// records below <prefix>/ without the barriers, <prefix>.audit/ and
// <prefix>.tokens/. (Indexes, replicas, the chain itself, intents and what is
// kept for idempotency are not: no check and no right depends on them.) Its
// HASH is of one line for each event of the revision that is covered, in etcd's
// order, each with a newline at its end:
//
//	put <length of the path in bytes> <path> <SHA-256 of the value>
//	delete <length of the path in bytes> <path>
//
// The third member lists the audit records that the revision put, each with the
// SHA-256 of its value. A path that is longer than 512 bytes or not printable
// ASCII is listed as "sha256:" and its SHA-256. So:
//
//	etcdctl get --print-value-only "$PATH" | head -c -1 | sha256sum
//
// <prefix>.chain/head is {"v":1,"to":T,"hash":"HASH","cluster":"ID"} of the
// newest link. Every append compares the head's ModRevision, so there is one
// chain, however many followers run. The one that writes holds
// <prefix>.chain/leader under a lease.
//
// A genesis link begins the chain, or goes on with it after etcd was restored
// into another cluster; its F and T are the revision it found. A gap link covers
// revisions that were compacted before a follower saw them: what happened in
// them is not known. A link without entries covers revisions that touched
// nothing.
//
// Whoever can write to etcd can also compute a whole new chain. So note the
// head that [Verify] reports, "T:HASH", somewhere else, and give it to the next
// Verify: everything before it is then as it was.
package audit
