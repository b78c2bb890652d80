package cacheworker

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/master/record"
)

// resolver finds the credentials that mounts name. It reads them each time and keeps, for the sake of
// noticing a change, what it found last.
type resolver struct {
	root   string              // below it are the files; "" allows none
	getenv func(string) string // nil allows none

	mu    sync.Mutex                        // guards found
	found map[string]brokerwire.Credentials // by where they are; of files only
}

// Names of the parts of a credential, as in a Secret, an environment or a file.
const (
	keyID     = "AWS_ACCESS_KEY_ID"
	keySecret = "AWS_SECRET_ACCESS_KEY"
	keyToken  = "AWS_SESSION_TOKEN"
)

var credentialKeys = []string{keyID, keySecret, keyToken}

// Credential implements dataset.Sources. Its errors have nothing in them of what was read.
func (r *resolver) Credential(where string, v brokerwire.Volume) (brokerwire.Credentials, error) {
	at, err := record.ParseCredential(where)
	if err != nil {
		return brokerwire.Credentials{}, fmt.Errorf("%v: %w", err, object.ErrInvalid)
	}
	var c brokerwire.Credentials
	switch at.Kind {
	case record.FromSecret:
		var ok bool
		if c, ok = v.Secrets.Get(where); !ok {
			err = errors.New("the node plugin has not brought it: is there such a Secret, with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and may larder-node list Secrets in that namespace")
		}
	case record.FromFile:
		c, err = r.fromFile(at.Name)
		r.note(where, c)
	case record.FromEnv:
		c, err = r.fromEnv(at.Name)
	}
	if err != nil {
		return brokerwire.Credentials{}, fmt.Errorf("credential %s: %w: %w", where, err, object.ErrDenied)
	}
	return c, nil
}

func (r *resolver) note(where string, c brokerwire.Credentials) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.found == nil {
		r.found = map[string]brokerwire.Credentials{}
	}
	r.found[where] = c
}

// rotated reports whether a file says something else than the last time.
func (r *resolver) rotated() (changed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for where, had := range r.found {
		now, _ := r.fromFile(strings.TrimPrefix(where, string(record.FromFile)+":")) // none, if it cannot be read
		if now != had {
			r.found[where], changed = now, true
		}
	}
	return changed
}

func (r *resolver) fromEnv(prefix string) (brokerwire.Credentials, error) {
	if r.getenv == nil {
		return brokerwire.Credentials{}, errors.New("this worker gives none from its environment")
	}
	return credentialsOf(func(key string) string { return r.getenv(prefix + key) }, prefix)
}

// fromFile reads a folder with a file per part, as a Secret is mounted, or a file with a part per line:
// KEY=value, or as in an AWS credentials file.
func (r *resolver) fromFile(path string) (brokerwire.Credentials, error) {
	none := brokerwire.Credentials{}
	rel, ok := below(r.root, path)
	if r.root == "" || !ok || rel == "" {
		return none, fmt.Errorf("it is not below the worker's --credential-root %q; an administrator sets that, or has the mount name a Secret or variables instead", r.root)
	}
	root, err := os.OpenRoot(r.root) // or a link would lead to what else the worker may read
	if err != nil {
		return none, err
	}
	defer root.Close()
	st, err := root.Stat(rel)
	if err != nil {
		return none, err
	}
	if !st.IsDir() {
		text, err := readSmall(root, rel)
		if err != nil {
			return none, err
		}
		values := lines(text)
		return credentialsOf(func(key string) string { return values[key] }, "")
	}
	values := map[string]string{}
	for _, key := range credentialKeys {
		text, err := readSmall(root, filepath.Join(rel, key))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return none, err
		}
		values[key] = strings.TrimSpace(text)
	}
	return credentialsOf(func(key string) string { return values[key] }, "")
}

const maxCredentialFile = 64 << 10

func readSmall(root *os.Root, name string) (string, error) {
	f, err := root.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxCredentialFile))
	return string(b), err
}

// lines reads the parts of a credential from a file. Of the sections of an AWS credentials file only
// [default] counts.
func lines(text string) map[string]string {
	values, section := map[string]string{}, "default"
	for s := bufio.NewScanner(strings.NewReader(text)); s.Scan(); {
		line := strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(s.Text()), "export "))
		if name, ok := strings.CutPrefix(line, "["); ok {
			section = strings.TrimSpace(strings.TrimSuffix(name, "]"))
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		key = strings.ToUpper(strings.TrimSpace(key))
		if ok && section == "default" && slices.Contains(credentialKeys, key) {
			values[key] = strings.Trim(strings.TrimSpace(value), `"'`)
		}
	}
	return values
}

// credentialsOf wants an id with its key.
func credentialsOf(value func(key string) string, prefix string) (brokerwire.Credentials, error) {
	c := brokerwire.Credentials{AccessKeyID: value(keyID), SecretAccessKey: value(keySecret), SessionToken: value(keyToken)}
	if c.AccessKeyID == "" || c.SecretAccessKey == "" {
		return brokerwire.Credentials{}, fmt.Errorf("%s%s and %s%s are not both there", prefix, keyID, prefix, keySecret)
	}
	for _, s := range []string{c.AccessKeyID, c.SecretAccessKey, c.SessionToken} {
		if strings.ContainsFunc(s, func(c rune) bool { return c <= ' ' || c >= 0x7f }) {
			return brokerwire.Credentials{}, errors.New("it has a space, a line break or another character in it that no key has")
		}
	}
	return c, nil
}
