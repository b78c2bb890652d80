package deploy

import (
	"encoding/json"
	"maps"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// podMonitor and prometheusRule have the fields of the Prometheus operator's types that we use.
type podMonitor struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              struct {
		Selector            metav1.LabelSelector `json:"selector"`
		PodMetricsEndpoints []struct {
			Port        string `json:"port"`
			HonorLabels bool   `json:"honorLabels"`
			Relabelings []struct {
				SourceLabels []string `json:"sourceLabels"`
				TargetLabel  string   `json:"targetLabel"`
			} `json:"relabelings"`
		} `json:"podMetricsEndpoints"`
	} `json:"spec"`
}

type prometheusRule struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              rules `json:"spec"`
}

// rules is a rules file of Prometheus.
type rules struct {
	Groups []struct {
		Name  string `json:"name"`
		Rules []struct {
			Alert       string            `json:"alert"`
			Expr        string            `json:"expr"`
			For         string            `json:"for,omitempty"`
			Labels      map[string]string `json:"labels"`
			Annotations map[string]string `json:"annotations"`
		} `json:"rules"`
	} `json:"groups"`
}

type dashboard struct {
	UID        string
	Templating struct {
		List []struct{ Name, Definition string }
	}
	Panels []struct {
		Title, Type string
		GridPos     struct{ X, Y, W, H int }
		Targets     []struct{ Expr, LegendFormat string }
	}
}

func read(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestMonitoringIsInTheChartAsItIsInKustomize(t *testing.T) {
	want := kustomize(t, "monitoring")
	if len(want) != 3 {
		t.Fatalf("kustomize gives %v", slices.Sorted(maps.Keys(want)))
	}
	have, without := helm(t, "{monitoring: {enabled: true}}"), helm(t, "")
	for key, o := range want {
		if !reflect.DeepEqual(o, have[key]) {
			t.Errorf("%s: kustomize\n%.2000s\nhelm\n%.2000s", key, text(t, o), text(t, have[key]))
		}
		if without[key] != nil {
			t.Errorf("the chart has %s although nobody asked for it", key)
		}
	}
}

// Each workload that the PodMonitor selects has a port of that name.
func TestEveryProcessIsScraped(t *testing.T) {
	m := kustomize(t, "monitoring")["PodMonitor/larder"].(*podMonitor)
	if len(m.Spec.PodMetricsEndpoints) != 1 || !m.Spec.PodMetricsEndpoints[0].HonorLabels {
		t.Fatalf("%+v: without honorLabels the namespace of a claim is hidden by the pod's", m.Spec)
	}
	n := 0
	for name, o := range kustomize(t, "base") {
		var spec corev1.PodTemplateSpec
		switch o := o.(type) {
		case *appsv1.DaemonSet:
			spec = o.Spec.Template
		case *appsv1.Deployment:
			spec = o.Spec.Template
		case *appsv1.StatefulSet:
			spec = o.Spec.Template
		default:
			continue
		}
		n++
		for k, v := range m.Spec.Selector.MatchLabels {
			if spec.Labels[k] != v {
				t.Errorf("%s has no label %s: %s", name, k, v)
			}
		}
		ports := 0
		for _, c := range spec.Spec.Containers {
			for _, p := range c.Ports {
				if p.Name == m.Spec.PodMetricsEndpoints[0].Port {
					ports++
				}
			}
		}
		if ports != 1 {
			t.Errorf("%s has %d ports for metrics", name, ports)
		}
	}
	if n != 4 {
		t.Errorf("%d workloads of 4", n)
	}
}

func TestAlertsSayWhatHappenedAndWhatToDo(t *testing.T) {
	var r rules
	if err := yaml.UnmarshalStrict(read(t, "monitoring/alerts.yaml"), &r); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, g := range r.Groups {
		for _, a := range g.Rules {
			if seen[a.Alert] || !strings.HasPrefix(a.Alert, "Larder") {
				t.Errorf("alert %q is there twice, or not called Larder…", a.Alert)
			}
			seen[a.Alert] = true
			if _, err := time.ParseDuration(a.For); a.For != "" && err != nil {
				t.Errorf("%s: for: %v", a.Alert, err)
			}
			if !slices.Contains([]string{"critical", "warning", "info"}, a.Labels["severity"]) {
				t.Errorf("%s: severity %q", a.Alert, a.Labels["severity"])
			}
			if a.Annotations["summary"] == "" || !strings.HasSuffix(a.Annotations["description"], ".") || len(a.Annotations) != 2 {
				t.Errorf("%s: annotations %v", a.Alert, a.Annotations)
			}
			wellFormed(t, a.Alert, a.Expr)
		}
	}
	if len(seen) == 0 {
		t.Error("no alerts")
	}
}

func TestDashboardIsWellFormed(t *testing.T) {
	var d dashboard
	if err := json.Unmarshal(read(t, "monitoring/dashboard.json"), &d); err != nil {
		t.Fatal(err)
	}
	taken := map[[2]int]string{}
	for _, p := range d.Panels {
		for x := range p.GridPos.W {
			for y := range p.GridPos.H {
				at := [2]int{p.GridPos.X + x, p.GridPos.Y + y}
				if taken[at] != "" || at[0] >= 24 {
					t.Fatalf("panel %s lies on %q at %v", p.Title, taken[at], at)
				}
				taken[at] = p.Title
			}
		}
		if (p.Type == "row") != (len(p.Targets) == 0) {
			t.Errorf("panel %s has %d queries", p.Title, len(p.Targets))
		}
		for _, q := range p.Targets {
			wellFormed(t, p.Title, q.Expr)
			if q.LegendFormat == "" {
				t.Errorf("panel %s: %s has no legend", p.Title, q.Expr)
			}
		}
	}
}

// labels of each metric are those of the reference, and what the PodMonitor and Prometheus add.
func labels(t *testing.T) map[string][]string {
	t.Helper()
	out := map[string][]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `(larder_[a-z_]+)(?:\\{([a-z,]+)\\})?` \\| ([a-z]+) \\|").FindAllStringSubmatch(string(read(t, "../cmd/larder/REFERENCE.md")), -1) {
		more := []string{"node", "component", "namespace", "pod"}
		if m[2] != "" {
			more = append(more, strings.Split(m[2], ",")...)
		}
		if m[3] != "histogram" {
			out[m[1]] = more
			continue
		}
		out[m[1]+"_bucket"], out[m[1]+"_sum"], out[m[1]+"_count"] = append(more, "le"), more, more
	}
	if len(out) == 0 {
		t.Fatal("no metrics in the reference")
	}
	return out
}

var (
	metricIn = regexp.MustCompile(`(larder_[a-z_]+)(?:\{([^}]*)\})?`)
	labelIn  = regexp.MustCompile(`([a-z_]+)\s*(?:=~|!~|!=|=)\s*"[^"]*"`)
	groupIn  = regexp.MustCompile(`\b(?:by|without)\s*\(([^)]*)\)`)
)

// wellFormed looks at a query as far as can be without a parser of PromQL: brackets, metrics and labels.
func wellFormed(t *testing.T, where, query string) {
	t.Helper()
	known := labels(t)
	var open []rune
	closes := map[rune]rune{')': '(', '}': '{', ']': '['}
	for _, c := range regexp.MustCompile(`"[^"]*"`).ReplaceAllString(query, `""`) {
		switch {
		case strings.ContainsRune("({[", c):
			open = append(open, c)
		case closes[c] != 0:
			if len(open) == 0 || open[len(open)-1] != closes[c] {
				t.Errorf("%s: brackets of %s", where, query)
				return
			}
			open = open[:len(open)-1]
		}
	}
	if len(open) > 0 {
		t.Errorf("%s: brackets of %s", where, query)
	}
	found := map[string]bool{} // labels that the query's metrics have
	metrics := metricIn.FindAllStringSubmatch(query, -1)
	for _, m := range metrics {
		have, ok := known[m[1]]
		if !ok {
			t.Errorf("%s: there is no metric %s", where, m[1])
		}
		for _, l := range have {
			found[l] = true
		}
		for _, l := range labelIn.FindAllStringSubmatch(m[2], -1) {
			if !slices.Contains(have, l[1]) {
				t.Errorf("%s: %s has no label %s", where, m[1], l[1])
			}
		}
	}
	if len(metrics) == 0 {
		t.Errorf("%s: no metric in %s", where, query)
	}
	for _, g := range groupIn.FindAllStringSubmatch(query, -1) {
		for _, l := range strings.Split(g[1], ",") {
			if !found[strings.TrimSpace(l)] {
				t.Errorf("%s: %s groups by %s, which its metrics do not have", where, query, l)
			}
		}
	}
}
