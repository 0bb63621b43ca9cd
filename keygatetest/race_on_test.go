//go:build race

package keygatetest_test

// raceEnabled tells that everything takes about ten times as long.
const raceEnabled = true
