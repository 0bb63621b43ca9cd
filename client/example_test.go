package client_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"

	"keygate/client"
)

// api stands for a keygate in the examples.
func api(answers map[string]string) *httptest.Server {
	return httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer, ok := answers[r.Method+" "+r.URL.Path]
		if !ok {
			w.WriteHeader(http.StatusNotFound)
			answer = `{"error":{"code":404,"message":"App named MyApp does not exist under ann@example.com","details":[{"violations":[{"type":"developer.service.AppDoesNotExist"}]}]}}`
		}
		w.Header().Set("X-Keygate-Revision", "42")
		_, _ = io.WriteString(w, answer)
	}))
}

func Example() {
	srv := api(map[string]string{
		"POST /v1/organizations/acme/developers/ann@example.com/apps": `{"name":"MyApp","appId":"a1","credentials":[{"status":"approved","apiProducts":[{"apiproduct":"Weather","status":"pending"}]}]}`,
	})
	defer srv.Close()

	c, err := client.New(client.Config{Server: srv.URL, Organization: "acme", Token: "kgm_…"})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	app, done, err := c.CreateApp(context.Background(), "ann@example.com",
		client.AppSpec{Name: "MyApp", Products: []string{"Weather"}}, client.Change{Ticket: "API-7"})
	if err != nil {
		log.Fatal(err)
	}
	product := app.Credentials[0].Products[0]
	fmt.Printf("%s at revision %d: %s is %s\n", app.Name, done.Revision, product.Product, product.Status)
	// Output: MyApp at revision 42: Weather is pending
}

func ExampleError() {
	srv := api(nil)
	defer srv.Close()
	c, err := client.New(client.Config{Server: srv.URL, Organization: "acme", Token: "kgm_…"})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	_, err = c.DeveloperApp(context.Background(), "ann@example.com", "MyApp")
	var refusal *client.Error
	if errors.As(err, &refusal) {
		fmt.Println(refusal.Status, refusal.Code)
	}
	fmt.Println(err)
	// Output:
	// 404 developer.service.AppDoesNotExist
	// App named MyApp does not exist under ann@example.com
}

func ExampleClient_SetStatuses() {
	srv := api(map[string]string{
		"POST /v1/organizations/acme/statuses": `{"revision":42,"flags":[{"target":{"app":"a1"},"before":"approved","changed":true}],
			"receipt":{"revision":42,"replicas":{"total":3,"applied":3,"fenced":0},"slowestMs":4}}`,
	})
	defer srv.Close()
	c, err := client.New(client.Config{Server: srv.URL, Organization: "acme", Token: "kgm_…"})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	done, err := c.SetStatuses(context.Background(), client.StatusChange{
		Action: "revoke", Targets: []client.Target{{App: "a1"}}, Wait: true, Change: client.Change{Reason: "key leaked"},
	})
	if err != nil {
		log.Fatal(err)
	}
	r := done.Receipt
	fmt.Printf("revoked at revision %d, applied on %d of %d replicas\n", done.Revision, r.Replicas.Applied, r.Replicas.Total)
	// Output: revoked at revision 42, applied on 3 of 3 replicas
}

func ExampleClient_Developers() {
	srv := api(map[string]string{
		"GET /v1/organizations/acme/developers": `{"developer":[{"email":"ann@example.com"},{"email":"bob@example.com"}]}`,
	})
	defer srv.Close()
	c, err := client.New(client.Config{Server: srv.URL, Organization: "acme", Token: "kgm_…"})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	for d, err := range c.Developers(context.Background()) { // all pages
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(d.Email)
	}
	// Output:
	// ann@example.com
	// bob@example.com
}
