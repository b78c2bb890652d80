package localpv

import (
	"os"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/larderfs/larder/driver"
)

func parameters(t *testing.T) driver.Parameters {
	t.Helper()
	p, err := driver.NewParameters("/srv")
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestDatasetsAreParsedOneByOne(t *testing.T) {
	good, bad := parse(&corev1.ConfigMap{Data: map[string]string{
		"plain": "source: s3://bkt/a/",
		"all":   "source: s3://bkt/a\nendpoint: http://minio:9000\nregion: r-1\npathStyle: false\nfreshness: 5m\ncomplete: never\nuid: 185\ngid: 7\nfileMode: \"0440\"\ndirMode: \"0550\"\nslots: 3\nsecret: s3.reader",
		"file":  "source: file:///srv/a",
		"Upper": "source: s3://bkt", "-dash": "source: s3://bkt", "": "source: s3://bkt",
		"none": "slots: 0", "many": "source: s3://bkt\nslots: 65", "half": "source: s3://bkt\nslots: 1.5", "space": "source: s3://bkt\nsecret: other/s3",
		"list": "source: [s3://bkt]", "twice": "source: s3://bkt\nsource: s3://bkt", "away": "source: file:///etc", "mode": "source: s3://bkt\ndirMode: 0555",
		"binding": "source: s3://bkt\nbinding: node", "inline": "source: s3://bkt\ncsi.storage.k8s.io/ephemeral: true", "empty": "",
		"word": "source: s3://bkt\nsecrte: s3",
	}, BinaryData: map[string][]byte{"binary": {0}}}, parameters(t))
	for name, want := range map[string]dataset{
		"plain": {name: "plain", slots: 8},
		"all":   {name: "all", slots: 3, secret: "s3.reader"},
		"file":  {name: "file", slots: 8},
	} {
		d, ok := good[name]
		if !ok || d.slots != want.slots || d.secret != want.secret || d.parameters["source"] == "" {
			t.Errorf("%s: %+v, %v", name, d, bad[name])
		}
	}
	if p := good["all"].parameters; p["uid"] != "185" || p["fileMode"] != "0440" || p["pathStyle"] != "false" || p["freshness"] != "5m0s" || p["layout"] != "" || p["binding"] != "" {
		t.Errorf("%v", p)
	}
	for name, text := range map[string]string{
		"Upper": "its name", "-dash": "its name", "": "its name", "none": `slots: "0"`, "many": "slots", "half": "slots", "space": "secret: ",
		"list": `"source": want text`, "twice": "YAML", "away": "--file-root", "mode": "in quotes", "binding": "binding: cannot be given",
		"inline": "ephemeral: cannot be given", "empty": "source: missing", "binary": "YAML", "word": "unknown parameter",
	} {
		if err := bad[name]; err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v; want %q", name, err, text)
		}
	}
	if len(good)+len(bad) != 19 {
		t.Errorf("%d good, %d bad", len(good), len(bad))
	}
	if good, bad := parse(nil, parameters(t)); len(good)+len(bad) != 0 {
		t.Error("no ConfigMap has datasets")
	}
}

func TestASlotIsWhatItsVolumeSays(t *testing.T) {
	d := dataset{name: "d", slots: 2, secret: "s3", parameters: map[string]string{"source": "s3://bkt", "uid": "7"}}
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: strings.Repeat("long-name.", 10) + "example", UID: "u"}}
	s := newSlot(d, 1, node.Name)
	if other := newSlot(d, 1, node.Name); other.name == s.name {
		t.Errorf("two offers are called %s", s.name)
	}
	pv, err := s.volume("/dir", node)
	if err != nil {
		t.Fatal(err)
	}
	if pv.Spec.Local.Path != "/dir/"+s.name+"/volume" || len(pv.Labels[LabelNode]) > 63 || pv.OwnerReferences[0].UID != "u" ||
		pv.Spec.NodeAffinity.Required.NodeSelectorTerms[0].MatchExpressions[0].Values[0] != node.Name {
		t.Errorf("%+v", pv)
	}
	got, err := slotOf(pv)
	if err != nil || got.dataset != "d" || got.number != 1 || got.secret != "s3" || got.parameters["uid"] != "7" {
		t.Errorf("%+v, %v", got, err)
	}
	for _, spoil := range []func(*corev1.PersistentVolume){
		func(pv *corev1.PersistentVolume) { pv.Name = "theirs" },
		func(pv *corev1.PersistentVolume) { delete(pv.Labels, LabelSlot) },
		func(pv *corev1.PersistentVolume) { delete(pv.Labels, LabelDataset) },
		func(pv *corev1.PersistentVolume) { pv.Annotations[annotationParameters] = "{" },
	} {
		bad := pv.DeepCopy()
		spoil(bad)
		if _, err := slotOf(bad); err == nil {
			t.Errorf("taken for ours: %+v", bad.ObjectMeta)
		}
	}
}

// A path of an unmounted slot leads nowhere: the kubelet would show a pod an empty directory.
func TestAnUnmountedSlotCannotBeBound(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(mountPoint(dir, "s"), 0o750); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(link, shown(dir, "s")); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(shown(dir, "s")); !os.IsNotExist(err) {
		t.Errorf("unmounted: %v", err)
	}
	if err := os.Mkdir(mountPoint(dir, "s")+"/domain", 0o755); err != nil { // as in a mounted one
		t.Fatal(err)
	}
	want, err := os.Stat(mountPoint(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.Stat(shown(dir, "s")); err != nil || !os.SameFile(got, want) {
		t.Errorf("mounted: %v", err)
	}
}

func TestConfigIsChecked(t *testing.T) {
	good := Config{Node: "n", Datasets: "ns/name", Dir: "/d", KubeletDir: "/k"}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for _, spoil := range []func(*Config){
		func(c *Config) { c.Node = "" }, func(c *Config) { c.Datasets = "name" }, func(c *Config) { c.Datasets = "a/b/c" },
		func(c *Config) { c.Datasets = "/b" }, func(c *Config) { c.Dir = "d" }, func(c *Config) { c.KubeletDir = "" },
	} {
		c := good
		spoil(&c)
		if c.Validate() == nil {
			t.Errorf("%+v", c)
		}
	}
}
