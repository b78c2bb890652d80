package s3test

import (
	"encoding/base64"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"
)

// STS is a token service: it knows AssumeRoleWithWebIdentity, and roles that are users of a [Server].
type STS struct {
	URL string

	mu    sync.Mutex // guards the fields below
	roles map[string]Role
	asked []Assumed
	away  bool
	ended map[string]bool // tokens
}

// Role is what may be assumed.
type Role struct {
	AccessKey, SecretKey string        // of the user that it is
	Subject              string        // of the tokens that may assume it: system:serviceaccount:namespace:name
	Life                 time.Duration // of a session
}

// Assumed is one request.
type Assumed struct {
	Role, Session, Token string
	Code                 string // of the error; "" if a session was given
}

// StartSTS runs one for the length of a test.
func StartSTS(t testing.TB) *STS {
	s := &STS{roles: map[string]Role{}, ended: map[string]bool{}}
	front := httptest.NewServer(s)
	s.URL = front.URL
	t.Cleanup(front.Close)
	return s
}

// SetRole makes a role, or another one of it.
func (s *STS) SetRole(arn string, r Role) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.roles[arn] = r
}

// SetAway has it answer nothing but 503.
func (s *STS) SetAway(away bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.away = away
}

// Expire has a token expire now.
func (s *STS) Expire(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended[token] = true
}

// Asked are all requests until now.
func (s *STS) Asked() []Assumed {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Assumed{}, s.asked...)
}

const tokenSignature = "signed-by-the-cluster"

// Token is one as a cluster gives it to a service account. The service takes it until it expires.
func Token(namespace, account string, expires time.Time) string {
	claims, err := json.Marshal(map[string]any{
		"aud": []string{"sts.amazonaws.com"}, "sub": "system:serviceaccount:" + namespace + ":" + account, "exp": expires.UnixMilli(),
	})
	if err != nil {
		panic(err) // of strings and a number
	}
	part := base64.RawURLEncoding.EncodeToString
	return part([]byte(`{"alg":"RS256"}`)) + "." + part(claims) + "." + part([]byte(tokenSignature))
}

// TokenAttribute is how a kubelet hands over a token.
func TokenAttribute(token string) string {
	return fmt.Sprintf(`{"sts.amazonaws.com":{"token":%q,"expirationTimestamp":"2099-01-01T00:00:00Z"}}`, token)
}

// check returns the code with which a request is refused; "" if it is not. Requires s.mu.
func (s *STS) check(r Role, known bool, token string) string {
	parts := strings.Split(token, ".")
	if len(parts) != 3 || parts[2] != base64.RawURLEncoding.EncodeToString([]byte(tokenSignature)) {
		return "InvalidIdentityToken"
	}
	var claims struct {
		Aud []string
		Sub string
		Exp int64
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	switch {
	case err != nil || json.Unmarshal(b, &claims) != nil || len(claims.Aud) != 1 || claims.Aud[0] != "sts.amazonaws.com":
		return "InvalidIdentityToken"
	case s.ended[token] || time.Now().UnixMilli() >= claims.Exp:
		return "ExpiredTokenException"
	case !known || claims.Sub != r.Subject:
		return "AccessDenied"
	}
	return ""
}

type assumed struct {
	XMLName     xml.Name `xml:"https://sts.amazonaws.com/doc/2011-06-15/ AssumeRoleWithWebIdentityResponse"`
	AccessKey   string   `xml:"AssumeRoleWithWebIdentityResult>Credentials>AccessKeyId"`
	SecretKey   string   `xml:"AssumeRoleWithWebIdentityResult>Credentials>SecretAccessKey"`
	Expiration  string   `xml:"AssumeRoleWithWebIdentityResult>Credentials>Expiration"`
	SubjectFrom string   `xml:"AssumeRoleWithWebIdentityResult>SubjectFromWebIdentityToken"`
}

// ServeHTTP implements http.Handler.
func (s *STS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := Assumed{Role: r.PostFormValue("RoleArn"), Session: r.PostFormValue("RoleSessionName"), Token: r.PostFormValue("WebIdentityToken")}
	role, known := s.roles[a.Role]
	status := http.StatusForbidden
	switch {
	case s.away:
		a.Code, status = "ServiceUnavailable", http.StatusServiceUnavailable
	case r.PostFormValue("Action") != "AssumeRoleWithWebIdentity" || r.PostFormValue("Version") != "2011-06-15" || r.Header.Get("Authorization") != "":
		a.Code, status = "ValidationError", http.StatusBadRequest
	default:
		if a.Code = s.check(role, known, a.Token); a.Code != "" && a.Code != "AccessDenied" {
			status = http.StatusBadRequest
		}
	}
	s.asked = append(s.asked, a)
	w.Header().Set("Content-Type", "text/xml")
	if a.Code != "" {
		w.WriteHeader(status)
		fmt.Fprintf(w, `<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type><Code>%s</Code><Message>about %s</Message></Error></ErrorResponse>`, a.Code, a.Token)
		return
	}
	xml.NewEncoder(w).Encode(assumed{AccessKey: role.AccessKey, SecretKey: role.SecretKey, // and no token: the gateway takes none
		Expiration: time.Now().Add(role.Life).UTC().Format(time.RFC3339Nano)})
}
