package record

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"
)

const (
	maxName       = 256      // bytes of a volume's or node's name
	maxPath       = 4096     // bytes of a mount's path or URI
	maxParameters = 64       // entries of a map
	maxMapBytes   = 16 << 10 // keys and values of a map together
	maxPublished  = 4096     // volumes of one node
	maxAddresses  = 64
	maxPods       = 1024 // of one volume on one node
)

var idShape = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// VolumeID makes the id of the volume with that name.
func VolumeID(name string) string {
	sum := sha256.Sum256([]byte(name))
	return "lv-" + hex.EncodeToString(sum[:16])
}

// ValidID reports whether id can be a volume's id.
func ValidID(id string) bool { return idShape.MatchString(id) }

// Token is the page token behind the volume with that id, and ParseToken its inverse.
func Token(id string) string {
	return base64.RawURLEncoding.EncodeToString([]byte(tokenPrefix + id))
}

const tokenPrefix = "after:"

// ParseToken returns the id that the page begins behind, or ErrBadToken.
func ParseToken(token string) (id string, err error) {
	text, err := base64.RawURLEncoding.DecodeString(token)
	id, ok := strings.CutPrefix(string(text), tokenPrefix)
	if err != nil || !ok || !ValidID(id) || Token(id) != token { // base64 passes over newlines
		return "", fmt.Errorf("%w %.40q", ErrBadToken, token)
	}
	return id, nil
}

// Validate names all that is wrong, as ErrInvalid.
func (s VolumeSpec) Validate() error {
	errs := []error{checkName("name", s.Name), checkMap("parameter", s.Parameters)}
	if s.CapacityBytes < 0 || s.LimitBytes < 0 || s.LimitBytes != 0 && s.LimitBytes < s.CapacityBytes {
		errs = append(errs, fmt.Errorf("capacity of %d bytes with a limit of %d", s.CapacityBytes, s.LimitBytes))
	}
	for _, n := range s.Nodes {
		errs = append(errs, checkName("node", n))
	}
	return invalid(errs)
}

// Validate names all that is wrong, as ErrInvalid.
func (v Volume) Validate() error {
	errs := []error{checkMap("parameter", v.Parameters)}
	if !ValidID(v.ID) {
		errs = append(errs, fmt.Errorf("volume id %.40q", v.ID))
	}
	if v.Name != "" {
		errs = append(errs, checkName("name", v.Name))
	}
	if v.Node != "" {
		errs = append(errs, checkName("node", v.Node))
	}
	if v.CapacityBytes < 0 {
		errs = append(errs, fmt.Errorf("capacity of %d bytes", v.CapacityBytes))
	}
	return invalid(errs)
}

// Validate names all that is wrong, as ErrInvalid.
func (r Registration) Validate() error {
	errs := []error{CheckWorker(r.UUID, r.Node)}
	if r.CapacityBytes < 0 {
		errs = append(errs, fmt.Errorf("capacity of %d bytes", r.CapacityBytes))
	}
	if len(r.Version) > maxName || !printable(r.Version) {
		errs = append(errs, errors.New("version"))
	}
	if len(r.Volumes) > maxPublished {
		errs = append(errs, fmt.Errorf("%d published volumes; at most %d", len(r.Volumes), maxPublished))
	}
	if len(r.Addresses) > maxAddresses {
		errs = append(errs, fmt.Errorf("%d addresses; at most %d", len(r.Addresses), maxAddresses))
	}
	for _, a := range r.Addresses {
		errs = append(errs, checkAddress(a))
	}
	if len(r.Key) > maxName || !printable(r.Key) {
		errs = append(errs, errors.New("key"))
	}
	for _, p := range r.Volumes {
		if err := p.validate(); err != nil {
			errs = append(errs, fmt.Errorf("volume %.128q: %w", p.Volume.ID, err))
		}
	}
	return invalid(errs)
}

func (p Published) validate() error {
	errs := []error{p.Volume.Validate()}
	if len(p.Pods) > maxPods {
		errs = append(errs, fmt.Errorf("%d pods; at most %d", len(p.Pods), maxPods))
	}
	for _, pod := range p.Pods {
		for name, text := range map[string]string{"namespace": pod.Namespace, "name": pod.Name, "uid": pod.UID} {
			if len(text) > maxName || !printable(text) {
				errs = append(errs, fmt.Errorf("pod's %s %.40q", name, text))
			}
		}
	}
	return errors.Join(errs...)
}

// checkAddress takes only what the master may connect to because a worker, or who says he is
// one, told it to: no names, and no link-local address, where clouds have their metadata.
func checkAddress(a string) error {
	ap, err := netip.ParseAddrPort(a)
	if err != nil {
		return errors.New("address: want ip:port") // not its text: it may hold a password
	}
	ip := ap.Addr().Unmap()
	if ip.IsUnspecified() || ip.IsMulticast() || ip.IsLinkLocalUnicast() || ap.Port() == 0 {
		return fmt.Errorf("address %s: want that of a pod or host, with a port", ap)
	}
	return nil
}

// CheckWorker checks who a worker says it is.
func CheckWorker(id, node string) error {
	errs := []error{checkName("node", node)}
	if err := uuid.Validate(id); err != nil {
		errs = append(errs, fmt.Errorf("uuid: %w", err))
	}
	return invalid(errs)
}

func checkName(what, s string) error {
	if s == "" || len(s) > maxName || !printable(s) || strings.Contains(s, "/") && what == "node" {
		return fmt.Errorf("%s %.40q: want 1 to %d printable bytes", what, s, maxName)
	}
	return nil
}

func checkMap(what string, m map[string]string) error {
	var errs []error
	size := 0
	for k, v := range m {
		size += len(k) + len(v)
		if k == "" || !printable(k) || !printable(v) {
			errs = append(errs, fmt.Errorf("%s %.40q: not printable", what, k))
		}
		if err := checkSecret(k, v); err != nil {
			errs = append(errs, fmt.Errorf("%s %.40q: %w", what, k, err))
		}
	}
	if len(m) > maxParameters || size > maxMapBytes {
		errs = append(errs, fmt.Errorf("%d %ss of %d bytes; at most %d of %d", len(m), what, size, maxParameters, maxMapBytes))
	}
	return errors.Join(errs...)
}

// secretWords are parts of keys, in lower case, that name a credential.
var secretWords = []string{
	"aws_", "secret", "token", "password", "passwd", "passphrase", "credential", "accesskey", "access_key", "access-key", "private",
}

// userinfo is a URL's user and password.
var userinfo = regexp.MustCompile(`://[^/?#]*@`)

// checkSecret refuses what looks like a credential. The error never holds the value.
func checkSecret(key, value string) error {
	low := strings.ToLower(key)
	if key == "credentials" && (value == "secret" || value == "pod" || value == "driver") {
		return nil // whose they are
	}
	for _, w := range secretWords {
		if strings.Contains(low, w) {
			return errors.New("looks like a credential, which belongs in a Secret")
		}
	}
	if userinfo.MatchString(value) {
		return errors.New("a URL with a user or password in it: credentials belong in a Secret")
	}
	return nil
}

func printable(s string) bool {
	return utf8.ValidString(s) && strings.IndexFunc(s, unicode.IsControl) < 0
}

// invalid joins what is not nil under ErrInvalid.
func invalid(errs []error) error {
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%w: %s", ErrInvalid, strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return nil
}
