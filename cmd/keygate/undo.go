package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"keygate/authz"
	"keygate/client"
	"keygate/config"
	"keygate/ledger"
)

// restorable are the changed flags that the other action brings back to what
// they were, or closes.
func (c *statusChange) restorable(done statusDone) (flags []client.Flag) {
	for _, f := range done.flags {
		open := f.Before == authz.StatusApproved.String() || f.Before == authz.StatusActive.String()
		if f.Changed && (c.action == ledger.Approve || open) {
			flags = append(flags, f)
		}
	}
	return flags
}

// undoInWords is how many keys an undo names before it prefers a file.
const undoInWords = 10

// undo is the commands that undo the change, and nothing but it. They name each
// key: what --app, --developer or --from-file stand for is another set by the
// time when somebody runs them, and may hold a key that was revoked since for
// another reason.
func (c *statusChange) undo(cfg *config.Config, args []string, done statusDone) []string {
	flags := c.restorable(done)
	if len(flags) == 0 {
		return []string{}
	}
	if c.named() {
		return []string{c.command(cfg, nil, args)}
	}
	// Keys that changed in the same products share a line.
	products := map[string][]string{} // by key id
	var ids []string
	for _, f := range flags {
		id := f.Target.Key
		if _, ok := products[id]; !ok {
			ids = append(ids, id)
		}
		products[id] = append(products[id], f.Target.Product)
	}
	var lines []string
	for len(ids) > 0 {
		same := products[ids[0]]
		var now, later []string
		for _, id := range ids {
			if slices.Equal(products[id], same) {
				now = append(now, id)
			} else {
				later = append(later, id)
			}
		}
		var options []string
		for _, p := range same {
			if p != "" {
				options = append(options, "--product", p)
			}
		}
		if len(now) > undoInWords {
			if file, err := c.undoFile(done.revision, now); err == nil {
				options, now = append([]string{"--from-file", file}, options...), nil
			} else {
				fmt.Fprintf(c.a.stderr, "note: %s: so the undo names each key\n", printable(err.Error()))
			}
		}
		lines = append(lines, c.command(cfg, options, now))
		ids = later
	}
	return lines
}

// undoFile writes the ids into a new file in the working directory.
func (c *statusChange) undoFile(revision int64, ids []string) (name string, err error) {
	folder, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("write the ids for the undo: %w", err)
	}
	f, err := os.CreateTemp(folder, fmt.Sprintf("keygate-%v-at-%d-*.ids", c.action, revision))
	if err != nil {
		return "", fmt.Errorf("write the ids for the undo: %w", err)
	}
	_, err = fmt.Fprintf(f, "# %s at revision %d; keygate %v key --from-file undoes it\n%s\n", c.done(), revision, c.action.Undo(), strings.Join(ids, "\n"))
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(f.Name())
		return "", fmt.Errorf("write the ids for the undo: %w", err)
	}
	return f.Name(), nil
}

// command is a line for the shell that does the opposite, on the same etcd,
// whoever runs it in whatever folder: it says all that this run was told by
// flags, by the environment and by a file.
func (c *statusChange) command(cfg *config.Config, options, args []string) string {
	words := []string{"keygate", c.action.Undo().String(), c.cmd.Name()}
	dash := slices.ContainsFunc(args, func(s string) bool { return strings.HasPrefix(s, "-") })
	if !dash {
		words = append(words, args...)
	}
	words = append(words, options...)
	words = append(words, c.at.where(cfg)...)
	if dash {
		words = append(append(words, "--"), args...)
	}
	for i, w := range words {
		words[i] = shellWord(w)
	}
	return strings.Join(words, " ")
}

// where is the flags that lead to the same keys in the same place.
func (p place) where(cfg *config.Config) (words []string) {
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	flags.SortFlags = false
	var groups []config.Group
	switch {
	case p.server != "":
		groups = []config.Group{config.Org, config.Client}
	case cfg.Embedded():
		groups = []config.Group{config.Org, config.Embedded, config.Keys}
	default:
		groups = []config.Group{config.Org, config.External, config.Keys}
	}
	config.Register(flags, groups...)
	values := cfg.Values()
	flags.VisitAll(func(f *pflag.Flag) {
		i := slices.IndexFunc(values, func(v config.Value) bool { return strings.EqualFold(v.Field, strings.ReplaceAll(f.Name, "-", "")) })
		if i < 0 || strings.HasPrefix(f.Name, "log-") {
			return
		}
		value, given := values[i].Text, values[i].Source.Kind != config.FromDefault
		switch f.Name {
		case "server":
			value, given = p.server, true
		case "token-file":
			if p.tokenFile != "" {
				value, given = p.tokenFile, true
			}
			value = absolute(value)
		case "data-dir": // its default is another one in another folder
			given = true
			fallthrough
		case "etcd-cacert", "etcd-cert", "etcd-key", "etcd-password-file", "server-cacert":
			value = absolute(value)
		}
		switch {
		case given && f.NoOptDefVal != "": // it takes no word behind it
			words = append(words, "--"+f.Name+"="+value)
		case given:
			words = append(words, "--"+f.Name, value)
		}
	})
	return words
}

// absolute is the path for whoever is in another folder.
func absolute(path string) string {
	if full, err := filepath.Abs(path); err == nil && path != "" {
		return full
	}
	return path
}

// shellWord quotes for a POSIX shell what needs it. Control characters are
// escaped for the terminal: such a name must be typed by hand.
func shellWord(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("@%+=:,./_-", r)
	}
	if s != "" && strings.TrimFunc(s, plain) == "" {
		return s
	}
	return "'" + strings.ReplaceAll(printable(s), "'", `'\''`) + "'"
}
