package record

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Mount joins a path of the namespace to an under store. What below it is a mount of its own hides
// what the store has there.
type Mount struct {
	Path       string            `json:"path"` // absolute, clean: see ParsePath
	URI        string            `json:"uri"`  // s3://bucket/prefix or file:///path, without a slash at the end
	ReadOnly   bool              `json:"readOnly,omitempty"`
	Options    map[string]string `json:"options,omitempty"`    // see the names of options
	Credential string            `json:"credential,omitempty"` // where it is, see ParseCredential; "" is that of the volume

	// The Kubernetes namespaces that may use it: those whose pods have inline volumes, and those
	// whose claims are of a StorageClass. [AllNamespaces] is all of them, [NoNamespace] none; an
	// empty list is none for inline volumes and all for claims.
	AllowInline []string `json:"allowInline,omitempty"`
	AllowClass  []string `json:"allowClass,omitempty"`

	Object string `json:"object,omitempty"` // the Kubernetes object that it is made from, which alone may change it; "" for none
}

// In a list of Kubernetes namespaces.
const (
	AllNamespaces = "*"
	NoNamespace   = "-"
)

// Names of options of a mount: as the parameters of a StorageClass that say the same of a volume.
const (
	OptionEndpoint  = "endpoint"
	OptionRegion    = "region"
	OptionPathStyle = "pathStyle"
)

// OptionTTL is how long something of an object may be cached before all of it is freed.
const OptionTTL = "ttl"

// MountOptions are the names of all options; those but the last are of s3:// stores.
var MountOptions = []string{OptionEndpoint, OptionRegion, OptionPathStyle, OptionTTL}

const minTTL = time.Second

// Table is the mount table.
type Table struct {
	ID     string  // made with the first mount; "" for a table that never had one
	Mounts []Mount // by path
}

// CredentialKind says where a credential is.
type CredentialKind string

const (
	FromSecret CredentialKind = "secret" // a Kubernetes Secret: namespace/name
	FromFile   CredentialKind = "file"   // a file or folder of the worker's, below its --credential-root
	FromEnv    CredentialKind = "env"    // environment variables of the worker's that begin so
)

// Credential says where one is. It is no secret itself.
type Credential struct {
	Kind CredentialKind
	Name string // namespace/name, absolute path, or prefix of the variables' names
}

// String is the inverse of ParseCredential.
func (c Credential) String() string {
	if c.Kind == "" {
		return ""
	}
	return string(c.Kind) + ":" + c.Name
}

var (
	kubeName  = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$`)
	envPrefix = regexp.MustCompile(`^[A-Z_][A-Z0-9_]*$`)
)

const (
	maxKubeName = 253
	maxEnv      = 64
	maxSegment  = 255  // bytes of a name in a path, as file systems have it
	maxKey      = 1024 // bytes of a prefix, as S3 has it
	maxAllowed  = 1024 // namespaces in a list
)

// ParseCredential reads secret:namespace/name, file:/path or env:PREFIX_; "" is none.
// The error does not repeat what may be a credential itself.
func ParseCredential(s string) (Credential, error) {
	kind, name, ok := strings.Cut(s, ":")
	c := Credential{CredentialKind(kind), name}
	switch {
	case s == "":
		return Credential{}, nil
	case ok && c.Kind == FromSecret:
		space, secret, ok := strings.Cut(name, "/")
		if !ok || !isKubeName(space) || !isKubeName(secret) {
			return Credential{}, invalid([]error{errors.New("credential: want secret:namespace/name, the names of a Kubernetes Secret")})
		}
	case ok && c.Kind == FromFile:
		if !path.IsAbs(name) || path.Clean(name) != name || name == "/" || len(name) > maxPath || !printable(name) {
			return Credential{}, invalid([]error{errors.New("credential: want file:/path, absolute, without .. and without a slash at the end")})
		}
	case ok && c.Kind == FromEnv:
		if !envPrefix.MatchString(name) || len(name) > maxEnv {
			return Credential{}, invalid([]error{errors.New("credential: want env:PREFIX_ for the variables PREFIX_AWS_ACCESS_KEY_ID and PREFIX_AWS_SECRET_ACCESS_KEY (capital letters, digits, _)")})
		}
	default:
		return Credential{}, invalid([]error{errors.New("credential: want secret:namespace/name, file:/path or env:PREFIX_, which say where it is; never the credential itself")})
	}
	return c, nil
}

func isKubeName(s string) bool {
	return len(s) <= maxKubeName && kubeName.MatchString(s) && !strings.Contains(s, "..")
}

// ParsePath reads a path of the namespace as people write it: a slash at the end may be there.
func ParsePath(s string) (string, error) {
	p := s
	if len(p) > 1 {
		p = strings.TrimSuffix(p, "/")
	}
	if err := CheckPath(p); err != nil {
		return "", err
	}
	return p, nil
}

// CheckPath checks a path of the namespace in its normal form: "/", or names with one slash before
// each, none of which is ".", ".." or longer than file systems allow.
func CheckPath(p string) error {
	bad := func(why string) error { return invalid([]error{fmt.Errorf("path %.80q: %s", p, why)}) }
	switch {
	case !strings.HasPrefix(p, "/"):
		return bad("want an absolute one, such as /sales")
	case p == "/":
		return nil
	}
	if err := checkSegments(p[1:]); err != nil {
		return bad(err.Error())
	}
	return nil
}

// checkSegments refuses what must never reach a path join.
func checkSegments(p string) error {
	if len(p) > maxKey {
		return fmt.Errorf("longer than %d bytes", maxKey)
	}
	if !utf8.ValidString(p) || strings.IndexFunc(p, unicode.IsControl) >= 0 {
		return errors.New("not UTF-8, or with a control character in it")
	}
	for name := range strings.SplitSeq(p, "/") {
		switch {
		case name == "":
			return errors.New("an empty name in it (two slashes in a row, or one at the end)")
		case name == "." || name == "..":
			return fmt.Errorf("%q is no name", name)
		case len(name) > maxSegment:
			return fmt.Errorf("a name longer than %d bytes", maxSegment)
		}
	}
	return nil
}

// ParseMount makes a mount of what people write: path and URI may end with a slash, namespaces may
// come in any order. It names all that is wrong, as ErrInvalid.
func ParseMount(m Mount) (Mount, error) {
	errs := []error{}
	if p, err := ParsePath(m.Path); err != nil {
		errs = append(errs, unwrapped(err))
	} else {
		m.Path = p
	}
	if strings.HasPrefix(m.URI, "s3://") || m.URI != "file:///" {
		m.URI = strings.TrimSuffix(m.URI, "/")
	}
	if e, err := normalEndpoint(m.Options[OptionEndpoint]); err == nil && e != "" {
		m.Options = maps.Clone(m.Options)
		m.Options[OptionEndpoint] = e
	}
	m.AllowInline, m.AllowClass = normalNamespaces(m.AllowInline), normalNamespaces(m.AllowClass)
	if len(errs) > 0 {
		m.Path = "/" // what is wrong with it is said
	}
	if err := m.Validate(); err != nil {
		errs = append(errs, unwrapped(err))
	}
	return m, invalid(errs)
}

// unwrapped is the text of an error of this package without its sentinel, which is put before all.
func unwrapped(err error) error {
	return errors.New(strings.TrimPrefix(err.Error(), ErrInvalid.Error()+": "))
}

func normalNamespaces(names []string) []string {
	var out []string
	for _, n := range names {
		if n = strings.TrimSpace(n); n != "" {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Validate names all that is wrong, as ErrInvalid.
func (m Mount) Validate() error {
	errs := []error{checkMap("option", m.Options)}
	if err := CheckPath(m.Path); err != nil {
		errs = append(errs, unwrapped(err))
	}
	errs = append(errs, checkURI(m.URI))
	for name, value := range m.Options {
		errs = append(errs, checkOption(name, value))
		if strings.HasPrefix(m.URI, "file://") && name != OptionTTL && slices.Contains(MountOptions, name) {
			errs = append(errs, fmt.Errorf("option %s: only for s3:// stores", name))
		}
	}
	if _, err := ParseCredential(m.Credential); err != nil {
		errs = append(errs, unwrapped(err))
	} else if m.Credential != "" && strings.HasPrefix(m.URI, "file://") {
		errs = append(errs, errors.New("credential: only for s3:// stores"))
	}
	errs = append(errs, checkNamespaces("allow-inline", m.AllowInline), checkNamespaces("allow-class", m.AllowClass))
	if m.Object != "" && !isKubeName(m.Object) {
		errs = append(errs, fmt.Errorf("object %.80q: want the name of a Kubernetes object", m.Object))
	}
	slices.SortFunc(errs, compareErrors)
	return invalid(errs)
}

// compareErrors puts what was found in a map in an order.
func compareErrors(a, b error) int {
	text := func(err error) string {
		if err == nil {
			return ""
		}
		return err.Error()
	}
	return strings.Compare(text(a), text(b))
}

var bucketShape = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]+[A-Za-z0-9]$`)

// checkURI does not repeat the text, which may have a password in it.
func checkURI(uri string) error {
	if rest, ok := strings.CutPrefix(uri, "s3://"); ok {
		bucket, prefix, more := strings.Cut(rest, "/")
		if !bucketShape.MatchString(bucket) || len(bucket) > maxSegment || strings.Contains(bucket, "..") {
			return errors.New("uri: no bucket name behind s3:// (letters, digits, '.', '_', '-'; credentials do not belong here)")
		}
		if !more {
			return nil
		}
		if err := checkEscaped(prefix); err != nil {
			return fmt.Errorf("uri: prefix: %w", err)
		}
		return nil
	}
	p, ok := strings.CutPrefix(uri, "file://")
	switch {
	case !ok:
		return errors.New("uri: want s3://bucket/prefix or file:///path")
	case p == "/":
		return nil
	case !strings.HasPrefix(p, "/"):
		return errors.New("uri: want file:///path, with three slashes")
	}
	if err := checkEscaped(p[1:]); err != nil {
		return fmt.Errorf("uri: %w", err)
	}
	return nil
}

// checkEscaped is checkSegments for a part of a URI, in which %XX stands for a byte: what that means is
// checked too.
func checkEscaped(p string) error {
	if i := strings.IndexAny(p, "?#"); i >= 0 {
		return fmt.Errorf("%q ends the path of a URI; write it as %%%02X", p[i:i+1], p[i])
	}
	plain, err := url.PathUnescape(p)
	if err != nil {
		return errors.New("a % that two hexadecimal digits do not follow; write % as %25")
	}
	if strings.Count(plain, "/") != strings.Count(p, "/") {
		return errors.New("%2F in it: no name has a slash")
	}
	return errors.Join(checkSegments(p), checkSegments(plain))
}

var regionShape = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`)

func checkOption(name, value string) error {
	switch name {
	case OptionEndpoint:
		if e, err := normalEndpoint(value); err != nil || e == "" {
			return fmt.Errorf("option %s: want http://host[:port] or https://host[:port]", name)
		}
	case OptionRegion:
		if !regionShape.MatchString(value) || len(value) > 64 { // it becomes part of a host name
			return fmt.Errorf("option %s: want a region (lower-case letters, digits, '-')", name)
		}
	case OptionPathStyle:
		if value != "true" && value != "false" {
			return fmt.Errorf("option %s: want true or false", name)
		}
	case OptionTTL:
		if d, err := time.ParseDuration(value); err != nil || d < minTTL {
			return fmt.Errorf("option %s: want how long something may be cached, such as 24h or 30m (%v at least)", name, minTTL)
		}
	default:
		return fmt.Errorf("option %.40q: not known; the options are %s", name, strings.Join(MountOptions, ", "))
	}
	return nil
}

var hostShape = regexp.MustCompile(`^[a-z0-9_]([a-z0-9._-]*[a-z0-9])?\.?$`)

// awsMetadataV6 is not link-local although its IPv4 twin is.
var awsMetadataV6 = netip.MustParseAddr("fd00:ec2::254")

// normalEndpoint is scheme://host[:port] in lower case, without the scheme's own port; "" of "". An
// administrator writes it, so link-local hosts are all that is refused: a cloud's metadata are no store.
func normalEndpoint(s string) (string, error) {
	if s == "" {
		return "", nil
	}
	bad := errors.New("not a URL like https://host:port")
	u, err := url.Parse(s)
	if err != nil || len(s) > maxPath || u.Opaque != "" || u.Scheme != "http" && u.Scheme != "https" || u.User != nil ||
		u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || strings.HasSuffix(s, "#") {
		return "", bad
	}
	host := strings.ToLower(u.Hostname())
	ip, iperr := netip.ParseAddr(host)
	switch {
	case iperr == nil && (ip.Zone() != "" || ip.Unmap().IsLinkLocalUnicast() || ip == awsMetadataV6 || ip.IsUnspecified() || ip.IsMulticast()):
		return "", bad
	case iperr == nil && ip.Is6():
		host = "[" + host + "]"
	case iperr != nil && (!hostShape.MatchString(host) || len(host) > 254 || strings.Contains(host, "..")):
		return "", bad
	}
	if u.Port() == "" {
		return u.Scheme + "://" + host, nil
	}
	n, err := strconv.ParseUint(u.Port(), 10, 16)
	if err != nil || n == 0 {
		return "", bad
	}
	if u.Scheme == "http" && n == 80 || u.Scheme == "https" && n == 443 {
		return u.Scheme + "://" + host, nil
	}
	return fmt.Sprintf("%s://%s:%d", u.Scheme, host, n), nil
}

func checkNamespaces(what string, names []string) error {
	if len(names) > maxAllowed {
		return fmt.Errorf("%s: %d namespaces; at most %d", what, len(names), maxAllowed)
	}
	for _, n := range names {
		if n != AllNamespaces && n != NoNamespace && (!isKubeName(n) || strings.Contains(n, ".")) {
			return fmt.Errorf("%s: %.80q: want names of Kubernetes namespaces, %s for all or %s for none", what, n, AllNamespaces, NoNamespace)
		}
		if len(names) > 1 && (n == AllNamespaces || n == NoNamespace) {
			return fmt.Errorf("%s: %s stands alone", what, n)
		}
	}
	return nil
}

// Allows reports whether a volume of that Kubernetes namespace may use the mount. The namespace is ""
// where it is not known: that is in no list but the one of all.
func (m Mount) Allows(inline bool, namespace string) bool {
	list := m.AllowClass
	if inline {
		list = m.AllowInline
	}
	if len(list) == 0 {
		return !inline
	}
	return list[0] == AllNamespaces || namespace != "" && slices.Contains(list, namespace)
}

// TTL is how long something of an object may be cached before all of it is freed; 0 for as long as there is room.
func (m Mount) TTL() time.Duration {
	d, err := time.ParseDuration(m.Options[OptionTTL])
	if err != nil || d < minTTL {
		return 0
	}
	return d
}

// Equal reports whether both are the same in all fields.
func (m Mount) Equal(o Mount) bool {
	return m.Path == o.Path && m.URI == o.URI && m.ReadOnly == o.ReadOnly && m.Credential == o.Credential && m.Object == o.Object &&
		maps.Equal(m.Options, o.Options) && slices.Equal(m.AllowInline, o.AllowInline) && slices.Equal(m.AllowClass, o.AllowClass)
}
