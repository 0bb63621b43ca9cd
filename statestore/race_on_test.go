//go:build race

package statestore_test

// stressReads is how many reads the stress run makes under the race detector.
const stressReads = 1_000_000
