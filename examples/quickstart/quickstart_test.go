package quickstart_test

import (
	"bytes"
	"testing"

	"keygate/apigee"
	"keygate/authz"
	"keygate/examples/quickstart"
)

// The names in the package are those in its files.
func TestNames(t *testing.T) {
	type flags map[authz.ProductName]authz.Status
	for _, tt := range []struct {
		file      string
		app       authz.AppID
		developer authz.DeveloperID
		keys      map[string]flags
	}{
		{quickstart.WeatherFile, quickstart.WeatherApp, quickstart.WeatherDeveloper, map[string]flags{
			quickstart.WeatherKey: {quickstart.WeatherProduct: authz.StatusRevoked},
		}},
		{quickstart.OrdersFile, quickstart.OrdersApp, quickstart.OrdersDeveloper, map[string]flags{
			quickstart.OrdersKey:        {quickstart.WeatherProduct: authz.StatusApproved, quickstart.OrdersProduct: authz.StatusApproved},
			quickstart.OrdersPendingKey: {quickstart.WeatherProduct: authz.StatusApproved, quickstart.OrdersProduct: authz.StatusPending},
		}},
	} {
		s, err := apigee.NewReader(apigee.ReaderConfig{Name: tt.file}, bytes.NewReader(quickstart.Read(tt.file))).Next()
		if err != nil || s.App == nil || len(s.Refused) > 0 {
			t.Fatalf("%s: got %v, %v, want an app", tt.file, s.Refused, err)
		}
		if s.App.ID != tt.app || s.App.Developer != tt.developer || len(s.App.Credentials) != len(tt.keys) {
			t.Errorf("%s: app %q of %q with %d keys, want %q, %q, %d", tt.file, s.App.ID, s.App.Developer, len(s.App.Credentials), tt.app, tt.developer, len(tt.keys))
		}
		for key, want := range tt.keys {
			found := false
			for _, c := range s.App.Credentials {
				if c.Key != quickstart.KeyID(key) {
					continue
				}
				found = true
				for _, p := range c.Products {
					if p.Status != want[p.Name] {
						t.Errorf("%s: %s is %v on the key …%s, want %v", tt.file, p.Name, p.Status, c.Hint, want[p.Name])
					}
				}
				if len(c.Products) != len(want) {
					t.Errorf("%s: %d products on the key …%s, want %d", tt.file, len(c.Products), c.Hint, len(want))
				}
			}
			if !found {
				t.Errorf("%s: one of the package's keys is not in it", tt.file)
			}
		}
	}
}
