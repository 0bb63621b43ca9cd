package keygatetest_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/access"
	"keygate/apigee"
	"keygate/audit"
	"keygate/keygatetest"
	"keygate/keygatetest/etcdtest"
	"keygate/ledger"
	"keygate/statestore"
)

// twoManagers are two keygates over one etcd, each with a client of its API.
func twoManagers(t *testing.T) (k *keygatetest.Keygate, both [2]*api) {
	t.Helper()
	etcd := etcdtest.StartProcess(t)
	cfg := statestore.EtcdConfig{Endpoints: []string{etcd.Endpoint()}}
	ring := newSeal(t)
	writer := etcd.Client(t)
	token := newToken(t, writer, keygatetest.Settings().Space, access.Admin)
	for i := range both {
		k = keygatetest.Start(t, keygatetest.Options{Etcd: cfg, Writer: writer, Manage: true, Seal: ring})
		both[i] = newAPI(t, k.Server.ManagementAddr(), token)
	}
	return k, both
}

// register is what an operation on one value was and did, for porcupine: a read,
// or a write. A write that has a from replaces that value, and none other.
type register struct {
	write    bool
	from, to string
	compares bool
}

// registerModel is one value, empty at first. The output of an operation is
// what a read returned.
var registerModel = porcupine.Model{
	Init: func() any { return "" },
	Step: func(state, input, output any) (bool, any) {
		in := input.(register)
		switch {
		case !in.write:
			return state == output, state
		case in.compares:
			return state == in.from, in.to
		}
		return true, in.to
	},
	DescribeOperation: func(input, output any) string {
		return fmt.Sprintf("%+v -> %v", input, output)
	},
}

// histories of the values that were read and written. Safe for concurrent use.
type histories struct {
	began time.Time

	state struct {
		sync.Mutex
		of map[string][]porcupine.Operation
	}
}

func (h *histories) now() int64 { return int64(time.Since(h.began)) }

func (h *histories) add(value string, client int, call int64, in register, out string) {
	returned := h.now()
	h.state.Lock()
	defer h.state.Unlock()
	h.state.of[value] = append(h.state.of[value], porcupine.Operation{ClientId: client, Input: in, Call: call, Output: out, Return: returned})
}

// Clients of two servers edit and read the same developer, app, key and product:
// what each was told fits into one order, no edit is lost, and what says
// If-Match replaced what it had read.
func TestManagersEditConcurrently(t *testing.T) {
	t.Parallel()
	const (
		workers = 6
		rounds  = 15
	)
	k, both := twoManagers(t)
	makeApp(t, k, both[0])
	both[0].call(t, 201, "POST", appPath+"/keys", `{"consumerKey":"`+ownKey+`","consumerSecret":"s"}`)
	both[0].call(t, 200, "POST", appPath+"/keys/"+ownKey, `{"apiProducts":["Weather-Product"]}`)

	// object is one that is edited. set is the request that sets its attribute of
	// that name.
	type object struct {
		path   string
		set    func(attribute, value string) (method, path, body string)
		status []string // words of ?action=, and the words they lead to; none for a product
		only   bool     // its attributes are replaced together: without If-Match one would go with another
	}
	one := func(path string) func(attribute, value string) (string, string, string) {
		return func(attribute, value string) (string, string, string) {
			return "POST", path + "/attributes/" + attribute, fmt.Sprintf(`{"name":%q,"value":%q}`, attribute, value)
		}
	}
	keyPath := appPath + "/keys/" + ownKey
	objects := []*object{
		{path: annPath, set: one(annPath), status: []string{"active", "active", "inactive", "inactive"}},
		{path: appPath, set: one(appPath), status: []string{"approve", "approved", "revoke", "revoked"}},
		{path: keyPath, only: true, status: []string{"approve", "approved", "revoke", "revoked"}, set: func(attribute, value string) (string, string, string) {
			return "POST", keyPath, fmt.Sprintf(`{"attributes":[{"name":%q,"value":%q}]}`, attribute, value)
		}},
		{path: "/apiproducts/Weather-Product", set: one("/apiproducts/Weather-Product")},
	}
	type entity struct {
		Status     string
		Attributes []struct{ Name, Value string }
	}
	value := func(e entity, name string) string {
		for _, a := range e.Attributes {
			if a.Name == name {
				return a.Value
			}
		}
		return ""
	}
	h := &histories{began: time.Now()}
	h.state.of = map[string][]porcupine.Operation{}
	var matched, missed, set, changed, conflicts atomic.Int64
	type revised struct {
		revision int64
		from, to string
	}
	var inOrder struct {
		sync.Mutex
		of map[*object][]revised // what If-Match replaced
	}
	inOrder.of = map[*object][]revised{}
	var last [workers]map[string]string // by object, of each worker's own attribute

	var running sync.WaitGroup
	for w := range workers {
		last[w] = map[string]string{}
		running.Go(func() {
			own := "own-" + strconv.Itoa(w)
			for round := range rounds {
				for i, o := range objects {
					a := both[rand.IntN(2)]
					fresh := fmt.Sprintf("%d-%d-%d", w, round, i)
					// A conflict has changed nothing, and asks to repeat the request.
					ask := func(method, path, body string, headers ...string) (answer, bool) {
						for {
							got, err := a.try(t.Context(), method, path, body, headers...)
							if err != nil {
								t.Errorf("%s %s: %v", method, path, err)
							}
							if err != nil || got.status != 409 || !strings.Contains(got.body, `"keygate.conflict"`) {
								return got, err == nil
							}
							conflicts.Add(1)
						}
					}

					// What is there, and its revision.
					call := h.now()
					got, ok := ask("GET", o.path, "")
					var read entity
					if !ok || got.status != 200 || json.Unmarshal([]byte(got.body), &read) != nil {
						t.Errorf("get %s: %d %s", o.path, got.status, got.body)
						return
					}
					h.add(o.path+" shared", w, call, register{}, value(read, "shared"))
					if o.status != nil {
						h.add(o.path+" status", w, call, register{}, read.Status)
					}
					if !o.only && value(read, own) != last[w][o.path] {
						t.Errorf("%s: got the own attribute %q, want %q, which was the last that was written", o.path, value(read, own), last[w][o.path])
					}

					// Replace what was read, if it is there yet.
					method, path, body := o.set("shared", fresh)
					call = h.now()
					tag := got.header.Get("ETag")
					got, ok = ask(method, path, body, "If-Match: "+tag)
					switch {
					case !ok:
						return
					case got.status == 200:
						matched.Add(1)
						from := value(read, "shared")
						h.add(o.path+" shared", w, call, register{write: true, compares: true, from: from, to: fresh}, "")
						revision, err := strconv.ParseInt(got.header.Get("X-Keygate-Revision"), 10, 64)
						if err != nil {
							t.Errorf("x-keygate-revision: %v", err)
						}
						inOrder.Lock()
						inOrder.of[o] = append(inOrder.of[o], revised{revision, from, fresh})
						inOrder.Unlock()
					case got.status == 412:
						missed.Add(1)
					default:
						t.Errorf("edit %s: got %d, want 200 or 412: %s", o.path, got.status, got.body)
					}

					// One's own, whatever the others do.
					if !o.only {
						method, path, body = o.set(own, fresh)
						if got, ok = ask(method, path, body); !ok || got.status != 200 {
							t.Errorf("set an attribute of %s: got %d, want 200: %s", o.path, got.status, got.body)
							return
						}
						last[w][o.path] = fresh
						set.Add(1)
					}
					if o.status != nil && rand.IntN(2) == 0 {
						to := 2 * rand.IntN(2)
						call = h.now()
						if got, ok = ask("POST", o.path+"?action="+o.status[to], ""); !ok || got.status != 204 {
							t.Errorf("set the status of %s: got %d, want 204: %s", o.path, got.status, got.body)
							return
						}
						h.add(o.path+" status", w, call, register{write: true, to: o.status[to+1]}, "")
						changed.Add(1)
					}
				}
			}
		})
	}
	running.Wait()
	if t.Failed() {
		return
	}

	for _, o := range objects {
		var now entity
		both[0].call(t, 200, "GET", o.path, "").into(t, &now)
		for w := range workers {
			if own := "own-" + strconv.Itoa(w); !o.only && value(now, own) != last[w][o.path] {
				t.Errorf("%s: got %s %q in the end, want %q", o.path, own, value(now, own), last[w][o.path])
			}
		}
		// Each edit that was told to have replaced what it had read did so.
		edits := inOrder.of[o]
		slices.SortFunc(edits, func(a, b revised) int { return int(a.revision - b.revision) })
		from := ""
		for _, e := range edits {
			if e.from != from {
				t.Errorf("%s at revision %d: replaced %q, want %q, the one before it", o.path, e.revision, e.from, from)
			}
			from = e.to
		}
		if got := value(now, "shared"); got != from {
			t.Errorf("%s: got %q in the end, want %q, the last of %d edits", o.path, got, from, len(edits))
		}
		if len(edits) == 0 {
			t.Errorf("%s: no edit with If-Match went through", o.path)
		}
	}
	for name, ops := range h.state.of {
		if _, status, _ := strings.Cut(name, " "); status == "status" {
			// They are not empty at first.
			initial := map[bool]string{true: "active", false: "approved"}[name == annPath+" status"]
			ops = append(ops, porcupine.Operation{ClientId: workers, Input: register{write: true, to: initial}, Call: -2, Output: "", Return: -1})
		}
		if got := porcupine.CheckOperationsTimeout(registerModel, ops, keygatetest.Patience); got != porcupine.Ok {
			t.Errorf("%s: %d operations: got %s, want an order that explains them", name, len(ops), got)
		}
	}
	t.Logf("edits with If-Match: %d made, %d refused; %d attributes set, %d statuses changed, %d requests repeated; %d histories",
		matched.Load(), missed.Load(), set.Load(), changed.Load(), conflicts.Load(), len(h.state.of))
	if missed.Load() == 0 {
		t.Error("no edit was refused: the clients did not meet")
	}
}

// A request that is sent to both servers at once, and again, under one
// Idempotency-Key, is done once and answered alike.
func TestManagersRepeatOnce(t *testing.T) {
	t.Parallel()
	k, both := twoManagers(t)
	makeApp(t, k, both[0])
	replayed := 0
	// twice sends a request to both servers, a few times each.
	twice := func(method, path, body, once string, want int) (first answer) {
		t.Helper()
		var answers [6]answer
		var running sync.WaitGroup
		start := make(chan struct{})
		for i := range answers {
			running.Go(func() {
				<-start
				var err error
				if answers[i], err = both[i%2].try(t.Context(), method, path, body, "Idempotency-Key: "+once); err != nil {
					t.Errorf("%s %s: %v", method, path, err)
				}
			})
		}
		close(start)
		running.Wait()
		replays := 0
		for i, got := range answers {
			if got.status != want || got.body != answers[0].body {
				t.Fatalf("%s %s, answer %d: got %d %s, want %d %s", method, path, i, got.status, got.body, want, answers[0].body)
			}
			if got.header.Get("Idempotency-Replayed") == "true" {
				replays++
			}
		}
		if replays != len(answers)-1 {
			t.Errorf("%s %s: %d of %d answers were replays, want all but one", method, path, replays, len(answers))
		}
		replayed += replays
		return answers[0]
	}
	for i := range 10 {
		once := "create-" + strconv.Itoa(i)
		name := "app-" + strconv.Itoa(i)
		path := annPath + "/apps/" + name
		body := `{"name":"` + name + `","apiProducts":["Weather-Product"]}`
		var made, now struct {
			AppID       string
			Credentials []madeKey
		}
		twice("POST", annPath+"/apps", body, once, 201).into(t, &made)
		both[0].call(t, 200, "GET", path, "").into(t, &now)
		if now.AppID != made.AppID || len(now.Credentials) != 1 || now.Credentials[0] != made.Credentials[0] {
			t.Errorf("%s: got %d credentials of app %s, want the one that was answered, of app %s", name, len(now.Credentials), now.AppID, made.AppID)
		}
		// Without the key each of these would make a credential.
		twice("POST", path, `{"apiProducts":["Weather-Product"]}`, "add-"+strconv.Itoa(i), 200)
		both[1].call(t, 200, "GET", path, "").into(t, &now)
		if len(now.Credentials) != 2 {
			t.Errorf("%s: got %d credentials after one that was added repeatedly, want 2", name, len(now.Credentials))
		}
		// The key stands for this request alone.
		if got := both[i%2].call(t, 422, "POST", annPath+"/apps", `{"name":"another"}`, "Idempotency-Key: "+once); !strings.Contains(got.body, "keygate.idempotency_key") {
			t.Errorf("another request with the same key: got %s", got.body)
		}
		twice("POST", path+"?action=revoke", "", "revoke-"+strconv.Itoa(i), 204)
		// What is repeated late does not undo what came after it.
		both[0].call(t, 204, "POST", path+"?action=approve", "")
		both[1].call(t, 204, "POST", path+"?action=revoke", "", "Idempotency-Key: revoke-"+strconv.Itoa(i))
		var app struct{ Status string }
		both[0].call(t, 200, "GET", path, "").into(t, &app)
		if app.Status != "approved" {
			t.Errorf("%s: got %s after a revocation that was repeated late, want approved", name, app.Status)
		}
		twice("DELETE", path, "", "delete-"+strconv.Itoa(i), 200)
		both[0].call(t, 404, "GET", path, "")
	}
	// One record for each that was done.
	counts := map[string]int{}
	var exported bytes.Buffer
	if _, err := audit.Export(t.Context(), k.Writer, k.Settings.Space, "default", &exported); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(exported.String()) {
		var r audit.Record
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("read the audit trail: %v", err)
		}
		if strings.Contains(r.Object, "/apps/") {
			counts[r.Action]++
		}
	}
	// makeApp has made one.
	if want := (map[string]int{"create": 11, "update": 10, "revoke": 10, "approve": 10, "delete": 10}); !maps.Equal(counts, want) {
		t.Errorf("audit records of apps: got %v, want %v", counts, want)
	}
	t.Logf("%d requests were answered by replay", replayed)
}

// buildKeygate builds the keygate that users run, and returns its path.
func buildKeygate(t testing.TB) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "keygate")
	build := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-o", binary, "keygate/cmd/keygate")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build keygate: %v\n%s", err, out)
	}
	return binary
}

// process is a keygate serve that can be killed.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{}
	authz string // its address
	api   *api
}

// startProcess runs the binary over an etcd, and returns when its API answers.
func startProcess(t testing.TB, binary, endpoint, token string) *process {
	t.Helper()
	const anyPort = "127.0.0.1:0"
	p := &process{ended: make(chan struct{}), cmd: exec.Command(binary, "serve", "--etcd-endpoints", endpoint, "--log-format", "json",
		"--authz-listen", anyPort, "--health-listen", anyPort, "--management-listen", anyPort)}
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("start keygate: %v", err)
	}
	t.Cleanup(p.kill)
	served := make(chan string, 1)
	var log bytes.Buffer // read after ended is closed
	go func() {
		defer close(p.ended)
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			log.WriteString(lines.Text() + "\n")
			var line struct{ Msg, Authz, Address string }
			if json.Unmarshal(lines.Bytes(), &line) != nil {
				continue
			}
			switch line.Msg {
			case "keygate starts":
				p.authz = line.Authz // read after served
			case "the management API is served":
				served <- line.Address
			}
		}
		_, _ = io.Copy(io.Discard, stderr)
		_ = p.cmd.Wait() // it was killed
	}()
	select {
	case address := <-served:
		p.api = newAPI(t, address, token)
	case <-p.ended:
		t.Fatalf("keygate has ended:\n%s", log.String())
	case <-time.After(keygatetest.Patience):
		t.Fatal("keygate does not serve its API")
	}
	keygatetest.Eventually(t, keygatetest.Patience, "the API to answer", func() bool {
		got, err := p.api.try(t.Context(), "GET", "", "")
		return err == nil && got.status == 200
	})
	return p
}

// kill ends the process with SIGKILL, and returns when it has ended. Twice is
// fine.
func (p *process) kill() {
	_ = p.cmd.Process.Signal(syscall.SIGKILL)
	<-p.ended
}

// bigWrite is a request that takes several transactions, and what it is about.
type bigWrite struct {
	name               string
	method, path, body string
	ids                []string // whose values it removes, or changes
	before             map[string]string
	answered           int // its status; 0 if none came
}

// of are those of all values that are the write's business.
func (w *bigWrite) of(all map[string]string) map[string]string {
	its := map[string]string{}
	for path, value := range all {
		if slices.ContainsFunc(w.ids, func(id string) bool { return strings.Contains(path, id) || strings.Contains(value, id) }) {
			its[path] = value
		}
	}
	return its
}

// want is what the write leaves.
func (w *bigWrite) want() map[string]string {
	if w.method == "DELETE" {
		return map[string]string{}
	}
	want := maps.Clone(w.before)
	for path := range want {
		if strings.HasSuffix(path, "/status") && strings.Contains(path, "/keys/") {
			want[path] = "revoked"
		}
	}
	return want
}

// bigWrites makes n writes of each kind, and the apps that they are about as
// Apigee's JSON.
func bigWrites(t *testing.T, n int) (kinds [3][]*bigWrite, input *bytes.Buffer) {
	t.Helper()
	input = new(bytes.Buffer)
	// app returns the ids of its keys and its own.
	app := func(id, developer string, keys int) (ids []string) {
		fmt.Fprintf(input, `{"appId":%q,"developerId":%q,"name":%q,"status":"approved","credentials":[`, id, developer, id)
		for i := range keys {
			key := fmt.Sprintf("%s-key-%04d", id, i)
			ids = append(ids, keygatetest.KeyID(t, key).String())
			if i > 0 {
				input.WriteByte(',')
			}
			fmt.Fprintf(input, `{"consumerKey":%q,"status":"approved","expiresAt":-1,"apiProducts":[{"apiproduct":"Weather-Product","status":"approved"}]}`, key)
		}
		input.WriteString("]}\n")
		return append(ids, id)
	}
	for i := range n {
		id := fmt.Sprintf("app-to-delete-%02d", i)
		kinds[0] = append(kinds[0], &bigWrite{name: "delete an app", method: "DELETE", path: "/developers/owner/apps/" + id, ids: app(id, "owner", 200)})

		id = fmt.Sprintf("app-to-revoke-%02d", i)
		keys := app(id, "owner", 200)[:200]
		kinds[1] = append(kinds[1], &bigWrite{name: "revoke many keys", method: "POST", path: "/statuses", ids: keys,
			body: `{"action":"revoke","targets":[{"key":"` + strings.Join(keys, `"},{"key":"`) + `"}]}`})

		id = fmt.Sprintf("developer-to-delete-%02d", i)
		ids := []string{id + "/", `"` + id + `"`} // of the paths, and of the values
		for j := range 20 {
			ids = append(ids, app(fmt.Sprintf("%s-app-%02d", id, j), id, 3)...)
		}
		kinds[2] = append(kinds[2], &bigWrite{name: "delete a developer", method: "DELETE", path: "/developers/" + id, ids: ids})
	}
	return kinds, input
}

// A keygate is killed at any instant of a change that takes several
// transactions. When another has started and looked after it, either all of the
// change has been made or nothing.
func TestManagersKilled(t *testing.T) {
	t.Parallel()
	const kills = 4 // of each kind
	binary := buildKeygate(t)
	etcd := etcdtest.StartProcess(t)
	cli := etcd.Client(t)
	space := keygatetest.Settings().Space
	token := newToken(t, cli, space, access.Admin)
	kinds, input := bigWrites(t, 1+kills)
	importer := ledger.NewImporter(ledger.ImporterConfig{KV: cli, Space: space, Organization: "default"})
	var report ledger.Report
	if err := importer.Import(t.Context(), apigee.NewReader(apigee.ReaderConfig{Name: "apps.json"}, input), report.Add); err != nil || report.Refused > 0 {
		t.Fatalf("import: %v, %v, want nothing refused", report, err)
	}
	// stored is what stands in the records and in the index. What an audit record
	// or an answer that is kept says of them is none of it.
	stored := func() map[string]string {
		t.Helper()
		all := map[string]string{}
		for _, prefix := range []string{space.Watched(), space.Index("default")} {
			r, err := cli.Get(t.Context(), prefix, clientv3.WithPrefix())
			if err != nil {
				t.Fatalf("read etcd: %v", err)
			}
			for _, kv := range r.Kvs {
				all[string(kv.Key)] = string(kv.Value)
			}
		}
		return all
	}
	intents := func() int {
		t.Helper()
		r, err := cli.Get(t.Context(), space.Intents(), clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			t.Fatalf("read etcd: %v", err)
		}
		return int(r.Count)
	}
	before := stored()
	for _, writes := range kinds {
		for _, w := range writes {
			if w.before = w.of(before); len(w.before) < len(w.ids) {
				t.Fatalf("%s: got %d values before it, want at least %d", w.name, len(w.before), len(w.ids))
			}
		}
	}

	// How long each takes when nobody is killed.
	var lasts [3]time.Duration
	p := startProcess(t, binary, etcd.Endpoint(), token)
	for i, writes := range kinds {
		w := writes[0]
		began := time.Now()
		got := p.api.call(t, 200, w.method, w.path, w.body)
		w.answered, lasts[i] = got.status, time.Since(began)
	}
	p.kill()
	begun := 0
	for kill := range kills {
		for i, writes := range kinds {
			w := writes[1+kill]
			p := startProcess(t, binary, etcd.Endpoint(), token)
			watching, cancel := context.WithCancel(clientv3.WithRequireLeader(t.Context()))
			begins := cli.Watch(watching, space.Intents(), clientv3.WithPrefix(), clientv3.WithCreatedNotify(), clientv3.WithFilterDelete())
			<-begins // it watches
			already := intents()
			sent := make(chan struct{})
			go func() {
				defer close(sent)
				if got, err := p.api.try(t.Context(), w.method, w.path, w.body); err == nil {
					w.answered = got.status
				}
			}()
			// The first as soon as it has begun what takes several transactions, the
			// others at any time.
			at := time.After(rand.N(lasts[i] + lasts[i]/4))
			if kill == 0 {
				at = time.After(keygatetest.Patience)
			} else {
				begins = nil
			}
			select {
			case <-begins:
			case <-at:
			}
			p.kill()
			<-sent
			cancel()
			if intents() > already {
				begun++
			}
		}
	}
	if begun == 0 {
		t.Error("no keygate was killed in the middle of a change")
	}

	startProcess(t, binary, etcd.Endpoint(), token)
	began := time.Now()
	keygatetest.Eventually(t, 2*keygatetest.Patience, "all that was begun to be finished", func() bool { return intents() == 0 })
	finished := time.Since(began)
	after := stored()
	outcomes := map[string]int{}
	for _, writes := range kinds {
		for i, w := range writes {
			now := w.of(after)
			all, nothing := maps.Equal(now, w.want()), maps.Equal(now, w.before)
			outcomes[fmt.Sprintf("%s, answered %d: %s", w.name, w.answered, map[bool]string{true: "all", false: "nothing"}[all])]++
			switch {
			case !all && !nothing:
				t.Errorf("%s %d, answered %d: %d of %d values are there, neither as before nor as it should leave them", w.name, i, w.answered, len(now), len(w.before))
			case w.answered != 0 && w.answered != 200:
				t.Errorf("%s %d: answered %d, want 200 or nothing", w.name, i, w.answered)
			case w.answered != 0 && !all:
				t.Errorf("%s %d: answered %d, and nothing was done", w.name, i, w.answered)
			}
		}
	}
	t.Logf("alone they take %v; %d of %d changes were begun and left, and finished in %v by the next; %v", lasts, begun, 3*kills, finished.Round(time.Millisecond), outcomes)
}
