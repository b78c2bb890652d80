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
	out := flag.String("o", "larder/templates", "`directory` of the templates")
	check := flag.Bool("check", false, "write nothing; fail if something would change")
	flag.Parse()
	if err := run(*base, *out, *check); err != nil {
		fmt.Fprintln(os.Stderr, "helm:", err)
		os.Exit(1)
	}
}

// files of the base that are in the chart. The namespace is not: Helm makes it, or the user.
var files = []string{"csidriver.yaml", "storageclasses.yaml", "rbac.yaml", "policies.yaml", "master.yaml", "controller.yaml", "node.yaml", "worker.yaml", "networkpolicies.yaml"}

func run(base, out string, check bool) error {
	for _, name := range files {
		in, err := os.ReadFile(filepath.Join(base, name))
		if err != nil {
			return err
		}
		want, err := template(name, string(in))
		if err != nil {
			return err
		}
		to := filepath.Join(out, name)
		if check {
			if have, err := os.ReadFile(to); err != nil || !bytes.Equal(have, want) {
				return fmt.Errorf("%s is not made from %s: run make generate", to, filepath.Join(base, name))
			}
			continue
		}
		if err := os.WriteFile(to, want, 0o644); err != nil {
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

// placement of the two DaemonSets.
func placement(comment string) []edit {
	return []edit{
		{1, "      tolerations:\n      - operator: Exists # " + comment + "\n", "      {{- with .Values.tolerations }}\n      tolerations: {{- toYaml . | nindent 6 }}\n      {{- end }}\n"},
		{1, "      nodeSelector:\n        kubernetes.io/os: linux\n", "      {{- with .Values.nodeSelector }}\n      nodeSelector: {{- toYaml . | nindent 8 }}\n      {{- end }}\n"},
		{1, "hostPath: {path: /var/cache/larder,", "hostPath: {path: {{ .Values.cache.dir }},"},
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
		list("        - --metrics-listen=:9812\n", "node.extraArgs", "{{ . }}"),
		list("        - --metrics-listen=:9812\n", "inlineEndpoints", "--inline-endpoint={{ . }}"),
		resources("node", "cpu: 10m, memory: 64Mi", "memory: 512Mi"),
		edit{6, "/var/lib/kubelet", "{{ .Values.kubeletDir }}"},
	),
	"worker.yaml": append(placement("wherever a pod may run"),
		clients,
		list("        - --metrics-listen=:9811\n", "worker.extraArgs", "{{ . }}"),
		edit{1, "--tier=/var/cache/larder:10GiB", "--tier=/var/cache/larder:{{ .Values.cache.capacity }}"},
		edit{1, "--min-free=1GiB", "--min-free={{ .Values.cache.minFree }}"},
		resources("worker", "cpu: 100m, memory: 256Mi", "memory: 2Gi"),
	),
	"networkpolicies.yaml": {
		{1, "    ports:\n    - {port: 9820}\n", "    ports:\n    - {port: 9820}\n  " + several +
			"  - from: # etcd's members among each other\n    - podSelector:\n        matchLabels: {app.kubernetes.io/name: larder, app.kubernetes.io/component: master}\n" +
			"    ports:\n    - {port: 2380}\n  {{- end }}\n"},
	},
}
