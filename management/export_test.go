package management

// Route of the table, for tests.
type Route struct{ Method, Pattern, Right string }

// Routes lists the table.
func Routes() (all []Route) {
	for _, rt := range routes {
		all = append(all, Route{rt.method, rt.pattern, rt.right.String()})
	}
	return all
}

// Timeouts for tests.
const (
	ChangeTimeout = changeTimeout
	BodyTimeout   = bodyTimeout
	WriteTimeout  = writeTimeout
)
