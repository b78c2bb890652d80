package driver

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
)

// What the kubelet says of the pod's service account: its name, and, where the CSIDriver has tokenRequests, a
// token for each audience.
const (
	keyServiceAccount = "csi.storage.k8s.io/serviceAccount.name"
	keyTokens         = "csi.storage.k8s.io/serviceAccount.tokens"
	tokenAudience     = "sts.amazonaws.com"
)

const (
	maxRoleARN = 2048
	maxToken   = 16 << 10 // bytes of a service account's token
)

// driverRule lets inline volumes of a Kubernetes namespace read below a prefix with the worker's own credential.
type driverRule struct {
	namespace string
	source    string // normalised
	endpoint  string // normalised; "" is AWS
}

// parseDriverRule reads NAMESPACE=s3://bucket/prefix[,endpoint=URL].
func parseDriverRule(s string) (r driverRule, err error) {
	namespace, where, ok := strings.Cut(s, "=")
	if !ok || namespace == "" || !nameShape.MatchString(namespace) {
		return r, fmt.Errorf("%s: want NAMESPACE=s3://bucket/prefix or NAMESPACE=s3://bucket/prefix,endpoint=URL", quote(s))
	}
	r.namespace = namespace
	where, endpoint, ok := strings.Cut(where, ",endpoint=")
	if ok {
		if r.endpoint, err = parseEndpoint(endpoint); err != nil {
			return r, fmt.Errorf("endpoint for namespace %s: %v", namespace, err)
		}
	}
	p := parser{attrs: map[string]string{keySource: where}}
	if r.source = p.source(); p.err() == nil && !strings.HasPrefix(r.source, s3Scheme) {
		p.add("%s: want s3://bucket/prefix", keySource)
	}
	if err := p.err(); err != nil {
		return r, fmt.Errorf("namespace %s: %v", namespace, text(err))
	}
	return r, nil
}

// allow adds what the administrator allows beyond the zero value.
func (r *rules) allow(driverCredentials, stsEndpoints []string) error {
	var m mistakes
	for _, s := range driverCredentials {
		rule, err := parseDriverRule(s)
		if err != nil {
			m.add("driver credentials: %v", err)
			continue
		}
		r.driver = append(r.driver, rule)
	}
	r.stsEndpoints = map[string]struct{}{}
	for _, s := range stsEndpoints {
		u, err := parseEndpoint(s)
		if err != nil {
			m.add("sts endpoint: %v", err)
			continue
		}
		r.stsEndpoints[u] = struct{}{}
	}
	return m.err()
}

// denial is the error of a request that the policy does not allow. Its text says all.
type denial string

func (d denial) Error() string { return string(d) }
func (d denial) Unwrap() error { return object.ErrDenied }

// mayUseDriver refuses the worker's own credential to a volume that a user wrote, unless a rule for the pod's
// namespace, which the kubelet says, has its source.
func (r rules) mayUseDriver(q request, attrs map[string]string) error {
	if q.CredentialsOf != brokerwire.CredentialsDriver || !q.Inline {
		return nil
	}
	namespace := attrs[keyPodNamespace]
	for _, rule := range r.driver {
		if rule.namespace == namespace && rule.endpoint == q.Endpoint && (q.Source == rule.source || strings.HasPrefix(q.Source, rule.source+"/")) {
			return nil
		}
	}
	at, rule := "", fmt.Sprintf("%s=%s", namespace, q.Source)
	if q.Endpoint != "" {
		at, rule = " at "+q.Endpoint, rule+",endpoint="+q.Endpoint
	}
	return denial(fmt.Sprintf("%s: driver is not allowed for pods of Kubernetes namespace %s and %s%s; the administrator allows it with --driver-credentials %s; or use a Secret, or %s: pod",
		keyCredentials, quote(namespace), q.Source, at, rule, keyCredentials))
}

var credentialWords = []brokerwire.CredentialsOf{brokerwire.CredentialsSecret, brokerwire.CredentialsPod, brokerwire.CredentialsDriver}

// tenant reads whose credential the volume reads with.
func (p *parser) tenant(q *request, secrets map[string]string) {
	if q.CredentialsOf = brokerwire.CredentialsOf(p.attrs[keyCredentials]); q.CredentialsOf != "" && !slices.Contains(credentialWords, q.CredentialsOf) {
		p.add("%s: none of %v; keys themselves belong in the Secret", keyCredentials, credentialWords) // not shown: it may be one
		return
	}
	if q.CredentialsOf != "" && strings.HasPrefix(q.Source, fileScheme) {
		p.add("%s: only for s3:// sources", keyCredentials)
	}
	if q.Path != "" && (q.CredentialsOf == brokerwire.CredentialsPod || q.CredentialsOf == brokerwire.CredentialsDriver) {
		p.add("%s: %s is not for a %s: its mount says whose credential is used (larder mount show %s)", keyCredentials, q.CredentialsOf, keyPath, q.Path)
		return
	}
	if q.CredentialsOf != brokerwire.CredentialsPod {
		for _, key := range []string{keyRoleARN, keySTSEndpoint} {
			if p.attrs[key] != "" {
				p.add("%s: only with %s: pod", key, keyCredentials)
			}
		}
	}
	switch given := !q.Credentials.IsZero(); {
	case q.CredentialsOf == brokerwire.CredentialsDriver && given:
		p.add("%s: driver, but there is a Secret too; give one of them", keyCredentials)
	case q.CredentialsOf == brokerwire.CredentialsPod && given:
		p.add("%s: pod, but there is a Secret too; give one of them", keyCredentials)
	case q.CredentialsOf == brokerwire.CredentialsPod:
		q.RoleARN, q.STSEndpoint = p.role(), p.stsEndpoint()
		q.ServiceAccount = serviceAccountOf(p.attrs)
		q.Credentials = brokerwire.Credentials{SessionToken: p.token(secrets, q.ServiceAccount)}
	}
}

var rolePattern = regexp.MustCompile(`^arn:[a-z0-9-]+:iam::[0-9]*:role/[A-Za-z0-9+=,.@_/-]*[A-Za-z0-9+=,.@_-]$`)

func (p *parser) role() string {
	s := p.attrs[keyRoleARN]
	switch {
	case s == "":
		p.add("%s: missing; with %s: pod give the role to assume, arn:aws:iam::ACCOUNT:role/NAME", keyRoleARN, keyCredentials)
	case len(s) > maxRoleARN || !rolePattern.MatchString(s) || strings.Contains(s, "//"):
		p.add("%s: %s is not the ARN of a role, arn:aws:iam::ACCOUNT:role/NAME", keyRoleARN, quote(s))
	default:
		return s
	}
	return ""
}

func (p *parser) stsEndpoint() string {
	s := p.attrs[keySTSEndpoint]
	if s == "" {
		return ""
	}
	e, err := parseEndpoint(s)
	if err != nil {
		p.add("%s: %v", keySTSEndpoint, err)
		return ""
	}
	if _, ok := p.stsEndpoints[e]; p.inline && !ok {
		p.add("%s: not allowed for inline volumes; the administrator allows it with --sts-endpoint", keySTSEndpoint)
		return ""
	}
	return e
}

// serviceAccountOf is namespace/name of the pod's; "" if the kubelet does not say it.
func serviceAccountOf(attrs map[string]string) string {
	namespace, name := attrs[keyPodNamespace], attrs[keyServiceAccount]
	if namespace == "" || name == "" || !nameShape.MatchString(namespace) || !nameShape.MatchString(name) {
		return ""
	}
	return namespace + "/" + name
}

// token is the service account's, for the token service; "" if the request has none, as when a volume is
// staged. One that says it is of another account did not come from this pod's kubelet. Whether it is
// genuine the token service says.
func (p *parser) token(secrets map[string]string, account string) string {
	all := secrets[keyTokens] // where the CSIDriver has serviceAccountTokenInSecrets
	if all == "" {
		all = p.attrs[keyTokens]
	}
	if all == "" {
		return ""
	}
	var tokens map[string]struct {
		Token string `json:"token"`
	}
	if json.Unmarshal([]byte(all), &tokens) != nil {
		p.add("%s: not the JSON that a kubelet writes", keyTokens)
		return ""
	}
	t := tokens[tokenAudience].Token
	switch {
	case t == "":
		return ""
	case len(t) > maxToken || strings.ContainsFunc(t, func(r rune) bool { return r > unicode.MaxASCII || r <= ' ' || r == 0x7f }):
		p.add("%s: the token for %s is over-long, or has a character that no token has", keyTokens, tokenAudience)
	case account == "":
		p.add("%s: a token without %s and %s; the CSIDriver needs podInfoOnMount", keyTokens, keyPodNamespace, keyServiceAccount)
	case subjectOf(t) != "system:serviceaccount:"+strings.Replace(account, "/", ":", 1):
		p.add("%s: the token is not of the pod's service account %s", keyTokens, account)
	default:
		return t
	}
	return ""
}

// subjectOf is whose token it says it is; "" if it says nothing.
func subjectOf(token string) string {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return ""
	}
	var claims struct {
		Subject string `json:"sub"`
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || json.Unmarshal(b, &claims) != nil {
		return ""
	}
	return claims.Subject
}

// complete reports what is missing of the credential of a volume that is to be read; staged says that its
// pod is not known yet.
func complete(v brokerwire.Volume, staged bool) error {
	switch {
	case v.CredentialsOf == brokerwire.CredentialsSecret && v.Credentials.IsZero():
		return fmt.Errorf("%s: secret, but the request has no %s: name a Secret in the StorageClass or the volume: %w", keyCredentials, secretID, object.ErrInvalid)
	case v.CredentialsOf == brokerwire.CredentialsPod && v.Credentials.IsZero() && !staged:
		return fmt.Errorf("%s: pod, but the kubelet sent no token: the CSIDriver %s needs tokenRequests with audience %s, and podInfoOnMount: %w",
			keyCredentials, Name, tokenAudience, errPrecondition)
	}
	return nil
}

// checkAccount keeps a volume that reads as its pod to one service account while it is published: there is one
// connection, and its principal is the role that this account may assume.
func checkAccount(v view, m brokerwire.Mount, want brokerwire.Volume, target string) error {
	had := m.Volume.ServiceAccount
	if want.CredentialsOf != brokerwire.CredentialsPod || had == "" || had == want.ServiceAccount {
		return nil
	}
	if others := v.targets(m, target); len(others) > 0 {
		return fmt.Errorf("volume %s is published to service account %s on this node; with %s: pod it is for one of them: use a claim for each: %w",
			quote(want.ID), quote(had), keyCredentials, errPrecondition)
	}
	return nil
}

// withTenant adds the parameters of this file to the normalised form.
func (q request) withTenant(m map[string]string) map[string]string {
	for key, value := range map[string]string{keyCredentials: string(q.CredentialsOf), keyRoleARN: q.RoleARN, keySTSEndpoint: q.STSEndpoint} {
		if value != "" {
			m[key] = value
		}
	}
	return m
}
