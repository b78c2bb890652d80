// Package e2e tests Larder in a real Kubernetes: the one that program cluster runs, or any other.
//
// Whatever a test does to nodes and processes, the others see the same cluster again: every
// test has a Kubernetes namespace of its own, whose deletion must end, and data of its own.
package e2e

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

var flags struct {
	kubeconfig, cluster, image, logs, only string
	list                                   bool
}

func TestMain(m *testing.M) {
	flag.StringVar(&flags.kubeconfig, "kubeconfig", os.Getenv("KUBECONFIG"), "`file` that names the cluster; Larder is installed there")
	flag.StringVar(&flags.cluster, "cluster", "", "the cluster `program`, if it runs the cluster: without it no test touches nodes")
	flag.StringVar(&flags.image, "image", "localhost/larder-e2e:1", "`image` of the tests' pods, as nodes pull it")
	flag.StringVar(&flags.logs, "logs", "build/e2e/logs", "`directory` that gets the logs of what failed")
	flag.StringVar(&flags.only, "only", "", "run only the tests whose names match this `pattern`")
	flag.BoolVar(&flags.list, "list", false, "list the tests")
	flag.Parse()
	// Most of a test is waiting for Kubernetes.
	if err := flag.Set("test.parallel", "3"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// env is the cluster that all tests share.
type env struct {
	config *rest.Config
	client kubernetes.Interface
	s3     *store
	nodes  []string // that can run pods
	tables []string // prefixes of the store that have been filled with files
}

// scenario is one test. Its name is a sentence about Larder.
type scenario struct {
	name    string
	run     func(*test)
	ownNode bool          // needs the machines of the nodes: only with -cluster
	shares  bool          // takes nothing from others: may run beside its neighbours
	limit   time.Duration // 0 means 5 minutes
}

// together says that none of these takes anything from another.
func together(list []scenario) []scenario {
	for i := range list {
		list[i].shares = true
	}
	return list
}

func TestLarder(t *testing.T) {
	only, err := regexp.Compile(flags.only)
	if err != nil {
		t.Fatal(err)
	}
	chosen := slices.DeleteFunc(scenarios(), func(s scenario) bool { return !only.MatchString(s.name) })
	if len(chosen) == 0 {
		t.Fatalf("no test matches %q; -list names them", flags.only)
	}
	if flags.list {
		for _, s := range chosen {
			fmt.Println(s.name)
		}
		return
	}
	e := connect(t)
	start := time.Now()
	for len(chosen) > 0 {
		n := 1
		for chosen[0].shares && n < len(chosen) && chosen[n].shares {
			n++
		}
		t.Run("", func(t *testing.T) {
			for _, s := range chosen[:n] {
				t.Run(s.name, func(t *testing.T) { e.scenario(t, s) })
			}
		})
		chosen = chosen[n:]
	}
	fmt.Printf("%d s in all\n", int(time.Since(start).Seconds()))
}

func (e *env) scenario(t *testing.T, s scenario) {
	if s.ownNode && flags.cluster == "" {
		fmt.Printf("not run        %s (it needs the nodes' machines)\n", s.name)
		return
	}
	if s.shares {
		t.Parallel()
	}
	start := time.Now()
	t.Cleanup(func() { // the last one: what the test leaves is removed by then
		verdict := map[bool]string{true: "FAILED", false: "ok"}[t.Failed()]
		fmt.Printf("%-6s %6.1fs %s\n", verdict, time.Since(start).Seconds(), s.name)
	})
	ctx, cancel := context.WithTimeout(t.Context(), cmp.Or(s.limit, 5*time.Minute))
	defer cancel()
	x := &test{T: t, env: e, ctx: ctx}
	defer func() { // before the clean-up, which removes what there is to see
		if t.Failed() {
			x.keepLogs(s.name)
		}
	}()
	x.makeNamespace()
	s.run(x)
}

func connect(t *testing.T) *env {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", flags.kubeconfig)
	if err != nil {
		t.Fatalf("which cluster? %v", err)
	}
	config.QPS, config.Burst = 100, 200
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	e := &env{config: config, client: client}
	x := &test{T: t, env: e, ctx: t.Context(), ns: systemNamespace}
	e.nodes = x.readyNodes()
	e.s3 = x.startStore()
	x.forbid()
	return e
}

// kubectl is for what users do with it, and for logs.
func kubectl(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "kubectl", append([]string{"--kubeconfig", flags.kubeconfig}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// keepLogs writes what one would look at first.
func (t *test) keepLogs(name string) {
	dir := filepath.Join(flags.logs, strings.ReplaceAll(strings.ReplaceAll(name, " ", "-"), "/", "-"))
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	err := os.MkdirAll(dir, 0o755)
	for file, args := range map[string][]string{
		"pods.txt":     {"get", "pods", "-A", "-o", "wide"},
		"events.txt":   {"get", "events", "-A", "--sort-by=.metadata.creationTimestamp"},
		"describe.txt": {"describe", "pods,pvc", "-n", t.ns},
		"volumes.yaml": {"get", "pv,pvc,csistoragecapacities,csinodes,volumeattachments", "-A", "-o", "yaml"},
		"system.txt":   {"describe", "pods", "-n", systemNamespace},
	} {
		out, _ := kubectl(ctx, args...) // its error is in the text
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, file), []byte(out), 0o644))
	}
	err = errors.Join(err, t.podLogs(ctx, dir, systemNamespace), t.podLogs(ctx, dir, t.ns))
	t.Logf("logs are in %s (%v)", dir, err)
	fmt.Printf("       logs of the failure below: %s\n", dir)
}
