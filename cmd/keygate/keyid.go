package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"keygate/authz"
)

func newKeyIDCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "key-id KEY... | -",
		Short: "Print the id of a consumer key: its SHA-256",
		Long: `Print the id of each consumer key, the lower-case hex SHA-256 that stands for it
in etcd's paths, in logs and in metrics.

With - the keys come from standard input, one a line. A key that is given as an
argument can be seen by others: in the list of processes, in the shell's
history.`,
		Example: `  printf '%s\n' "$KEY" | keygate key-id -
  keygate key-id - < keys.txt`,
		GroupID:     groupUse,
		Annotations: map[string]string{holdsKeys: ""},
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError(cmd, "no key; give - to read keys from standard input")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 && args[0] == "-" {
				return printKeyIDs(a.stdout, a.input(cmd.Context()))
			}
			a.warnOfArguments()
			for i, arg := range args {
				id, err := keyID(arg)
				if err != nil {
					return exitWith(exitUsage, fmt.Errorf("argument %d: %w", i+1, err))
				}
				if _, err := fmt.Fprintln(a.stdout, id); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// warnOfArguments says that a key on the command line is no secret.
func (a *app) warnOfArguments() {
	fmt.Fprintln(a.stderr, "warning: a key on the command line can be seen by others (ps, shell history); give - and the key on standard input")
}

func printKeyIDs(w io.Writer, r io.Reader) error {
	out := bufio.NewWriter(w)
	lines := bufio.NewScanner(r)
	n := 0
	for lines.Scan() {
		n++
		id, err := keyID(strings.TrimSuffix(lines.Text(), "\r"))
		if err != nil {
			return errors.Join(exitWith(exitUsage, fmt.Errorf("line %d: %w", n, err)), out.Flush())
		}
		fmt.Fprintln(out, id)
	}
	switch err := lines.Err(); {
	case errors.Is(err, bufio.ErrTooLong):
		return exitWith(exitUsage, fmt.Errorf("line %d: %w", n+1, errMalformed))
	case err != nil:
		return fmt.Errorf("read standard input: %w", err)
	case n == 0:
		return exitWith(exitUsage, errors.New("no key on standard input"))
	}
	return out.Flush()
}

var errMalformed = fmt.Errorf("not a consumer key: want 1 to %d characters of A-Z a-z 0-9 . _ ~ + / = -", authz.MaxKeyLength)

// keyID returns the id of a key. The error does not show the key.
func keyID(s string) (authz.KeyID, error) {
	key, reason := authz.ParseConsumerKey(s)
	if reason != authz.Allowed {
		return authz.KeyID{}, errMalformed
	}
	return key.ID(), nil
}
