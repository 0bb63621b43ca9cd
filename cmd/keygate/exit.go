package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"keygate/authz"
	"keygate/config"
	"keygate/ledger"
)

// The statuses that keygate exits with. They are a public interface.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2 // usage or configuration
	exitAuth        = 3 // not authenticated, or not permitted
	exitNotFound    = 4
	exitUnreachable = 5
	exitConflict    = 6
	exitDenied      = 7 // keygate check
	exitInterrupted = 130
)

// exitError is an error that knows the status to exit with. A nil err prints
// nothing. The lines of a configuration's error begin with their place, such as
// keygate.yaml:12:3, and so not with the program's name.
type exitError struct {
	code   int
	err    error
	placed bool
}

func (e *exitError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// exitWith gives err the status to exit with.
func exitWith(code int, err error) error { return &exitError{code: code, err: err} }

// configError is for what config says of its settings.
func configError(err error) error { return &exitError{code: exitUsage, err: err, placed: true} }

// ledgerExits are the statuses for what the ledger refuses.
var ledgerExits = map[ledger.ErrorKind]int{
	ledger.Invalid: exitUsage, ledger.NotFound: exitNotFound, ledger.Exists: exitConflict, ledger.Conflict: exitConflict,
	ledger.Precondition: exitConflict, ledger.Mismatch: exitConflict, ledger.Limit: exitUsage, ledger.TooLarge: exitUsage,
}

// exitCode finds the status for any error: the one it was given, else what the
// error itself says of etcd.
func exitCode(err error) int {
	var coded *exitError
	var refused *ledger.Error
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &coded):
		return coded.code
	case errors.As(err, &refused):
		return ledgerExits[refused.Kind]
	case errors.Is(err, authz.ErrUnavailable), errors.Is(err, context.DeadlineExceeded):
		return exitUnreachable
	case errors.Is(err, rpctypes.ErrAuthFailed), errors.Is(err, rpctypes.ErrUserEmpty): // InvalidArgument, says etcd
		return exitAuth
	}
	// etcd's own errors have a Code, gRPC's a GRPCStatus.
	code := status.Code(err)
	if etcd := (interface{ Code() codes.Code })(nil); errors.As(err, &etcd) {
		code = etcd.Code()
	}
	switch code {
	case codes.Unauthenticated, codes.PermissionDenied:
		return exitAuth
	case codes.Unavailable, codes.DeadlineExceeded:
		return exitUnreachable
	}
	return exitFailed
}

// usageError says what is wrong with a command line, and where to read on.
func usageError(cmd *cobra.Command, format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	return exitWith(exitUsage, fmt.Errorf("%w\nSee '%s --help'", err, cmd.CommandPath()))
}

// holdsKeys annotates a command whose arguments may be consumer keys: no error
// repeats them.
const holdsKeys = "keygate.arguments-hold-keys"

// flagError suggests the flag that was meant.
func flagError(cmd *cobra.Command, err error) error {
	if cmd.HasAvailableSubCommands() && cmd.Flags().NArg() > 0 {
		return cmd.RunE(cmd, cmd.Flags().Args()) // the unknown command came first
	}
	var unknown *pflag.NotExistError
	if !errors.As(err, &unknown) {
		if _, secret := cmd.Annotations[holdsKeys]; secret {
			var invalid *pflag.InvalidValueError
			if !errors.As(err, &invalid) {
				return usageError(cmd, "an argument that begins with a dash is not understood")
			}
		}
		return usageError(cmd, "%w", err)
	}
	var names []string
	cmd.Flags().VisitAll(func(f *pflag.Flag) { names = append(names, f.Name) })
	near := config.Nearest(unknown.GetSpecifiedName(), names)
	switch _, secret := cmd.Annotations[holdsKeys]; {
	case unknown.GetSpecifiedShortnames() == "" && near != "":
		near = fmt.Sprintf(", did you mean --%s?", near)
		if secret {
			return usageError(cmd, "unknown flag%s", near)
		}
		return usageError(cmd, "unknown flag --%s%s", unknown.GetSpecifiedName(), near)
	case secret:
		return usageError(cmd, "unknown flag; give a key that begins with a dash on standard input")
	case unknown.GetSpecifiedShortnames() == "":
		return usageError(cmd, "unknown flag --%s", unknown.GetSpecifiedName())
	}
	return usageError(cmd, "unknown flag -%s", unknown.GetSpecifiedName())
}

// noArguments is cobra.NoArgs without repeating the argument, which may be a
// secret that lost its flag.
func noArguments(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError(cmd, "%s takes no arguments, got %d", cmd.Name(), len(args))
	}
	return nil
}

// load reads the configuration. What is wrong with it is a usage error.
func (a *app) load(flags *config.Flags) (*config.Config, error) {
	cfg, err := flags.Load(a.environ)
	if err != nil {
		return nil, configError(err)
	}
	return cfg, nil
}

// loadFor is load for a command that goes on to use the files that the settings
// name: they are checked as well.
func (a *app) loadFor(flags *config.Flags) (*config.Config, error) {
	cfg, err := a.load(flags)
	if err == nil {
		if err := cfg.CheckFiles(); err != nil {
			return nil, configError(err)
		}
	}
	return cfg, err
}
