package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	authentication "k8s.io/api/authentication/v1"
	core "k8s.io/api/core/v1"
	rbac "k8s.io/api/rbac/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/larderfs/larder/sanity/e2e/spark"
)

func sparkScenarios() []scenario {
	return []scenario{
		{name: "Spark sums TPC-H by inline volumes; each executor reads from its own node's worker", run: sparkInline, ownNode: true, limit: 15 * time.Minute},
		{name: "Spark sums TPC-H by OnDemand claims, without a request to the store when both workers hold the table, and while a worker is killed", run: sparkOnDemand, ownNode: true, limit: 15 * time.Minute},
	}
}

// sums are TPC-H's of lineitem at scale 1: quantity and rows by return flag and line status.
var sums = []string{"A F 37734107.00 1478493", "N F 991417.00 38854", "N O 76633518.00 3004998", "R F 37719753.00 1478870"}

// sparkReady makes Spark, its data in the store (named tpch/FORMAT) and rights in the test's namespace.
func (t *test) sparkReady() spark.Spark {
	t.Helper()
	user, err := os.UserCacheDir()
	t.must(err)
	s, err := spark.Make(t.ctx, filepath.Join(user, "larder-e2e"))
	t.must(err)
	t.cluster("load", s.Archive)
	for _, format := range []string{"parquet", "csv"} {
		if prefix := table(format).name; !slices.Contains(t.tables, prefix) {
			t.upload(filepath.Join(s.Data, format), prefix)
			t.tables = append(t.tables, prefix)
		}
	}
	_, err = t.client.CoreV1().ServiceAccounts(t.ns).Create(t.ctx, &core.ServiceAccount{ObjectMeta: meta.ObjectMeta{Name: "spark"}}, meta.CreateOptions{})
	t.must(err)
	_, err = t.client.RbacV1().RoleBindings(t.ns).Create(t.ctx, &rbac.RoleBinding{ObjectMeta: meta.ObjectMeta{Name: "spark"},
		RoleRef:  rbac.RoleRef{APIGroup: rbac.GroupName, Kind: "ClusterRole", Name: "edit"},
		Subjects: []rbac.Subject{{Kind: "ServiceAccount", Name: "spark", Namespace: t.ns}}}, meta.CreateOptions{})
	t.must(err)
	return s
}

// upload puts the files below a folder into the store.
func (t *test) upload(folder, prefix string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(folder, "*", "*"))
	t.must(err)
	more, err := filepath.Glob(filepath.Join(folder, "*.*"))
	t.must(err)
	files = append(files, more...)
	if len(files) != 16 {
		t.Fatalf("%s holds %d files, not 16", folder, len(files))
	}
	for _, f := range files {
		in, err := os.Open(f)
		t.must(err)
		cmd := exec.CommandContext(t.ctx, "kubectl", "--kubeconfig", flags.kubeconfig, "-n", storeNamespace, "exec", "-i", t.s3.pod, "--",
			"env", "AWS_ACCESS_KEY_ID="+accessKey, "AWS_SECRET_ACCESS_KEY="+secretKey, "probe", "upload", "http://127.0.0.1:"+strconv.Itoa(storePort), bucket, prefix+"/"+filepath.Base(f))
		cmd.Stdin = in
		out, err := cmd.CombinedOutput()
		in.Close()
		if err != nil {
			t.Fatalf("upload %s: %v: %s", f, err, out)
		}
	}
}

// submission is one application.
type submission struct {
	spark.Spark
	format string
	passes int
	conf   []string
}

// submit starts an application in cluster mode, and returns what waits for its end and gives the driver's log.
func (t *test) submit(s submission) (driver string, end func() string) {
	t.Helper()
	token, err := t.client.CoreV1().ServiceAccounts(t.ns).CreateToken(t.ctx, "spark", &authentication.TokenRequest{}, meta.CreateOptions{})
	t.must(err)
	ca := filepath.Join(t.TempDir(), "ca.crt")
	t.must(os.WriteFile(ca, t.config.CAData, 0o600))
	driver = "driver-" + strconv.FormatInt(time.Now().UnixMilli(), 36)
	args := []string{"--master", "k8s://" + t.config.Host, "--deploy-mode", "cluster", "--name", "sum", "--class", spark.Class}
	for _, c := range append([]string{
		"kubernetes.namespace=" + t.ns, "kubernetes.driver.pod.name=" + driver,
		"kubernetes.authenticate.submission.oauthToken=" + token.Status.Token, "kubernetes.authenticate.submission.caCertFile=" + ca,
		"kubernetes.authenticate.driver.serviceAccountName=spark", "kubernetes.container.image=" + spark.Image,
		"kubernetes.container.image.pullPolicy=IfNotPresent", "kubernetes.driverEnv.JAVA_HOME=/opt/jdk", "kubernetes.driverEnv.SPARK_HOME=/opt/spark",
		"executor.instances=2", "executor.cores=1", "executor.memory=1g", "driver.memory=1g",
		"kubernetes.driver.request.cores=0.1", "kubernetes.executor.request.cores=0.1", "kubernetes.submission.waitAppCompletion=false",
		"ui.enabled=false",
	}, s.conf...) {
		args = append(args, "--conf", "spark."+c)
	}
	args = append(args, spark.Jar, s.format, "file:///larder/data", strconv.Itoa(s.passes))
	ctx, cancel := context.WithTimeout(t.ctx, 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(s.Home, "bin", "spark-submit"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG=/dev/null", // its key is of a kind that Spark's client does not know
		"JAVA_HOME="+s.Java, "SPARK_HOME="+s.Home, "SPARK_LOCAL_IP="+hostAddress, "SPARK_LOCAL_HOSTNAME="+hostAddress)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("spark-submit: %v: %s", err, strings.ReplaceAll(string(out), token.Status.Token, "TOKEN"))
	}
	return driver, func() string {
		t.Helper()
		t.eventually(6*time.Minute, func() string { return "the driver does not end: " + t.why(driver) }, func() bool {
			p, err := t.client.CoreV1().Pods(t.ns).Get(t.ctx, driver, meta.GetOptions{})
			if err == nil && p.Status.Phase == core.PodFailed {
				log, _ := t.logs(t.ns, driver, p.Spec.Containers[0].Name)
				t.Fatalf("the driver failed: %s", log[max(0, len(log)-3000):])
			}
			return err == nil && p.Status.Phase == core.PodSucceeded
		})
		return t.driverLog(driver)
	}
}

// hostAddress is this machine's in the cluster's network (program cluster has it).
const hostAddress = "10.231.0.254"

func (t *test) driverLog(driver string) string {
	p, err := t.client.CoreV1().Pods(t.ns).Get(t.ctx, driver, meta.GetOptions{})
	if err != nil {
		return ""
	}
	log, err := t.logs(t.ns, driver, p.Spec.Containers[0].Name)
	if err != nil {
		return "" // it is not there yet
	}
	return log
}

var (
	sumLine  = regexp.MustCompile(`(?m)^SUM (\d+) (.*)$`)
	taskLine = regexp.MustCompile(`(?m)^TASKS (\S+) (\d+)$`)
)

// checkSums looks at a driver's log: right sums in each pass, no failed task, and two executors that worked.
func (t *test) checkSums(log string, passes int) {
	t.Helper()
	got := map[string][]string{}
	for _, m := range sumLine.FindAllStringSubmatch(log, -1) {
		got[m[1]] = append(got[m[1]], m[2])
	}
	for pass := range passes {
		if rows := got[strconv.Itoa(pass)]; !slices.Equal(rows, sums) {
			t.Errorf("pass %d gives %q, not %q", pass, rows, sums)
		}
	}
	if !strings.Contains(log, "\nFAILED 0\n") {
		t.Errorf("tasks failed: %s", log[max(0, len(log)-2000):])
	}
	executors := taskLine.FindAllStringSubmatch(log, -1)
	if len(executors) != 2 {
		t.Errorf("tasks ran on %q, not on two executors", executors)
	}
}

// askers are the addresses that asked the store for objects of a prefix since its log had n lines.
func (t *test) askers(lines []string) []string {
	var all []string
	for _, l := range lines {
		f := strings.Fields(l)
		if len(f) > 4 && !slices.Contains(all, f[4]) {
			all = append(all, f[4])
		}
	}
	slices.Sort(all)
	return all
}

func (t *test) workerAddresses() []string {
	var all []string
	for _, p := range t.systemPods("worker", "") {
		all = append(all, p.Status.PodIP)
	}
	slices.Sort(all)
	return all
}

// table is lineitem in a format: as a dataset, whose bytes are not the probe's.
func table(format string) data { return data{name: "tpch/" + format} }

func sparkInline(t *test) {
	s := t.sparkReady()
	t.secret()
	d := table("parquet")
	template := t.example("spark-inline.yaml", d)
	b, err := os.ReadFile(template)
	t.must(err)
	replace := strings.NewReplacer("my-s3", secretName, "ScheduleAnyway", "DoNotSchedule") // one executor on each node, for sure
	t.must(os.WriteFile(template, []byte(replace.Replace(string(b))), 0o600))
	_, end := t.submit(submission{s, "parquet", 2, []string{
		"kubernetes.driver.podTemplateFile=" + template, "kubernetes.executor.podTemplateFile=" + template}})
	t.checkSums(end(), 2)
	if got, want := t.askers(t.requests(d, "s3_GetObject ")), t.workerAddresses(); !slices.Equal(got, want) {
		t.Errorf("the store was asked by %v; the workers are %v", got, want)
	}
}

// onDemand are the settings of deploy/examples/spark-ondemand.conf, with our class.
func (t *test) onDemand(class string) []string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("deploy", "examples", "spark-ondemand.conf"))
	t.must(err)
	restricted, err := filepath.Abs(filepath.Join("deploy", "examples", "spark-restricted.yaml"))
	t.must(err)
	var conf []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) != 2 || !strings.HasPrefix(f[0], "spark.") {
			continue
		}
		value := strings.NewReplacer("lineitem", class, "spark-restricted.yaml", restricted).Replace(f[1])
		conf = append(conf, strings.TrimPrefix(f[0], "spark.")+"="+value)
	}
	if len(conf) < 5 {
		t.Fatalf("spark-ondemand.conf has the settings %q", conf)
	}
	return conf
}

func sparkOnDemand(t *test) {
	s := t.sparkReady()
	d := table("csv")
	class := t.classFor(d, "complete", "always", "freshness", "1h")
	conf := append(t.onDemand(class), // an executor on each node
		"kubernetes.executor.podTemplateFile="+t.spread())

	// Both workers get the whole table.
	t.claim("warm", class)
	for _, node := range t.nodes {
		t.run("warm-"+node, on(node, podSpec(claimed("warm"))))
		t.mustExec("warm-"+node, "sh", "-c", "cat "+mountPath(0)+"/data/* > /dev/null")
	}
	t.settle(d)
	before := len(t.requests(d, "s3_GetObject "))
	_, end := t.submit(submission{s, "csv", 1, conf})
	t.checkSums(end(), 1)
	if after := t.requests(d, "s3_GetObject "); len(after) != before {
		t.Errorf("with the table in both caches, the store was asked for %d ranges", len(after)-before)
	}

	driver, end := t.submit(submission{s, "csv", 4, conf})
	t.eventually(3*time.Minute, func() string { return "the second pass does not begin: " + t.why(driver) }, func() bool {
		return strings.Contains(t.driverLog(driver), "PASS 1 begins")
	})
	for _, p := range t.systemPods("worker", "") {
		t.machine(p.Spec.NodeName, "ctr", "-n", "k8s.io", "tasks", "kill", "-s", "SIGKILL",
			strings.TrimPrefix(p.Status.ContainerStatuses[0].ContainerID, "containerd://"))
	}
	if strings.Contains(t.driverLog(driver), "FAILED") {
		fmt.Println("       the application had ended before its workers were killed")
	}
	t.checkSums(end(), 4)
}

// spread is the restricted pod template with the spreading of the inline one.
func (t *test) spread() string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("deploy", "examples", "spark-restricted.yaml"))
	t.must(err)
	text := strings.Replace(string(b), "spec:\n", `spec:
  topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: DoNotSchedule
    labelSelector:
      matchLabels: {spark-role: executor}
`, 1)
	file := filepath.Join(t.TempDir(), "executor.yaml")
	t.must(os.WriteFile(file, []byte(text), 0o600))
	return file
}
