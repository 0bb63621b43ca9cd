//go:build !race

package keygatetest_test

const raceEnabled = false
