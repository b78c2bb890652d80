// Package sanity tests the whole of Larder as its users meet it: `larder up` as a process,
// CSI calls, real mounts, real under stores.
package sanity

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/larderfs/larder/sanity/csisanity"
	"github.com/larderfs/larder/sanity/s3test"
)

// The community's conformance suite over a folder and over a bucket, and what it was given
// as a Secret is nowhere to be found afterwards.
func TestCSISanity(t *testing.T) {
	folder, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(folder, "file"), []byte("hello"), 0o644); err != nil {
		t.Fatal(err)
	}
	store := s3test.Start(t)
	if _, err := store.Put("dataset/file", []byte("hello")); err != nil {
		t.Fatal(err)
	}
	larder := up(t, "--file-root", folder)
	csisanity.Run(t,
		csisanity.Leg{Name: "file", Socket: larder.Socket(), Parameters: map[string]string{"source": "file://" + folder}},
		csisanity.Leg{
			Name: "s3", Socket: larder.Socket(),
			Parameters: map[string]string{
				"source": "s3://" + store.Bucket + "/dataset", "endpoint": store.Endpoint, "region": store.Region, "pathStyle": "true",
			},
			Secrets: map[string]string{"AWS_ACCESS_KEY_ID": store.AccessKey, "AWS_SECRET_ACCESS_KEY": store.SecretKey},
		},
	)
	if log, err := os.ReadFile(larder.Log()); err != nil || bytes.Contains(log, []byte(store.SecretKey)) {
		t.Errorf("the log tells the secret key, or is not there: %v", err)
	}
}
