// Command helm writes the chart's templates from the kustomize base.
//
// There is one source: what the base says, the chart says, with what values.yaml names in the
// place of what is there. A replacement that no longer fits the base is an error.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

func main() {
	base := flag.String("base", "../base", "`directory` of the kustomize base")
	watch := flag.String("monitoring", "../monitoring", "`directory` of what watches Larder")
	out := flag.String("o", "larder", "`directory` of the chart")
	check := flag.Bool("check", false, "write nothing; fail if something would change")
	flag.Parse()
	if err := run(*base, *watch, *out, *check); err != nil {
		fmt.Fprintln(os.Stderr, "helm:", err)
		os.Exit(1)
	}
}

// files of the base that are in the chart. The namespace is not: Helm makes it, or the user.
var files = []string{"crds.yaml", "csidriver.yaml", "storageclasses.yaml", "rbac.yaml", "policies.yaml", "master.yaml", "controller.yaml", "node.yaml", "worker.yaml", "networkpolicies.yaml"}

func run(base, watch, out string, check bool) error {
	for _, name := range files {
		in, err := os.ReadFile(filepath.Join(base, name))
		if err != nil {
			return err
		}
		want, err := template(name, string(in))
		if err == nil {
			err = write(filepath.Join(out, "templates", name), want, check)
		}
		if err != nil {
			return err
		}
	}
	return monitoring(watch, out, check)
}

// write writes a file, or, to check, says that it would be another one.
func write(name string, want []byte, check bool) error {
	if !check {
		return os.WriteFile(name, want, 0o644)
	}
	if have, err := os.ReadFile(name); err != nil || !bytes.Equal(have, want) {
		return fmt.Errorf("%s is not what it is made from: run make generate", name)
	}
	return nil
}

// monitoring makes the PrometheusRule of the rules file, and what the chart has of both and of the dashboard: the chart
// keeps the two files as they are, because Prometheus and Grafana have braces of their own.
func monitoring(dir, out string, check bool) error {
	text := map[string]string{}
	for _, name := range []string{"podmonitor.yaml", "alerts.yaml", "dashboard.json"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		text[name] = string(b)
	}
	const rule = "apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n  name: larder\n  labels: {app.kubernetes.io/name: larder}\nspec:"
	var indented strings.Builder
	for line := range strings.Lines(text["alerts.yaml"]) {
		if strings.TrimSpace(line) != "" {
			indented.WriteString("  ")
		}
		indented.WriteString(line)
	}
	const dashboard = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: larder-dashboard\n  labels: {app.kubernetes.io/name: larder, grafana_dashboard: \"1\"}\ndata:\n  larder.json: |"
	made := map[string]string{
		filepath.Join(dir, "prometheusrule.yaml"):     "# Written from alerts.yaml by deploy/helm: change it there.\n" + rule + "\n" + indented.String(),
		filepath.Join(out, "files", "alerts.yaml"):    text["alerts.yaml"],
		filepath.Join(out, "files", "dashboard.json"): text["dashboard.json"],
		filepath.Join(out, "templates", "monitoring.yaml"): "# Written from deploy/monitoring by deploy/helm: change it there.\n{{- if .Values.monitoring.enabled }}\n" + text["podmonitor.yaml"] +
			"---\n" + rule + " {{- .Files.Get \"files/alerts.yaml\" | nindent 2 }}\n---\n" + dashboard + "{{ .Files.Get \"files/dashboard.json\" | nindent 4 }}\n{{- end }}\n",
	}
	for name, want := range made {
		if err := write(name, []byte(want), check); err != nil {
			return err
		}
	}
	return nil
}

// edit replaces all of a text in a file, which has to be in it so many times.
type edit struct {
	times    int
	old, new string
}

func template(name, text string) ([]byte, error) {
	for _, e := range append(edits[name], everywhere(name, text)...) {
		if n := strings.Count(text, e.old); n != e.times {
			return nil, fmt.Errorf("%s has %q %d times, not %d: change the chart's edits with it", name, e.old, n, e.times)
		}
		text = strings.ReplaceAll(text, e.old, e.new)
	}
	return []byte("# Written from deploy/base by deploy/helm: change it there.\n" + text), nil
}

// everywhere is what is replaced wherever it is.
func everywhere(name, text string) []edit {
	images := strings.Count(text, image)
	es := []edit{
		{images, image, "        image: {{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}\n" +
			"        {{- with .Values.image.pullPolicy }}\n        imagePullPolicy: {{ . }}\n        {{- end }}\n"},
		{images, "      enableServiceLinks: false\n", "      enableServiceLinks: false\n" +
			"      {{- with .Values.image.pullSecrets }}\n      imagePullSecrets:\n      {{- range . }}\n      - name: {{ . }}\n      {{- end }}\n      {{- end }}\n"},
	}
	if name == "rbac.yaml" {
		es = append(es, edit{strings.Count(text, "  namespace: larder-system\n"), "  namespace: larder-system\n", "  namespace: {{ .Release.Namespace }}\n"})
	}
	return es
}

const image = "        image: localhost/larder:0.1.0\n"

// list puts the values of a list behind the arguments that end with last.
func list(last, values, each string) edit {
	return edit{1, last, last + "        {{- range .Values." + values + " }}\n        - " + each + "\n        {{- end }}\n"}
}

// resources of a container, where the base has these.
func resources(of, requests, limits string) edit {
	return edit{1, "        resources:\n          requests: {" + requests + "}\n          limits: {" + limits + "}\n",
		"        resources: {{- toYaml .Values." + of + ".resources | nindent 10 }}\n"}
}

// eachTier writes lines for every tier behind the first.
func eachTier(lines string) string {
	return "        {{- range $i, $t := .Values.cache.tiers }}\n" + lines + "        {{- end }}\n"
}

// placement of the two DaemonSets.
func placement(comment string) []edit {
	return []edit{
		{1, "      tolerations:\n      - operator: Exists # " + comment + "\n", "      {{- with .Values.tolerations }}\n      tolerations: {{- toYaml . | nindent 6 }}\n      {{- end }}\n"},
		{1, "      nodeSelector:\n        kubernetes.io/os: linux\n", "      {{- with .Values.nodeSelector }}\n      nodeSelector: {{- toYaml . | nindent 8 }}\n      {{- end }}\n"},
		{1, "hostPath: {path: /var/cache/larder,", "hostPath: {path: {{ .Values.cache.dir }},"},
		{1, "      volumes:\n", "      volumes:\n" + eachTier("      - name: cache-{{ add1 $i }}\n        hostPath: {path: {{ $t.dir }}, type: DirectoryOrCreate}\n")},
	}
}

// clients of the masters: each is named where there are several.
var clients = edit{1, "        - --master=larder-master:9820\n", "        - --master={{ if gt (int .Values.master.replicas) 1 }}{{ range $i := until (int .Values.master.replicas) }}{{ if $i }},{{ end }}larder-master-{{ $i }}.larder-masters:9820{{ end }}{{ else }}larder-master:9820{{ end }}\n"}

const several = "{{- if gt (int .Values.master.replicas) 1 }}\n"

var edits = map[string][]edit{
	"storageclasses.yaml": {
		{1, "provisioner: csi.larder.dev\n", "provisioner: csi.larder.dev\n{{- with .Values.storageClass.parameters }}\nparameters: {{- toYaml . | nindent 2 }}\n{{- end }}\n"},
	},
	"policies.yaml": {{1, "/var/lib/kubelet", "{{ .Values.kubeletDir }}"}},
	"master.yaml": {
		{1, "  replicas: 1\n", "  replicas: {{ .Values.master.replicas }}\n"},
		list("        - --metrics-listen=:9810\n", "master.extraArgs", "{{ . }}"),
		{1, "        - --metrics-listen=:9810\n", "        - --metrics-listen=:9810\n        " + several +
			"        - --name=$(POD_NAME)\n" +
			"        - --initial-cluster={{ range $i := until (int .Values.master.replicas) }}{{ if $i }},{{ end }}larder-master-{{ $i }}=http://larder-master-{{ $i }}.larder-masters:2380{{ end }}\n" +
			"        - --peer-listen=:2380\n        {{- end }}\n"},
		{1, "        ports:\n        - {name: grpc, containerPort: 9820}\n", "        " + several +
			"        env:\n        - name: POD_NAME\n          valueFrom: {fieldRef: {fieldPath: metadata.name}}\n        {{- end }}\n" +
			"        ports:\n        " + several + "        - {name: peer, containerPort: 2380}\n        {{- end }}\n        - {name: grpc, containerPort: 9820}\n"},
		{1, "          failureThreshold: 60\n", "          failureThreshold: {{ if gt (int .Values.master.replicas) 1 }}600{{ else }}60{{ end }}\n"},
		{1, "      containers:\n", "      " + several + "      topologySpreadConstraints:\n      - maxSkew: 1\n        topologyKey: kubernetes.io/hostname\n" +
			"        whenUnsatisfiable: DoNotSchedule\n        labelSelector:\n          matchLabels: {app.kubernetes.io/name: larder, app.kubernetes.io/component: master}\n" +
			"      {{- end }}\n      containers:\n"},
		resources("master", "cpu: 50m, memory: 128Mi", "memory: 1Gi"),
		{1, "  # The cluster's memory. It may be lost: volumes come back from the workers within a minute.\n  volumeClaimTemplates:\n",
			"      {{- if not .Values.master.persistence.enabled }}\n      volumes:\n      - name: data\n        emptyDir: {}\n      {{- else }}\n" +
				"  # The cluster's memory. It may be lost: volumes come back from the workers within a minute.\n  volumeClaimTemplates:\n"},
		{1, "      accessModes: [ReadWriteOnce]\n", "      accessModes: [ReadWriteOnce]\n      {{- with .Values.master.persistence.storageClassName }}\n      storageClassName: {{ . }}\n      {{- end }}\n"},
		{1, "        requests: {storage: 2Gi}\n", "        requests: {storage: {{ .Values.master.persistence.size }}}\n      {{- end }}\n"},
	},
	"controller.yaml": {
		{1, "  replicas: 1\n", "  replicas: {{ .Values.controller.replicas }}\n"},
		clients,
		list("        - --metrics-listen=:9813\n", "controller.extraArgs", "{{ . }}"),
		list("        - --metrics-listen=:9813\n", "inlineEndpoints", "--inline-endpoint={{ . }}"),
		list("        - --retry-interval-max=1m\n", "provisioner.extraArgs", "{{ . }}"),
		{1, "registry.k8s.io/sig-storage/csi-provisioner:v6.3.0", "{{ .Values.provisioner.image }}"},
		resources("controller", "cpu: 10m, memory: 32Mi", "memory: 256Mi"),
		resources("provisioner", "cpu: 10m, memory: 64Mi", "memory: 512Mi"),
		{1, "      containers:\n", "      {{- if gt (int .Values.controller.replicas) 1 }}\n      topologySpreadConstraints:\n      - maxSkew: 1\n        topologyKey: kubernetes.io/hostname\n" +
			"        whenUnsatisfiable: ScheduleAnyway\n        labelSelector:\n          matchLabels: {app.kubernetes.io/name: larder, app.kubernetes.io/component: controller}\n" +
			"      {{- end }}\n      containers:\n"},
	},
	"node.yaml": append(placement("wherever a pod may run; the startup taint among them"),
		edit{1, "        - --tier-dir=/var/cache/larder\n", "        - --tier-dir=/var/cache/larder\n" + eachTier("        - --tier-dir=/var/cache/larder-{{ add1 $i }}\n")},
		edit{1, "        volumeMounts:\n", "        volumeMounts:\n" + eachTier("        - name: cache-{{ add1 $i }}\n          mountPath: /var/cache/larder-{{ add1 $i }}\n")},
		list("        - --metrics-listen=:9812\n", "node.extraArgs", "{{ . }}"),
		list("        - --metrics-listen=:9812\n", "inlineEndpoints", "--inline-endpoint={{ . }}"),
		list("        - --metrics-listen=:9812\n", "driverCredentials", "--driver-credentials={{ . }}"),
		list("        - --metrics-listen=:9812\n", "stsEndpoints", "--sts-endpoint={{ . }}"),
		resources("node", "cpu: 10m, memory: 64Mi", "memory: 512Mi"),
		edit{6, "/var/lib/kubelet", "{{ .Values.kubeletDir }}"},
	),
	"worker.yaml": append(placement("wherever a pod may run"),
		clients,
		list("        - --metrics-listen=:9811\n", "worker.extraArgs", "{{ . }}"),
		edit{1, "        - --tier=/var/cache/larder:10GiB\n", "        - --tier=/var/cache/larder:{{ .Values.cache.capacity }}\n" + eachTier("        - --tier=/var/cache/larder-{{ add1 $i }}:{{ $t.capacity }}:{{ $t.kind }}\n")},
		edit{1, "        - --view=/view\n", "        - --view=/view\n" + eachTier("        - --view=/view-{{ add1 $i }}\n")},
		edit{1, "        volumeMounts:\n", "        volumeMounts:\n" + eachTier("        - name: cache-{{ add1 $i }}\n          mountPath: /var/cache/larder-{{ add1 $i }}\n"+
			"        - name: cache-{{ add1 $i }}\n          mountPath: /view-{{ add1 $i }}\n          readOnly: true\n")},
		edit{1, "--min-free=1GiB", "--min-free={{ .Values.cache.minFree }}"},
		resources("worker", "cpu: 100m, memory: 256Mi", "memory: 2Gi"),
	),
	"networkpolicies.yaml": {
		{1, "    ports:\n    - {port: 9820}\n", "    ports:\n    - {port: 9820}\n  " + several +
			"  - from: # etcd's members among each other\n    - podSelector:\n        matchLabels: {app.kubernetes.io/name: larder, app.kubernetes.io/component: master}\n" +
			"    ports:\n    - {port: 2380}\n  {{- end }}\n"},
	},
}
