package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
)

// helpWidth in columns.
const helpWidth = 80

// help prints a command's help, within helpWidth.
func help(cmd *cobra.Command, _ []string) {
	w := cmd.OutOrStdout()
	long := cmd.Long
	if long == "" {
		long = cmd.Short + "."
	}
	fmt.Fprintf(w, "%s\n\nUsage:\n  %s\n", strings.TrimSpace(long), usageLine(cmd))
	if cmd.HasExample() {
		fmt.Fprintf(w, "\nExamples:\n%s\n", cmd.Example)
	}
	if cmd.HasAvailableSubCommands() {
		for _, g := range cmd.Groups() {
			helpCommands(w, cmd, g.Title, g.ID)
		}
		helpCommands(w, cmd, "Commands", "")
	}
	if cmd.HasAvailableLocalFlags() {
		fmt.Fprintf(w, "\nFlags:\n%s", cmd.LocalFlags().FlagUsagesWrapped(helpWidth))
	}
	if cmd.HasAvailableSubCommands() {
		fmt.Fprintf(w, "\n'%s COMMAND --help' says more about a command.\n", cmd.CommandPath())
	}
}

// usageLine of a command with subcommands names none of them, unless it does
// something without one: its Use then says what.
func usageLine(cmd *cobra.Command) string {
	if cmd.HasAvailableSubCommands() && cmd.Use == cmd.Name() {
		return cmd.CommandPath() + " COMMAND"
	}
	return cmd.UseLine()
}

func helpCommands(w io.Writer, cmd *cobra.Command, title, group string) {
	title = "\n" + title + ":\n"
	for _, c := range cmd.Commands() {
		if c.GroupID == group && (c.IsAvailableCommand() || c.Name() == "help") {
			fmt.Fprintf(w, "%s  %-12s %s\n", title, c.Name(), c.Short)
			title = ""
		}
	}
}
