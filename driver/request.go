package driver

import (
	"fmt"
	"maps"
	"net"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/master/client"
)

// Names of the parameters of a StorageClass, which are also the inline attributes and the
// keys of a volume_context.
const (
	keySource    = "source"
	keyPath      = "path"
	keyEndpoint  = "endpoint"
	keyRegion    = "region"
	keyPathStyle = "pathStyle"
	keyLayout    = "layout"
	keyFreshness = "freshness"
	keyComplete  = "complete"
	keyBinding   = "binding"
	keyUID       = "uid"
	keyGID       = "gid"
	keyFileMode  = "fileMode"
	keyDirMode   = "dirMode"

	keyCredentials = "credentials"
	keyRoleARN     = "roleArn"
	keySTSEndpoint = "stsEndpoint"
)

var parameterNames = []string{
	keySource, keyPath, keyEndpoint, keyRegion, keyPathStyle, keyLayout, keyFreshness, keyComplete,
	keyBinding, keyUID, keyGID, keyFileMode, keyDirMode, keyCredentials, keyRoleARN, keySTSEndpoint,
}

// Keys of the Secret, as a pod would get them with envFrom.
const (
	secretID    = "AWS_ACCESS_KEY_ID"
	secretKey   = "AWS_SECRET_ACCESS_KEY"
	secretToken = "AWS_SESSION_TOKEN"
)

// What orchestrators add to parameters and contexts; of these only keyEphemeral and the keys of podOf are used.
var foreignPrefixes = []string{"csi.storage.k8s.io/", "storage.kubernetes.io/"}

const keyEphemeral = "csi.storage.k8s.io/ephemeral"

// What the kubelet says of the pod, where the CSIDriver has podInfoOnMount.
const (
	keyPodNamespace = "csi.storage.k8s.io/pod.namespace"
	keyPodName      = "csi.storage.k8s.io/pod.name"
	keyPodUID       = "csi.storage.k8s.io/pod.uid"
)

var (
	uidShape  = regexp.MustCompile(`^[A-Za-z0-9-]{1,128}$`)
	nameShape = regexp.MustCompile(`^[a-z0-9.-]{0,253}$`)
)

// podOf is the pod that a volume is published to; ok is false if none is named, or none that
// Kubernetes could have.
func podOf(attrs map[string]string) (p Pod, ok bool) {
	p = Pod{UID: attrs[keyPodUID], Namespace: attrs[keyPodNamespace], Name: attrs[keyPodName]}
	return p, uidShape.MatchString(p.UID) && nameShape.MatchString(p.Namespace) && nameShape.MatchString(p.Name)
}

// What the external-provisioner says of the claim (--extra-create-metadata): the controller puts it into the volume_context.
const (
	keyClaimNamespace = "csi.storage.k8s.io/pvc/namespace"
	keyClaimName      = "csi.storage.k8s.io/pvc/name"
)

// ownerOf is whose volume it is: of a claim, or, if a pod named it itself, of the pod's namespace; "" where nobody
// says so, or what no Kubernetes could have.
func ownerOf(attrs map[string]string, inline bool) (namespace, name string) {
	if namespace, name = attrs[keyClaimNamespace], attrs[keyClaimName]; inline || namespace == "" {
		namespace, name = attrs[keyPodNamespace], ""
	}
	if !nameShape.MatchString(namespace) || !nameShape.MatchString(name) {
		return "", ""
	}
	return namespace, name
}

const (
	defaultFreshness = time.Minute
	defaultFileMode  = 0o444
	defaultDirMode   = 0o555

	maxSource       = 2048      // bytes of a source or an endpoint
	maxKey          = 1024      // bytes of a prefix, as S3 has it
	maxSegment      = 255       // bytes of a segment, as file systems have it
	maxOwner        = 1<<32 - 2 // 1<<32-1 means "leave it" to the kernel
	maxSecret       = 8 << 10   // bytes of one value of a Secret
	maxVolumeID     = 1024
	maxMistakeTexts = 16
)

// Binding says where a volume can be used.
type Binding string

const (
	BindingShared Binding = "shared" // from every node; the request is nominal
	BindingNode   Binding = "node"   // from one node, whose cache keeps the requested bytes for it
)

// rules are what the administrator allows (DESIGN §5.10).
type rules struct {
	fileRoot        string              // "" allows no file:// source
	inlineEndpoints map[string]struct{} // normalised
	stsEndpoints    map[string]struct{} // that inline volumes may name; normalised
	driver          []driverRule
}

func newRules(fileRoot string, inlineEndpoints []string) (rules, error) {
	r := rules{inlineEndpoints: map[string]struct{}{}}
	var m mistakes
	if fileRoot != "" {
		if err := checkAbs(fileRoot); err != nil {
			m.add("file root %q: %v", fileRoot, err)
		}
		r.fileRoot = filepath.Clean(fileRoot)
	}
	for _, e := range inlineEndpoints {
		u, err := parseEndpoint(e)
		if err != nil {
			m.add("inline endpoint: %v", err)
			continue
		}
		r.inlineEndpoints[u] = struct{}{}
	}
	return r, m.err()
}

// request is what the strings of one CSI call mean.
type request struct {
	brokerwire.Volume
	Binding Binding
}

// parse turns the parameters of a StorageClass, the volume_context that was made of them, or
// inline attributes (attrs says which, by [keyEphemeral]) and a Secret into a request. All
// mistakes are reported in one error, which wraps object.ErrInvalid and has no value of a
// Secret or of an unknown key in it.
func (r rules) parse(volumeID string, attrs, secrets map[string]string) (request, error) {
	p := parser{rules: r, attrs: attrs}
	p.inline = p.flag(keyEphemeral, false)
	p.refuseUnknown()
	q := request{Volume: brokerwire.Volume{
		ID:        volumeID,
		Source:    p.source(),
		Path:      p.path(),
		Region:    p.region(),
		Layout:    choice(&p, keyLayout, brokerwire.LayoutFull, brokerwire.LayoutData),
		Freshness: p.freshness(),
		Complete:  choice(&p, keyComplete, brokerwire.CompleteAuto, brokerwire.CompleteNever, brokerwire.CompleteAlways),
		UID:       p.owner(keyUID),
		GID:       p.owner(keyGID),
		FileMode:  p.mode(keyFileMode, defaultFileMode),
		DirMode:   p.mode(keyDirMode, defaultDirMode),
		Inline:    p.inline,
	}}
	q.Namespace, q.Claim = ownerOf(attrs, p.inline)
	q.Endpoint = p.endpoint()
	q.PathStyle = p.flag(keyPathStyle, q.Endpoint != "")
	q.Binding = choice(&p, keyBinding, BindingShared, BindingNode)
	if p.inline && q.Binding == BindingNode {
		p.add("%s: node is for StorageClasses; an inline volume is where its pod is", keyBinding)
	}
	p.onlyS3(q.Source)
	p.onlySource()
	q.Credentials = p.credentials(secrets)
	if strings.HasPrefix(q.Source, fileScheme) {
		q.Credentials = brokerwire.Credentials{}
	}
	p.tenant(&q, secrets)
	if err := p.err(); err != nil {
		return request{}, err
	}
	if err := r.mayUseDriver(q, attrs); err != nil {
		return request{}, err
	}
	return q, nil
}

// context is the normalised form: parse(context()) gives the same request, without its
// credentials, so that a node needs no master to publish.
func (q request) context() map[string]string {
	m := map[string]string{
		keyLayout:    string(q.Layout),
		keyFreshness: q.Freshness.String(),
		keyComplete:  string(q.Complete),
		keyBinding:   string(q.Binding),
		keyUID:       strconv.FormatUint(uint64(q.UID), 10),
		keyGID:       strconv.FormatUint(uint64(q.GID), 10),
		keyFileMode:  fmt.Sprintf("%04o", q.FileMode),
		keyDirMode:   fmt.Sprintf("%04o", q.DirMode),
	}
	if q.Path != "" {
		m[keyPath] = q.Path
	} else {
		m[keySource] = q.Source
	}
	if strings.HasPrefix(q.Source, s3Scheme) {
		m[keyPathStyle] = strconv.FormatBool(q.PathStyle)
	}
	if q.Endpoint != "" {
		m[keyEndpoint] = q.Endpoint
	}
	if q.Region != "" {
		m[keyRegion] = q.Region
	}
	return q.withTenant(m)
}

// withGroup is the volume as members of a pod's fsGroup can read it; "" changes nothing.
func withGroup(v brokerwire.Volume, group string) (brokerwire.Volume, error) {
	if group == "" {
		return v, nil
	}
	gid, err := parseOwner(group)
	if err != nil {
		return v, fmt.Errorf("volume_mount_group: %v: %w", err, object.ErrInvalid)
	}
	v.GID = gid
	v.FileMode |= 0o040
	v.DirMode |= 0o050
	return v, nil
}

// mistakes collects what is wrong with one request.
type mistakes struct {
	texts []string
	n     int
}

func (m *mistakes) add(format string, args ...any) {
	if m.n++; m.n <= maxMistakeTexts {
		m.texts = append(m.texts, fmt.Sprintf(format, args...))
	}
}

func (m *mistakes) full() bool { return m.n >= maxMistakeTexts }

func (m *mistakes) err() error {
	if m.n == 0 {
		return nil
	}
	text := strings.Join(m.texts, "; ")
	if more := m.n - len(m.texts); more > 0 {
		text += fmt.Sprintf("; and %d more", more)
	}
	return fmt.Errorf("%s: %w", text, object.ErrInvalid)
}

type parser struct {
	rules
	mistakes
	attrs  map[string]string
	inline bool
}

func (p *parser) refuseUnknown() {
	for _, name := range slices.Sorted(maps.Keys(p.attrs)) {
		if slices.Contains(parameterNames, name) || isForeign(name) {
			continue
		}
		if p.full() {
			p.add("") // counted, not described
			continue
		}
		text := fmt.Sprintf("unknown parameter %s; the nearest known one is %s", quote(name), nearest(name, parameterNames))
		if strings.HasPrefix(strings.ToUpper(name), "AWS_") {
			text += " (credentials belong in the Secret)"
		}
		p.add("%s", text)
	}
}

func isForeign(name string) bool {
	return slices.ContainsFunc(foreignPrefixes, func(prefix string) bool { return strings.HasPrefix(name, prefix) })
}

const (
	s3Scheme   = "s3://"
	fileScheme = "file://"
)

func (p *parser) source() string {
	s := p.attrs[keySource]
	switch {
	case s == "" && p.attrs[keyPath] != "":
	case s != "" && p.attrs[keyPath] != "":
		p.add("%s, %s: give one of them: a store of the volume's own, or what is mounted in the namespace", keySource, keyPath)
	case s == "":
		p.add("%s: missing; give s3://bucket/prefix or file:///path, or, with %s, what is mounted in the namespace (/sales)", keySource, keyPath)
	case len(s) > maxSource:
		p.add("%s: longer than %d bytes", keySource, maxSource)
	case strings.HasPrefix(s, s3Scheme):
		return p.s3Source(s)
	case strings.HasPrefix(s, fileScheme):
		return p.fileSource(s)
	default:
		p.add("%s: its scheme is none of s3://bucket/prefix, file:///path", keySource)
	}
	return ""
}

// path is of the namespace: what is mounted there.
func (p *parser) path() string {
	s := p.attrs[keyPath]
	if s == "" {
		return ""
	}
	path, err := client.ParsePath(s)
	if err != nil {
		p.add("%s: %s", keyPath, strings.TrimPrefix(err.Error(), client.ErrInvalid.Error()+": "))
	}
	return path
}

// onlySource refuses to say twice where the data is.
func (p *parser) onlySource() {
	if p.attrs[keyPath] == "" {
		return
	}
	for _, key := range []string{keyEndpoint, keyRegion, keyPathStyle} {
		if p.attrs[key] != "" {
			p.add("%s: not with %s; the mount has it (larder mount show %s)", key, keyPath, quote(p.attrs[keyPath]))
		}
	}
}

var (
	bucketPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]+[A-Za-z0-9]$`)
	regionPattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`)
)

// Lengths are no part of the patterns: counted repetitions make each start of a process a millisecond longer.
const (
	maxBucket = 255
	maxRegion = 64
	maxHost   = 254
)

func (p *parser) s3Source(s string) string {
	bucket, prefix, _ := strings.Cut(s[len(s3Scheme):], "/")
	if !bucketPattern.MatchString(bucket) || len(bucket) > maxBucket || strings.Contains(bucket, "..") {
		p.add("%s: no bucket name after s3:// (letters, digits, '.', '_', '-'; credentials belong in the Secret)", keySource)
		return ""
	}
	prefix = strings.TrimSuffix(prefix, "/")
	if prefix == "" {
		return s3Scheme + bucket
	}
	if err := checkEscaped(prefix); err != nil {
		p.add("%s: prefix: %v", keySource, err)
		return ""
	}
	return s3Scheme + bucket + "/" + prefix
}

func (p *parser) fileSource(s string) string {
	path := s[len(fileScheme):]
	if p.inline {
		p.add("%s: file:// is not for inline volumes; ask the administrator for a StorageClass", keySource)
		return ""
	}
	if p.fileRoot == "" {
		p.add("%s: file:// is switched off here; the administrator allows it with --file-root", keySource)
		return ""
	}
	if path != "/" {
		path = strings.TrimSuffix(path, "/")
	}
	err := checkAbs(path)
	if err == nil && path != "/" {
		err = checkEscaped(path[1:])
	}
	if err != nil {
		p.add("%s: %v", keySource, err)
		return ""
	}
	if !below(path, p.fileRoot) {
		p.add("%s: not below the directory given with --file-root", keySource)
		return ""
	}
	return fileScheme + path
}

// below reports whether path is root or in it, by segments of clean absolute paths.
func below(path, root string) bool {
	return path == root || root == "/" || strings.HasPrefix(path, root+"/")
}

func checkAbs(path string) error {
	if !strings.HasPrefix(path, "/") {
		return fmt.Errorf("not an absolute path (file:///path has three slashes)")
	}
	if path == "/" {
		return nil
	}
	return checkSegments(path[1:])
}

// checkSegments refuses what must never reach a path join (DESIGN §5.9).
func checkSegments(path string) error {
	if len(path) > maxKey {
		return fmt.Errorf("longer than %d bytes", maxKey)
	}
	if !utf8.ValidString(path) {
		return fmt.Errorf("not UTF-8")
	}
	if strings.ContainsRune(path, 0) {
		return fmt.Errorf("contains NUL")
	}
	for segment := range strings.SplitSeq(path, "/") {
		switch {
		case segment == "":
			return fmt.Errorf("an empty segment (two slashes in a row)")
		case segment == "." || segment == "..":
			return fmt.Errorf("a segment %q", segment)
		case len(segment) > maxSegment:
			return fmt.Errorf("a segment longer than %d bytes", maxSegment)
		}
	}
	return nil
}

// checkEscaped is checkSegments for the path of a URL: what its escapes stand for is checked as well.
func checkEscaped(path string) error {
	if err := checkSegments(path); err != nil {
		return err
	}
	if strings.ContainsAny(path, "?#") {
		return fmt.Errorf("a '?' or '#', which ends the path of a URL; write %%3F or %%23")
	}
	plain, err := url.PathUnescape(path)
	if err != nil {
		return fmt.Errorf("a '%%' that begins no escape; write %%25")
	}
	if strings.Count(plain, "/") != strings.Count(path, "/") {
		return fmt.Errorf("an escaped slash (%%2F)")
	}
	if err := checkSegments(plain); err != nil {
		return fmt.Errorf("escaped: %v", err)
	}
	return nil
}

func (p *parser) endpoint() string {
	s := p.attrs[keyEndpoint]
	if s == "" {
		return ""
	}
	e, err := parseEndpoint(s)
	if err != nil {
		p.add("%s: %v", keyEndpoint, err)
		return ""
	}
	if _, ok := p.inlineEndpoints[e]; p.inline && !ok {
		p.add("%s: not allowed for inline volumes; the administrator allows it with --inline-endpoint", keyEndpoint)
		return ""
	}
	return e
}

// parseEndpoint normalises an endpoint to scheme://host[:port], in lower case, without the
// scheme's own port. Its errors do not repeat s, which may have a password in it.
func parseEndpoint(s string) (string, error) {
	if len(s) > maxSource {
		return "", fmt.Errorf("longer than %d bytes", maxSource)
	}
	u, err := url.Parse(s)
	if err != nil || u.Opaque != "" || (u.Scheme != "http" && u.Scheme != "https") {
		return "", fmt.Errorf("not a URL like https://host:port")
	}
	if u.User != nil {
		return "", fmt.Errorf("credentials belong in the Secret, not in the URL")
	}
	if (u.Path != "" && u.Path != "/") || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || strings.HasSuffix(s, "#") {
		return "", fmt.Errorf("only scheme, host and port can be given")
	}
	host := strings.ToLower(u.Hostname())
	if !isHost(host) {
		return "", fmt.Errorf("no host name or address in it")
	}
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	port := u.Port()
	if n, err := strconv.ParseUint(port, 10, 16); port != "" && (err != nil || n == 0) {
		return "", fmt.Errorf("its port is not one of 1 to 65535")
	} else if port != "" {
		port = strconv.FormatUint(n, 10)
	}
	if port == "" || u.Scheme+port == "http80" || u.Scheme+port == "https443" {
		return u.Scheme + "://" + host, nil
	}
	return u.Scheme + "://" + host + ":" + port, nil
}

var hostPattern = regexp.MustCompile(`^[a-z0-9_]([a-z0-9._-]*[a-z0-9])?\.?$`)

func isHost(host string) bool {
	if strings.Contains(host, ":") {
		return net.ParseIP(host) != nil // no zones
	}
	return hostPattern.MatchString(host) && len(host) <= maxHost && !strings.Contains(host, "..")
}

func (p *parser) region() string {
	s := p.attrs[keyRegion]
	if s != "" && (!regionPattern.MatchString(s) || len(s) > maxRegion) { // it becomes part of a host name
		p.add("%s: %s is not a region (lower-case letters, digits, '-')", keyRegion, quote(s))
		return ""
	}
	return s
}

func (p *parser) onlyS3(source string) {
	if !strings.HasPrefix(source, fileScheme) {
		return
	}
	for _, key := range []string{keyEndpoint, keyRegion, keyPathStyle} {
		if p.attrs[key] != "" {
			p.add("%s: only for s3:// sources", key)
		}
	}
}

func (p *parser) flag(key string, fallback bool) bool {
	switch s := p.attrs[key]; s {
	case "":
		return fallback
	case "true":
		return true
	case "false":
		return false
	default:
		p.add("%s: %s is neither true nor false", key, quote(s))
		return fallback
	}
}

// choice reads one of the given words; the first is the default.
func choice[T ~string](p *parser, key string, words ...T) T {
	s := p.attrs[key]
	if s == "" {
		return words[0]
	}
	if i := slices.Index(words, T(s)); i >= 0 {
		return words[i]
	}
	p.add("%s: %s is none of %v", key, quote(s), words)
	return words[0]
}

func (p *parser) freshness() time.Duration {
	s := p.attrs[keyFreshness]
	if s == "" {
		return defaultFreshness
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		p.add("%s: %s is not a duration like 30s, 5m or 0s", keyFreshness, quote(s))
		return defaultFreshness
	}
	return d
}

func (p *parser) owner(key string) uint32 {
	s := p.attrs[key]
	if s == "" {
		return 0
	}
	n, err := parseOwner(s)
	if err != nil {
		p.add("%s: %v", key, err)
	}
	return n
}

func parseOwner(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n > maxOwner {
		return 0, fmt.Errorf("%s is not a number from 0 to %d", quote(s), uint32(maxOwner))
	}
	return uint32(n), nil
}

func (p *parser) mode(key string, fallback uint32) uint32 {
	s := p.attrs[key]
	if s == "" {
		return fallback
	}
	n, err := strconv.ParseUint(s, 8, 32)
	if err != nil || n > 0o777 {
		p.add("%s: %s is not an octal mode from 0000 to 0777", key, quote(s))
		return fallback
	}
	return uint32(n)
}

// credentials reads the three keys that are ours; the Secret may hold others, because pods
// use it with envFrom.
func (p *parser) credentials(secrets map[string]string) brokerwire.Credentials {
	c := brokerwire.Credentials{
		AccessKeyID:     p.secret(secrets, secretID),
		SecretAccessKey: p.secret(secrets, secretKey),
		SessionToken:    p.secret(secrets, secretToken),
	}
	switch has := secrets; {
	case has[secretID] != "" && has[secretKey] == "":
		p.add("the Secret has %s but no %s", secretID, secretKey)
	case has[secretID] == "" && has[secretKey] != "":
		p.add("the Secret has %s but no %s", secretKey, secretID)
	case has[secretID] == "" && has[secretToken] != "":
		p.add("the Secret has %s but no %s", secretToken, secretID)
	}
	return c
}

func (p *parser) secret(secrets map[string]string, key string) string {
	s := secrets[key]
	if len(s) > maxSecret {
		p.add("the Secret's %s is longer than %d bytes", key, maxSecret)
		return ""
	}
	if strings.ContainsFunc(s, func(r rune) bool { return r > unicode.MaxASCII || r <= ' ' || r == 0x7f }) {
		p.add("the Secret's %s has a space, a line break or another character in it that no key has", key)
		return ""
	}
	return s
}

// checkID refuses volume ids that nobody sends by accident.
func checkID(id string) error {
	switch {
	case id == "":
		return fmt.Errorf("volume_id: missing: %w", object.ErrInvalid)
	case len(id) > maxVolumeID || strings.ContainsRune(id, 0) || !utf8.ValidString(id):
		return fmt.Errorf("volume_id: over-long, with a NUL, or not UTF-8: %w", object.ErrInvalid)
	}
	return nil
}

// checkPath is for paths that the orchestrator gives.
func checkPath(field, path string) error {
	if path == "" {
		return fmt.Errorf("%s: missing: %w", field, object.ErrInvalid)
	}
	if !filepath.IsAbs(path) || strings.ContainsRune(path, 0) || filepath.Clean(path) == "/" {
		return fmt.Errorf("%s: %s is not an absolute path below /: %w", field, quote(path), object.ErrInvalid)
	}
	for segment := range strings.SplitSeq(path, "/") {
		if segment == ".." {
			return fmt.Errorf("%s: %s has a segment \"..\": %w", field, quote(path), object.ErrInvalid)
		}
	}
	return nil
}

// quote shows what a user wrote, cut to a length that a log line bears.
func quote(s string) string {
	const most = 64
	if len(s) > most {
		return strconv.Quote(s[:most]) + "…"
	}
	return strconv.Quote(s)
}

// nearest is the name with the least edit distance to s, cases aside.
func nearest(s string, names []string) string {
	return slices.MinFunc(names, func(a, b string) int { return distance(s, a) - distance(s, b) })
}

// distance counts the insertions, deletions, replacements and swaps of neighbours between two names.
func distance(a, b string) int {
	if len(a) > 64 {
		a = a[:64]
	}
	a, b = strings.ToLower(a), strings.ToLower(b)
	before, row := make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		next := make([]int, len(b)+1)
		next[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			next[j+1] = min(row[j]+cost, row[j+1]+1, next[j]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				next[j+1] = min(next[j+1], before[j-1]+1)
			}
		}
		before, row = row, next
	}
	return row[len(b)]
}
