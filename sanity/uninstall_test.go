package sanity

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/larderfs/larder/sanity/s3test"
)

// daemonSets is an API server that knows one DaemonSet, and after a while none. It counts who asks.
type daemonSets struct {
	*httptest.Server
	asked, gone atomic.Int64
}

func startDaemonSets(t *testing.T) *daemonSets {
	t.Helper()
	d := &daemonSets{}
	d.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if r.URL.Path != "/apis/apps/v1/namespaces/larder-system/daemonsets/larder-node" || d.gone.Load() > 0 {
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, `{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}`)
			return
		}
		d.asked.Add(1)
		fmt.Fprint(w, `{"kind": "DaemonSet", "apiVersion": "apps/v1", "metadata": {"name": "larder-node", "namespace": "larder-system"}}`)
	}))
	t.Cleanup(d.Close)
	return d
}

func (d *daemonSets) kubeconfig(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf("apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: %q}}]\nusers: [{name: u, user: {}}]\n"+
		"contexts: [{name: x, context: {cluster: c, user: u}}]\ncurrent-context: x\n", d.URL)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// A node plugin and a worker that are told to stop because Larder is uninstalled go on until the last
// volume is unpublished, though nobody follows them; for an update they do not wait.
func TestUninstallTakesNothingFromPodsThatRun(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"ds/f": pattern(3<<20, 7)})
	for uninstalled, linger := range map[bool]string{true: "--linger=20s", false: "--linger=1s"} {
		t.Run(fmt.Sprint("uninstalled ", uninstalled), func(t *testing.T) {
			api := startDaemonSets(t)
			a := startApart(t, store.Endpoint, "node", "--daemonset=larder-system/larder-node", "node", "--kubeconfig="+api.kubeconfig(t),
				"node", "--drain-timeout=1s", "worker", linger)
			v, target := publish(t, a.Kubelet, bucket(store, "v", "ds"))
			eventually(t, "the node plugin has seen its DaemonSet", func() bool { return api.asked.Load() > 0 })
			if uninstalled {
				api.gone.Store(1)
			}
			ended := map[string]chan error{}
			for _, name := range []string{"node", "worker"} {
				cmd, ch := a.procs[name], make(chan error, 1)
				delete(a.procs, name)
				ended[name] = ch
				if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
					t.Fatal(err)
				}
				go func() { ch <- cmd.Wait() }()
				t.Cleanup(func() { cmd.Process.Kill() })
			}
			if !uninstalled {
				await(t, ended["node"], "the node plugin")
				a.start("node") // the next one gets the mounts from the worker, which is asked for them at its end
				await(t, ended["worker"], "the worker")
				a.start("worker")
				return
			}
			if got := mustShell(t, "sha256sum < "+target+"/data/f"); !strings.HasPrefix(got, sum(pattern(3<<20, 7))) {
				t.Errorf("read %s", got)
			}
			for name, ch := range ended {
				select {
				case err := <-ch:
					t.Fatalf("%s has ended under a pod: %v", name, err)
				default:
				}
			}
			if err := a.Unpublish(t.Context(), v); err != nil {
				t.Fatal(err)
			}
			await(t, ended["worker"], "the worker")
			await(t, ended["node"], "the node plugin")
			a.start("node")
			a.start("worker")
		})
	}
}

func await(t *testing.T, ended chan error, what string) {
	t.Helper()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	case <-time.After(30 * time.Second):
		t.Fatalf("%s does not end", what)
	}
}
