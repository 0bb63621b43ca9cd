// Package embedded runs the etcd that keygate brings along: one member, on a
// unix socket in a private data directory.
//
// etcd ends its whole process when its disk is full or failing, and checks must
// outlive that. So [Serve] is what the command `keygate etcd` does, and a
// [Child] starts and supervises that command; both ends talk over the socket,
// exactly as with an etcd of one's own.
//
// A data directory belongs to one member and one process at a time, which holds
// a lock on a file in it. Two processes with an embedded etcd each have
// different data: more replicas need an etcd cluster of their own.
//
// This package is the only one that imports the etcd server. The build tag
// noembed leaves the server out; everything but Serve works as before.
package embedded

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"path/filepath"
	"time"
)

// DefaultQuotaBytes is etcd's own default limit for the size of its database.
const DefaultQuotaBytes = 2 << 30

// maxSocketPath is what a unix socket's address holds, without its final zero.
const maxSocketPath = 107

// Files in a data directory, beside etcd's own folder "member".
const (
	clientSocket = "etcd.sock"
	peerSocket   = "peer.sock" // no longer than clientSocket, whose length is checked
	lockFile     = "etcd.lock"
	tokenFile    = "cluster-token"
	memberFolder = "member"
)

// Config of one embedded member.
type Config struct {
	// DataDir is created with mode 0700 if it is absent. It must belong to
	// the user of this process and be closed to group and others.
	DataDir string
	// QuotaBytes limits the size of the database; beyond it etcd refuses
	// every put until it is compacted and defragmented. 0 means 2 GiB.
	QuotaBytes int64
	// Logger receives etcd's warnings and errors, and its routine lines at
	// debug level. A line is dropped rather than waited for. nil drops all.
	Logger *slog.Logger
}

// Endpoint returns the client endpoint of the member in dataDir, in the form
// that etcd's clients take, "unix:///…/etcd.sock". It is an error if the path
// is longer than the 107 bytes that a unix socket's address holds. The
// directory need not exist.
func Endpoint(dataDir string) (string, error) {
	path, err := socketPath(dataDir)
	if err != nil {
		return "", err
	}
	// Clients take it for a URL: of the usual characters of a path only the
	// percent sign, the question mark, the number sign and blanks change.
	return (&url.URL{Scheme: "unix", Path: path}).String(), nil
}

// socketPath returns the absolute path of the client socket.
func socketPath(dataDir string) (string, error) {
	if dataDir == "" {
		return "", permanent(errors.New("no data directory is set"))
	}
	abs, err := filepath.Abs(dataDir)
	if err != nil {
		return "", permanent(fmt.Errorf("data directory %q: %w", dataDir, err))
	}
	path := filepath.Join(abs, clientSocket)
	if n := len(path); n > maxSocketPath {
		return "", permanent(fmt.Errorf("socket path %s is %d bytes long and a unix socket's address holds %d: choose a data directory of at most %d bytes",
			path, n, maxSocketPath, maxSocketPath-len("/"+clientSocket)))
	}
	return path, nil
}

// Running reports whether a process accepts connections on the client socket
// in dataDir. It waits for ctx, and a second at most.
func Running(ctx context.Context, dataDir string) bool {
	path, err := socketPath(dataDir)
	if err != nil {
		return false
	}
	d := net.Dialer{Timeout: time.Second}
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// exitPermanent is EX_CONFIG of sysexits.h.
const exitPermanent = 78

// ExitCode returns the status with which a process must end after [Serve]
// returned err, so that a [Child] knows whether another attempt makes sense: 0
// for nil, 78 where the same start would fail again (the directory is held by
// another process, unsafe, foreign or corrupt), 1 for everything else.
func ExitCode(err error) int {
	var p *permanentError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &p):
		return exitPermanent
	default:
		return 1
	}
}

// permanentError marks an error that the next attempt would meet as well.
type permanentError struct{ error }

func (e *permanentError) Unwrap() error { return e.error }

func permanent(err error) error { return &permanentError{err} }
