//go:build unix && !linux && !darwin

package embedded

import "errors"

// exchange would swap the names of two folders, at one instant.
func exchange(string, string) error { return errors.ErrUnsupported }
