package config

import "strings"

// Nearest returns the candidate that was probably meant by name, or "" when
// none is close. Case, dashes and underscores count for nothing, so that a flag's
// spelling finds the field and the other way round.
func Nearest(name string, candidates []string) string {
	plain := strings.NewReplacer("-", "", "_", "").Replace
	want := plain(strings.ToLower(name))
	best, bestDistance := "", max(2, len(want)/3)+1
	for _, c := range candidates {
		have := plain(strings.ToLower(c))
		d := distance(want, have)
		// etcdPassword means etcdPasswordFile, however long the rest; warning
		// means warn.
		if len(want) >= 4 && strings.HasPrefix(have, want) || len(have) >= 4 && strings.HasPrefix(want, have) {
			d = min(d, 1)
		}
		if d < bestDistance {
			best, bestDistance = c, d
		}
	}
	return best
}

func didYouMean(name string, candidates []string) string {
	if n := Nearest(name, candidates); n != "" {
		return ", did you mean " + quote(n) + "?"
	}
	return ""
}

// distance is the number of letters to insert, delete, replace or swap with
// their neighbour (optimal string alignment).
func distance(a, b string) int {
	before, row := make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		next := make([]int, len(b)+1)
		next[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			next[j] = min(row[j]+1, next[j-1]+1, row[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				next[j] = min(next[j], before[j-2]+1)
			}
		}
		before, row = row, next
	}
	return row[len(b)]
}
