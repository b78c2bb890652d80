// Package csisanity runs the CSI community's conformance suite, csi-sanity, against a
// driver's socket, with real mounts.
//
// A spec that the suite skips is one that nobody tests: those that may be skipped stand in
// [Skipped] with their reason, and a run that skips another set fails.
package csisanity

import (
	"encoding/json"
	"flag"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"

	"github.com/larderfs/larder/sanity/leak"
)

// Leg is one driver, or one source of volumes, to run the suite against.
type Leg struct {
	Name       string // one word
	Socket     string // of the driver; shorter than sun_path
	Parameters map[string]string
	Secrets    map[string]string // given with every call that takes some
}

// Run runs the suite for each leg and fails the test if a spec fails, or if others than
// [Skipped] are skipped. Ginkgo runs once in a process, so it can be called once.
func Run(t *testing.T, legs ...Leg) {
	t.Helper()
	dir := t.TempDir()
	for _, leg := range legs {
		config := leg.config(t, filepath.Join(dir, leg.Name))
		var suite *sanity.TestContext
		ginkgo.Describe(leg.Name, func() { suite = sanity.GinkgoTest(&config) })
		defer func() { suite.Finalize() }()
	}
	var report types.Report
	ginkgo.ReportAfterSuite("keep the report", func(r types.Report) { report = r })
	gomega.RegisterFailHandler(ginkgo.Fail)
	suiteConfig, reporter := ginkgo.GinkgoConfiguration()
	reporter.Succinct, reporter.NoColor = true, true
	defer hideCount()()
	ginkgo.RunSpecs(t, "csi-sanity", suiteConfig, reporter)

	for _, leg := range legs {
		passed := leg.compare(t, report.SpecReports)
		t.Logf("%s: %d passed, %d skipped", leg.Name, passed, len(Skipped))
	}
	for _, m := range leak.Mounts(dir) {
		t.Errorf("left mounted: %s (%s)", m.Point, m.Type)
	}
}

// hideCount hides go test's -count from Ginkgo, which refuses to run with one.
func hideCount() (restore func()) {
	f := flag.Lookup("test.count")
	count := f.Value.String()
	f.Value.Set("1")
	return func() { f.Value.Set(count) }
}

func (l Leg) config(t *testing.T, dir string) sanity.TestConfig {
	t.Helper()
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	c := sanity.NewTestConfig()
	c.Address = "unix:" + l.Socket
	c.TestVolumeParameters = l.Parameters
	c.TargetPath, c.StagingPath = filepath.Join(dir, "target"), filepath.Join(dir, "staging")
	c.TestNodeVolumeAttachLimit = false // the node has none
	if len(l.Secrets) == 0 {
		return c
	}
	text, err := json.Marshal(sanity.CSISecrets{
		CreateVolumeSecret:                         l.Secrets,
		DeleteVolumeSecret:                         l.Secrets,
		ControllerValidateVolumeCapabilitiesSecret: l.Secrets,
		NodeStageVolumeSecret:                      l.Secrets,
		NodePublishVolumeSecret:                    l.Secrets,
	})
	if err != nil {
		t.Fatal(err)
	}
	c.SecretsFile = filepath.Join(dir, "secrets.yaml") // JSON is YAML
	if err := os.WriteFile(c.SecretsFile, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return c
}

// compare counts what passed, and complains about what was skipped and should not be, and
// the reverse.
func (l Leg) compare(t *testing.T, specs types.SpecReports) (passed int) {
	t.Helper()
	skipped := map[string]bool{}
	for _, s := range specs {
		name, ours := strings.CutPrefix(s.FullText(), l.Name+" ")
		if !ours || s.LeafNodeType != types.NodeTypeIt {
			continue
		}
		switch s.State {
		case types.SpecStatePassed:
			passed++
		case types.SpecStateSkipped, types.SpecStatePending:
			skipped[name] = true
			if _, known := Skipped[name]; !known {
				t.Errorf("%s: skipped without a reason in Skipped: %s (%s)", l.Name, name, s.Failure.Message)
			}
		default:
			t.Errorf("%s: %s: %s", l.Name, s.State, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(Skipped)) {
		if !skipped[name] {
			t.Errorf("%s: not skipped, so strike it from Skipped: %s", l.Name, name)
		}
	}
	if passed == 0 {
		t.Errorf("%s: nothing ran", l.Name)
	}
	return passed
}
