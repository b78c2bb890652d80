package record_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/larderfs/larder/master/record"
)

func TestAVolumesIDComesFromItsNameAlone(t *testing.T) {
	if got := record.VolumeID("pvc-1"); got != "lv-f2868e1aa7cab669517cd9f5ab1b7957" { // it is in PVs: it can never change
		t.Errorf("id %s", got)
	}
	if !record.ValidID(record.VolumeID("any name / at all")) {
		t.Error("our own id is not valid")
	}
}

func TestWhatLooksLikeACredentialIsRefused(t *testing.T) {
	for _, c := range []struct {
		key, value string
		ok         bool
	}{
		{"source", "s3://bucket/prefix", true},
		{"source", "s3://bucket/user@host/x", true}, // an @ in a path is none
		{"endpoint", "https://minio:9000", true},
		{"gid", "1000", true},
		{"AWS_REGION", "x", false}, // all of the Secret's keys, harmless or not
		{"awsSecretAccessKey", "x", false},
		{"accessKeyID", "x", false},
		{"SESSION-TOKEN", "x", false},
		{"db_password", "x", false},
		{"endpoint", "https://user:pw@minio:9000", false},
		{"endpoint", "https://user@minio", false},
	} {
		err := record.VolumeSpec{Name: "v", Parameters: map[string]string{c.key: c.value}}.Validate()
		if c.ok != (err == nil) || err != nil && !errors.Is(err, record.ErrInvalid) {
			t.Errorf("%s=%s: %v", c.key, c.value, err)
		}
	}
}

func TestValidateNamesAllMistakesOfARegistration(t *testing.T) {
	good := record.Registration{UUID: uuid.NewString(), Node: "n1", CapacityBytes: 1, Addresses: []string{"10.0.0.1:1"},
		Volumes: []record.Published{{Volume: record.Volume{ID: "csi-1"}}}}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	err := record.Registration{UUID: "u", Node: "a/b", Version: "\x00", CapacityBytes: -1, Addresses: []string{"http://u:p@h"},
		Volumes: []record.Published{{Volume: record.Volume{ID: "../x", Name: "a\nb", Node: strings.Repeat("n", 300), CapacityBytes: -2}}}}.Validate()
	for _, want := range []string{"uuid", `node "a/b"`, "version", "capacity of -1", "address: want ip:port", `volume id "../x"`, `name "a\nb"`, `node "nnn`, "capacity of -2"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in %v", want, err)
		}
	}
	big := good
	big.Volumes = []record.Published{{Volume: record.Volume{ID: "v", Parameters: map[string]string{"k": strings.Repeat("x", 20<<10)}}}}
	if err := big.Validate(); !errors.Is(err, record.ErrInvalid) {
		t.Errorf("20 KiB of parameters: %v", err)
	}
}

func FuzzATokenIsOursOrAnError(f *testing.F) {
	f.Add(record.Token("lv-1"))
	f.Add("invalid-token")
	f.Add(record.Token("lv-1") + "\n")
	f.Add("")
	f.Fuzz(func(t *testing.T, token string) {
		id, err := record.ParseToken(token)
		if err != nil {
			if !errors.Is(err, record.ErrBadToken) {
				t.Errorf("%q: %v", token, err)
			}
			return
		}
		if record.Token(id) != token || !record.ValidID(id) {
			t.Errorf("%q is a token behind %q", token, id)
		}
	})
}
