package main

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"keygate/config"
)

func newConfigCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Check and print the configuration",
		Long: `Check and print the configuration.

Each setting is a flag, an environment variable and a field of the YAML file
that --config names: --staleness-budget, KEYGATE_STALENESS_BUDGET and
stalenessBudget. A flag wins over the environment, the environment over the
file. An empty variable counts as not set.`,
		Example: `  keygate config print --show-source
  keygate config validate --config keygate.yaml`,
		GroupID: groupSetUp,
	}
	parent(cmd)
	cmd.AddCommand(newConfigPrintCommand(a), newConfigValidateCommand(a))
	return cmd
}

func newConfigPrintCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "print",
		Short: "Print every setting, and where it came from",
		Long: `Print every setting in force, and where it came from.

The YAML that it prints is a configuration file. Secrets are not settings: they
stand in files, and only the files' names are printed.`,
		Example: `  keygate config print --show-source
  keygate config print -o yaml > keygate.yaml`,
		Args: noArguments,
	}
	output := outputFlag(cmd, "table", "json", "yaml")
	showSource := cmd.Flags().Bool("show-source", false, "say where each value came from")
	flags := config.Register(cmd.Flags(), config.All()...)
	cmd.RunE = func(*cobra.Command, []string) error {
		cfg, err := a.load(flags)
		if err != nil {
			return err
		}
		switch output.value {
		case "json":
			return printConfigJSON(a, cfg, *showSource)
		case "yaml":
			return printConfigYAML(a, cfg, *showSource)
		}
		rows := [][]string{{"SETTING", "VALUE"}}
		if *showSource {
			rows[0] = append(rows[0], "SOURCE")
		}
		for _, v := range cfg.Values() {
			row := []string{v.Field, v.Text}
			if *showSource {
				row = append(row, v.Source.String())
			}
			rows = append(rows, row)
		}
		return printTable(a.stdout, rows...)
	}
	return cmd
}

func printConfigJSON(a *app, cfg *config.Config, showSource bool) error {
	type sourced struct {
		Value  any    `json:"value"`
		Source string `json:"source"`
	}
	fields := map[string]any{}
	for _, v := range cfg.Values() {
		fields[v.Field] = v.Data
		if showSource {
			fields[v.Field] = sourced{v.Data, v.Source.String()}
		}
	}
	return printJSON(a.stdout, fields)
}

// printConfigYAML writes each value as JSON, which is YAML too.
func printConfigYAML(a *app, cfg *config.Config, showSource bool) error {
	for _, v := range cfg.Values() {
		var value strings.Builder
		e := json.NewEncoder(&value)
		e.SetEscapeHTML(false)
		if err := e.Encode(v.Data); err != nil {
			return err
		}
		line := v.Field + ": " + strings.TrimSuffix(value.String(), "\n")
		if showSource {
			line += " # " + printable(v.Source.String())
		}
		if _, err := fmt.Fprintln(a.stdout, line); err != nil {
			return err
		}
	}
	return nil
}

func newConfigValidateCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "validate",
		Short: "Check the configuration, and the files it names",
		Long: `Check the configuration as keygate serve would at its start, and the files that
it names: certificates, keys and the password file. Nothing is contacted. All
that is wrong is listed, with its place, and the exit code is 2.`,
		Example: `  keygate config validate --config keygate.yaml
  KEYGATE_ORG=acme keygate config validate`,
		Args: noArguments,
	}
	flags := config.Register(cmd.Flags(), config.All()...)
	cmd.RunE = func(*cobra.Command, []string) error {
		cfg, err := a.loadFor(flags)
		if err != nil {
			return err
		}
		given := 0
		for _, v := range cfg.Values() {
			if v.Source.Kind != config.FromDefault {
				given++
			}
		}
		_, err = fmt.Fprintf(a.stdout, "configuration is valid (%d given, %d by default)\n", given, len(cfg.Values())-given)
		return err
	}
	return cmd
}
