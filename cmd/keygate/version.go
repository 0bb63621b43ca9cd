package main

import (
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version of a release, set by the linker (-X main.version=v1.2.3). Without it
// the version is what Go knows of the build.
var version string

// versionInfo is the JSON of keygate version. Stable.
type versionInfo struct {
	Version    string `json:"version"`
	Commit     string `json:"commit"`               // "unknown" outside a repository
	CommitTime string `json:"commitTime,omitempty"` // RFC 3339
	Modified   bool   `json:"modified"`             // built from a changed tree
	Go         string `json:"go"`
	Platform   string `json:"platform"`
	EtcdClient string `json:"etcdClient"`
	EtcdServer string `json:"etcdServer"` // "none" when it was left out
	EnvoyAPI   string `json:"envoyApi"`   // of go-control-plane
}

func buildVersion() versionInfo {
	v := versionInfo{
		Version: version, Commit: "unknown", Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH,
		EtcdClient: "none", EtcdServer: "none", EnvoyAPI: "none",
	}
	build, ok := debug.ReadBuildInfo()
	if ok {
		if v.Version == "" {
			v.Version = build.Main.Version
		}
		for _, s := range build.Settings {
			switch s.Key {
			case "vcs.revision":
				v.Commit = s.Value
			case "vcs.time":
				v.CommitTime = s.Value
			case "vcs.modified":
				v.Modified = s.Value == "true"
			}
		}
		for _, m := range build.Deps {
			switch m.Path {
			case "go.etcd.io/etcd/client/v3":
				v.EtcdClient = m.Version
			case "go.etcd.io/etcd/server/v3":
				v.EtcdServer = m.Version
			case "github.com/envoyproxy/go-control-plane/envoy":
				v.EnvoyAPI = m.Version
			}
		}
	}
	if v.Version == "" {
		v.Version = "(devel)"
	}
	return v
}

func newVersionCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version, and what it was built with",
		Example: `  keygate version
  keygate version -o json`,
		GroupID: groupSetUp,
		Args:    noArguments,
	}
	output := outputFlag(cmd, "table", "json")
	cmd.RunE = func(*cobra.Command, []string) error {
		v := buildVersion()
		if output.value == "json" {
			return printJSON(a.stdout, v)
		}
		commit := v.Commit
		if v.Modified {
			commit += " (modified)"
		}
		return printTable(a.stdout,
			[]string{"keygate", v.Version},
			[]string{"commit", commit},
			[]string{"go", v.Go + " " + v.Platform},
			[]string{"etcd client", v.EtcdClient},
			[]string{"etcd server", v.EtcdServer},
			[]string{"Envoy API", v.EnvoyAPI},
		)
	}
	return cmd
}
