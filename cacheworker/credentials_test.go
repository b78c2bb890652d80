package cacheworker

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
)

var someKey = brokerwire.Credentials{AccessKeyID: "AKIA1", SecretAccessKey: "s3cr3t/+=", SessionToken: "t0k"}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestCredentialsAreFoundWhereMountsSay(t *testing.T) {
	root := t.TempDir()
	write(t, root+"/env", "# a comment\nAWS_ACCESS_KEY_ID=AKIA1\nexport AWS_SECRET_ACCESS_KEY='s3cr3t/+='\nAWS_SESSION_TOKEN=\"t0k\"\nOTHER=x\n")
	write(t, root+"/ini", "[other]\naws_access_key_id = no\naws_secret_access_key = no\n[default]\naws_access_key_id = AKIA1\naws_secret_access_key=s3cr3t/+=\naws_session_token = t0k\n")
	for key, value := range map[string]string{"AWS_ACCESS_KEY_ID": "AKIA1\n", "AWS_SECRET_ACCESS_KEY": "s3cr3t/+=", "AWS_SESSION_TOKEN": "t0k"} {
		write(t, root+"/secret/..data/"+key, value) // as the kubelet mounts a Secret
		if err := os.Symlink("..data/"+key, root+"/secret/"+key); err != nil {
			t.Fatal(err)
		}
	}
	secrets, err := brokerwire.NewSecrets(map[string]brokerwire.Credentials{"secret:ns/name": someKey})
	if err != nil {
		t.Fatal(err)
	}
	env := map[string]string{"SALES_AWS_ACCESS_KEY_ID": "AKIA1", "SALES_AWS_SECRET_ACCESS_KEY": "s3cr3t/+=", "SALES_AWS_SESSION_TOKEN": "t0k"}
	r := &resolver{root: root, getenv: func(k string) string { return env[k] }}
	for _, where := range []string{"file:" + root + "/env", "file:" + root + "/ini", "file:" + root + "/secret", "env:SALES_", "secret:ns/name"} {
		if c, err := r.Credential(where, brokerwire.Volume{Secrets: secrets}); c != someKey || err != nil {
			t.Errorf("%s: found %v, %v", where, c == someKey, err)
		}
	}
}

func TestCredentialsThatAreNotThere(t *testing.T) {
	root, outside := t.TempDir(), t.TempDir()
	write(t, outside+"/key", "AWS_ACCESS_KEY_ID=canary\nAWS_SECRET_ACCESS_KEY=canary\n")
	if err := os.Symlink(outside+"/key", root+"/link"); err != nil {
		t.Fatal(err)
	}
	write(t, root+"/half", "AWS_ACCESS_KEY_ID=canary\n")
	write(t, root+"/bad", "AWS_ACCESS_KEY_ID=canary\nAWS_SECRET_ACCESS_KEY=canary canary\n")
	r := &resolver{root: root, getenv: func(string) string { return "" }}
	for where, want := range map[string]string{
		"file:" + outside + "/key":    "--credential-root",
		"file:" + root:                "--credential-root",
		"file:" + root + "/link":      "escapes",
		"file:" + root + "/nope":      "no such file",
		"file:" + root + "/half":      "not both there",
		"file:" + root + "/bad":       "no key has",
		"env:SALES_":                  "SALES_AWS_ACCESS_KEY_ID",
		"secret:larder-system/absent": "larder-node",
	} {
		c, err := r.Credential(where, brokerwire.Volume{})
		if !errors.Is(err, object.ErrDenied) || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "canary") || !c.IsZero() {
			t.Errorf("%s: %v; want %q", where, err, want)
		}
	}
	if _, err := (&resolver{}).Credential("file:"+outside+"/key", brokerwire.Volume{}); !errors.Is(err, object.ErrDenied) {
		t.Errorf("without a root: %v", err)
	}
}

func TestARotatedFileIsNoticed(t *testing.T) {
	root := t.TempDir()
	where := "file:" + root + "/key"
	r := &resolver{root: root}
	write(t, root+"/key", "AWS_ACCESS_KEY_ID=one\nAWS_SECRET_ACCESS_KEY=x\n")
	if _, err := r.Credential(where, brokerwire.Volume{}); err != nil || r.rotated() {
		t.Errorf("%v, or it changed by itself", err)
	}
	write(t, root+"/key", "AWS_ACCESS_KEY_ID=two\nAWS_SECRET_ACCESS_KEY=x\n")
	if !r.rotated() || r.rotated() {
		t.Error("a change was not noticed once")
	}
	if c, err := r.Credential(where, brokerwire.Volume{}); c.AccessKeyID != "two" || err != nil {
		t.Errorf("%v", err)
	}
}

// What is read from a file is what a Secret could have, or nothing.
func FuzzCredentialFile(f *testing.F) {
	f.Add("AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=b\n")
	f.Add("[default]\naws_access_key_id = a\r\naws_secret_access_key = \"b\x00\"\n[x]\n")
	f.Add("export AWS_ACCESS_KEY_ID='a'=\n=\n[\n")
	f.Fuzz(func(t *testing.T, text string) {
		values := lines(text)
		c, err := credentialsOf(func(k string) string { return values[k] }, "")
		if (err == nil) == c.IsZero() {
			t.Errorf("%v, %v", c.IsZero(), err)
		}
		for _, s := range []string{c.AccessKeyID, c.SecretAccessKey, c.SessionToken} {
			if strings.ContainsAny(s, " \n\r\t\x00") {
				t.Error("a blank or a control character in a key")
			}
		}
	})
}
