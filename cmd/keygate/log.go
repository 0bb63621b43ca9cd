package main

import (
	"io"
	"log/slog"
	"os"

	"golang.org/x/term"

	"keygate/config"
)

// isTerminal tells whether a person sees what is written to w.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// logger of a command that runs until it is stopped: text on a terminal, JSON
// elsewhere, unless --log-format says otherwise. It writes to standard error.
func (a *app) logger(cfg *config.Config) *slog.Logger {
	format := cfg.LogFormat
	if format == "auto" {
		format = "json"
		if isTerminal(a.stderr) {
			format = "text"
		}
	}
	return newLogger(a.stderr, format, cfg.LogLevel)
}

// toolLogger is for a command that does one thing and ends: its answer is its
// output, so unless asked for there are warnings only, and those as text.
func (a *app) toolLogger(cfg *config.Config) *slog.Logger {
	level := cfg.LogLevel
	if cfg.Source("log-level").Kind == config.FromDefault {
		level = slog.LevelWarn
	}
	format := cfg.LogFormat
	if format == "auto" {
		format = "text"
	}
	return newLogger(a.stderr, format, level)
}

func newLogger(w io.Writer, format string, level slog.Level) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}
