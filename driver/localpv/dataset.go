package localpv

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/driver"
)

// Keys of a dataset beside the parameters of a StorageClass.
const (
	keySecret = "secret" // name of a Secret in the ConfigMap's namespace
	keySlots  = "slots"  // how many PersistentVolumes a node offers
)

const (
	defaultSlots = 8
	maxSlots     = 64
)

// dataset is one entry of the ConfigMap.
type dataset struct {
	name       string
	slots      int
	secret     string
	parameters map[string]string // in their normal form
}

var namePattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`)

const maxName = 50

// parse reads the entries of the ConfigMap. One with a mistake is in bad, not in good.
func parse(m *corev1.ConfigMap, p driver.Parameters) (good map[string]dataset, bad map[string]error) {
	good, bad = map[string]dataset{}, map[string]error{}
	if m == nil {
		return good, bad
	}
	for name, text := range m.Data {
		d, err := parseDataset(name, text, p)
		if err != nil {
			bad[name] = err
			continue
		}
		good[name] = d
	}
	for name := range m.BinaryData {
		bad[name] = fmt.Errorf("it is binary; want YAML in data: %w", object.ErrInvalid)
	}
	return good, bad
}

func parseDataset(name, text string, p driver.Parameters) (dataset, error) {
	d := dataset{name: name, slots: defaultSlots}
	if !namePattern.MatchString(name) || len(name) > maxName {
		return d, fmt.Errorf("its name is not one: use up to %d lower-case letters, digits and '-', with a letter or digit at both ends: %w", maxName, object.ErrInvalid)
	}
	fields, err := scalars(text)
	if err != nil {
		return d, err
	}
	var errs []error
	if s, ok := fields[keySlots]; ok {
		if d.slots, err = strconv.Atoi(s); err != nil || d.slots < 1 || d.slots > maxSlots {
			errs = append(errs, fmt.Errorf("%s: %q is not a number from 1 to %d", keySlots, s, maxSlots))
		}
	}
	if s, ok := fields[keySecret]; ok {
		if d.secret = s; !objectPattern.MatchString(s) || len(s) > 253 {
			errs = append(errs, fmt.Errorf("%s: want the name of a Secret in the ConfigMap's namespace", keySecret))
		}
	}
	delete(fields, keySlots)
	delete(fields, keySecret)
	_, d.parameters, err = p.LocalVolume("x", fields, nil)
	return d, errors.Join(append(errs, err)...)
}

var objectPattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$`)

// scalars reads YAML of one level. Errors do not repeat values: somebody may have put a
// credential there.
func scalars(text string) (map[string]string, error) {
	var raw map[string]any
	if err := yaml.UnmarshalStrict([]byte(text), &raw); err != nil {
		return nil, fmt.Errorf("it is no YAML of lines like \"source: s3://bucket/prefix\": %w", object.ErrInvalid)
	}
	out := map[string]string{}
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(raw)) {
		switch v := raw[key].(type) {
		case string:
			out[key] = v
		case bool:
			out[key] = strconv.FormatBool(v)
		case float64:
			out[key] = strconv.FormatFloat(v, 'f', -1, 64)
			if strings.HasSuffix(key, "Mode") { // YAML has made another number of 0444 already
				errs = append(errs, fmt.Errorf("%.64q: write it in quotes, as \"0444\": %w", key, object.ErrInvalid))
			}
		default:
			errs = append(errs, fmt.Errorf("%.64q: want text, a number, true or false: %w", key, object.ErrInvalid))
		}
	}
	return out, errors.Join(errs...)
}
