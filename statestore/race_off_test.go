//go:build !race

package statestore_test

// stressReads is how many reads the stress run makes.
const stressReads = 10_000_000
