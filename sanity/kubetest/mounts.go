package kubetest

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// Custom is an API server in memory that knows one kind of our own, cluster-wide, with a status
// of its own: what is asked of it is JSON.
type Custom struct {
	http *httptest.Server
	path string // of the kind: /apis/group/version/resource

	mu      sync.Mutex // guards the fields below
	version int
	objects map[string]map[string]any // by name
	changed chan struct{}             // closed at each change, then replaced
	writes  []string                  // "VERB name" or "VERB name/status"
}

// StartCustom starts one for the length of a test.
func StartCustom(t testing.TB, path string) *Custom {
	c := &Custom{path: path, objects: map[string]map[string]any{}, changed: make(chan struct{})}
	c.http = httptest.NewServer(http.HandlerFunc(c.serve))
	t.Cleanup(func() {
		c.http.CloseClientConnections() // watches
		c.http.Close()
	})
	return c
}

// Kubeconfig writes a file for clients and returns its path.
func (c *Custom) Kubeconfig(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf("apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: %q}}]\nusers: [{name: u, user: {}}]\ncontexts: [{name: x, context: {cluster: c, user: u}}]\ncurrent-context: x\n", c.http.URL)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Writes are those so far.
func (c *Custom) Writes() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.writes)
}

// Field is a part of an object, as text; "" if there is none.
func (c *Custom) Field(name string, path ...string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var v any = c.objects[name]
	for _, p := range path {
		switch at := v.(type) {
		case map[string]any:
			v = at[p]
		case []any:
			i, err := strconv.Atoi(p)
			if err != nil || i >= len(at) {
				return ""
			}
			v = at[i]
		default:
			return ""
		}
	}
	if v == nil {
		return ""
	}
	return fmt.Sprint(v)
}

func (c *Custom) serve(w http.ResponseWriter, r *http.Request) {
	rest, ok := strings.CutPrefix(r.URL.Path, c.path)
	name, sub, _ := strings.Cut(strings.TrimPrefix(rest, "/"), "/")
	if !ok || sub != "" && sub != "status" {
		c.refuse(w, http.StatusNotFound, "NotFound")
		return
	}
	if r.URL.Query().Get("watch") != "" {
		c.watch(w, r)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if r.Method == http.MethodGet && name == "" {
		items := []any{}
		for _, n := range sortedNames(c.objects) {
			items = append(items, c.objects[n])
		}
		c.answer(w, http.StatusOK, map[string]any{"metadata": map[string]any{"resourceVersion": strconv.Itoa(c.version)}, "items": items})
		return
	}
	var body map[string]any
	if r.Method != http.MethodGet && r.Method != http.MethodDelete {
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
			c.refuse(w, http.StatusBadRequest, "BadRequest")
			return
		}
	}
	c.write(w, r.Method, name, sub, body)
}

// write requires c.mu.
func (c *Custom) write(w http.ResponseWriter, method, name, sub string, body map[string]any) {
	if method == http.MethodPost {
		name = fmt.Sprint(meta(body)["name"])
	}
	had, there := c.objects[name]
	switch {
	case method == http.MethodPost && there:
		c.refuse(w, http.StatusConflict, "AlreadyExists")
		return
	case method != http.MethodPost && !there:
		c.refuse(w, http.StatusNotFound, "NotFound")
		return
	case method == http.MethodPut && meta(body)["resourceVersion"] != meta(had)["resourceVersion"]:
		c.refuse(w, http.StatusConflict, "Conflict")
		return
	}
	if method != http.MethodGet {
		c.version++
		c.writes = append(c.writes, strings.TrimSuffix(method+" "+name+"/"+sub, "/"))
		defer func() { close(c.changed); c.changed = make(chan struct{}) }()
	}
	now := map[string]any{}
	switch method {
	case http.MethodGet:
		c.answer(w, http.StatusOK, had)
		return
	case http.MethodDelete:
		delete(c.objects, name)
		c.answer(w, http.StatusOK, had)
		return
	case http.MethodPatch: // of the status, as a whole
		now = map[string]any{"metadata": meta(had), "spec": had["spec"], "status": body["status"]}
	case http.MethodPut:
		now = map[string]any{"metadata": meta(had), "spec": body["spec"], "status": had["status"]}
		meta(now)["generation"] = meta(had)["generation"].(int) + 1
	case http.MethodPost:
		now = map[string]any{"metadata": map[string]any{"name": name, "uid": fmt.Sprint("uid-", c.version), "generation": 1,
			"creationTimestamp": time.Unix(int64(c.version), 0).UTC().Format(time.RFC3339)}, "spec": body["spec"]}
	}
	meta(now)["resourceVersion"] = strconv.Itoa(c.version)
	c.objects[name] = now
	c.answer(w, http.StatusOK, now)
}

func (c *Custom) watch(w http.ResponseWriter, r *http.Request) {
	since, _ := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
	w.(http.Flusher).Flush()
	for {
		c.mu.Lock()
		version, changed := c.version, c.changed
		c.mu.Unlock()
		if version > since {
			fmt.Fprintln(w, `{"type":"MODIFIED","object":{}}`)
			return
		}
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}

func (c *Custom) answer(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(v)
}

func (c *Custom) refuse(w http.ResponseWriter, code int, reason string) {
	c.answer(w, code, map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code, "message": reason})
}

func meta(o map[string]any) map[string]any {
	m, _ := o["metadata"].(map[string]any)
	return m
}

func sortedNames(m map[string]map[string]any) (names []string) {
	for n := range m {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}
