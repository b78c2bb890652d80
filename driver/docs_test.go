package driver

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// What deploy/README.md says of parameters is what a request without them is parsed to.
func TestDeployReadmeHasEveryParameterWithItsDefault(t *testing.T) {
	text, err := os.ReadFile("../deploy/README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, found := strings.Cut(string(text), "| parameter | default | meaning |\n|---|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	if !found {
		t.Fatal("no table of parameters")
	}
	row := regexp.MustCompile("^\\| `([A-Za-z]+)` \\| (?:`([^`]*)`)?([^|]*) \\|")
	defaults := map[string]string{}
	var names []string
	for line := range strings.Lines(table) {
		m := row.FindStringSubmatch(line)
		if m == nil {
			t.Errorf("not a row of the table: %s", line)
			continue
		}
		names = append(names, m[1])
		defaults[m[1]] = m[2]
	}
	want := slices.Clone(parameterNames)
	slices.Sort(want)
	slices.Sort(names)
	if !slices.Equal(names, want) {
		t.Errorf("the table has %v, the driver %v", names, want)
	}

	r, err := newRules("", nil)
	if err != nil {
		t.Fatal(err)
	}
	q, err := r.parse("v", map[string]string{keySource: "s3://bucket"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range q.context() {
		said := defaults[name]
		if d, err := time.ParseDuration(said); err == nil && name == keyFreshness {
			said = d.String()
		}
		if name != keySource && said != value {
			t.Errorf("%s: the table says %q, the driver takes %q", name, said, value)
		}
	}
	for _, required := range []string{keySource, keyEndpoint} {
		if defaults[required] != "" {
			t.Errorf("%s: the table has a default", required)
		}
	}
}
