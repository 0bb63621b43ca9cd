// Command keygate checks API keys for Envoy against statuses in etcd. It is one
// binary; each subcommand stands in a file of its own and only wires.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	a := &app{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, environ: os.Environ()}
	os.Exit(a.main(os.Args[1:]))
}

// app is what a command may use of the process it runs in.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	environ        []string // as os.Environ gives it
}

// input is standard input until ctx ends; then a read that waits for a person or
// a pipe returns ctx's error. It is to be called once.
func (a *app) input(ctx context.Context) io.Reader {
	r, w := io.Pipe()
	go func() { // waits in a read that nothing else can end, so for the process's end at worst
		_, err := io.Copy(w, a.stdin)
		w.CloseWithError(err)
	}()
	context.AfterFunc(ctx, func() { w.CloseWithError(ctx.Err()) })
	return r
}

// main runs the command that args name and returns the status to exit with.
func (a *app) main(args []string) int {
	// The first signal ends ctx, and the command in order. After it the default
	// is back in place: the second one ends the process at once.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)

	root := newRootCommand(a)
	root.SetArgs(args)
	started := false
	onStart(root, func() { started = true })

	err := root.ExecuteContext(ctx)
	switch coded := (*exitError)(nil); {
	case err == nil:
		return exitOK
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		err = exitWith(exitInterrupted, errors.New("interrupted"))
	case errors.As(err, &coded):
	case !started: // cobra did not come as far as the command
		err = usageError(root, "%w", err)
	}
	printError(a.stderr, err)
	return exitCode(err)
}

func printError(w io.Writer, err error) {
	var coded *exitError
	switch text := err.Error(); {
	case text == "":
	case errors.As(err, &coded) && coded.placed:
		fmt.Fprintln(w, text)
	default:
		fmt.Fprintln(w, "keygate: "+text)
	}
}

// onStart calls f before any command's own work.
func onStart(cmd *cobra.Command, f func()) {
	cmd.Flags().SortFlags = false // config's table has an order
	if run := cmd.RunE; run != nil {
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			f()
			return run(cmd, args)
		}
	}
	for _, c := range cmd.Commands() {
		onStart(c, f)
	}
}

// commands lists the constructors of the subcommands, in the order of the help.
func commands() []func(*app) *cobra.Command {
	return []func(*app) *cobra.Command{
		newQuickstartCommand,
		newDemoCommand,
		newServeCommand,
		newAuthzCommand,
		newEtcdCommand,
		newEchoCommand,
		newGetCommand,
		newDescribeCommand,
		newCreateCommand,
		newDeleteCommand,
		newImportCommand,
		newCheckCommand,
		newRevokeCommand,
		newApproveCommand,
		newStatusCommand,
		newAuditCommand,
		newKeyIDCommand,
		newTokenCommand,
		newSealingKeyCommand,
		newConfigCommand,
		newVersionCommand,
	}
}

// Groups of commands in the help.
const (
	groupRun   = "run"
	groupUse   = "use"
	groupSetUp = "setup"
)

func newRootCommand(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "keygate",
		Short: "Checks API keys for Envoy; a revocation takes effect in milliseconds",
		Long: `keygate answers Envoy's ext_authz checks: may this consumer key use the API
product of this route? Statuses live in etcd, and whoever changes one there sees
it take effect on the next check.

Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 not authenticated or
not permitted, 4 not found, 5 unreachable, 6 conflict, 7 denied (keygate check),
130 interrupted.`,
		Example: `  # Try it: real Envoy, a revoke, and how fast it took effect
  keygate demo
  # Serve, with an etcd of its own in ./keygate-data
  keygate serve`,
		Version:       buildVersion().Version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs, // parent says what is wrong with them
	}
	parent(root)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.SetIn(a.stdin)
	root.SetVersionTemplate("keygate {{.Version}}\n")
	root.SetFlagErrorFunc(flagError)
	root.SetHelpFunc(help)
	root.AddGroup(&cobra.Group{ID: groupRun, Title: "Run"}, &cobra.Group{ID: groupUse, Title: "Use"}, &cobra.Group{ID: groupSetUp, Title: "Set up"})
	root.SetHelpCommandGroupID(groupSetUp)
	root.SetCompletionCommandGroupID(groupSetUp)
	for _, newCommand := range commands() {
		root.AddCommand(newCommand(a))
	}
	return root
}

// parent makes cmd print its help when it is called without a subcommand, and
// suggest one when it is called with an unknown one.
func parent(cmd *cobra.Command) {
	cmd.Args = cobra.ArbitraryArgs
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return cmd.Help()
		}
		hint := ""
		cmd.SuggestionsMinimumDistance = 2
		if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
			hint = fmt.Sprintf(", did you mean %q?", strings.Join(near, `" or "`))
		}
		return usageError(cmd, "unknown command %q%s", args[0], hint)
	}
}
