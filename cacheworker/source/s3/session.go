package s3

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

// SessionConfig says how to become a role.
type SessionConfig struct {
	RoleARN   string
	Name      string            // of the session, for the role's owner to see in his logs
	Endpoint  string            // of the token service; "" means AWS's of the region
	Region    string            // "" means us-east-1
	Transport http.RoundTripper // nil means a NewTransport
}

// Session is a role's, got for a web identity: the token of a pod. It is renewed, with the token that was set
// last, before it ends. Safe for concurrent use.
type Session struct {
	cfg   SessionConfig
	api   *sts.Client
	turn  chan struct{} // of one; held while the token service is asked
	where string        // for errors

	mu     sync.Mutex // guards the fields below
	token  string
	creds  aws.Credentials
	renew  time.Time // when creds are to be renewed
	proven bool
	failed error     // what the token service said last, if it was no session
	until  time.Time // for so long it is not asked again, unless there is another token
}

// NewSession asks nobody anything.
func NewSession(cfg SessionConfig) (*Session, error) {
	if cfg.Region == "" {
		cfg.Region = defaultRegion
	}
	if cfg.Transport == nil {
		cfg.Transport = NewTransport(TransportConfig{})
	}
	s := &Session{cfg: cfg, turn: make(chan struct{}, 1), where: "AWS's token service in " + cfg.Region}
	if cfg.Endpoint != "" {
		host, err := EndpointHost(cfg.Endpoint, cfg.Region)
		if err != nil {
			return nil, fmt.Errorf("token service: %w", err)
		}
		s.where = "token service " + host
	}
	s.api = sts.New(sts.Options{
		Region:           cfg.Region,
		Credentials:      aws.AnonymousCredentials{}, // the token is all
		RetryMaxAttempts: 3,
		HTTPClient: &http.Client{Transport: cfg.Transport, Timeout: 10 * time.Second,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
	}, func(o *sts.Options) {
		if cfg.Endpoint != "" {
			o.BaseEndpoint = aws.String(cfg.Endpoint)
		}
	})
	return s, nil
}

// SetToken is for the next renewal.
func (s *Session) SetToken(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if token != "" && token != s.token {
		s.token, s.failed = token, nil
	}
}

// Proven reports whether the token service ever gave a session of the role.
func (s *Session) Proven() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.proven
}

// Prove gets a session, unless there was one.
func (s *Session) Prove(ctx context.Context) error {
	if s.Proven() {
		return nil
	}
	_, err := s.Retrieve(ctx)
	return err
}

const (
	maxEarly    = 5 * time.Minute  // before its end a session is renewed, or at a quarter of its life
	askFor      = 15 * time.Second // the token service, where nothing can be read without it
	askEarly    = 2 * time.Second  // where the session has not ended yet
	afterDenial = 10 * time.Second // the token service is not asked again with the same token
	afterNone   = time.Second      // likewise, if it has not answered
)

// Retrieve implements aws.CredentialsProvider. Its errors are sessionErrors, or the context's.
func (s *Session) Retrieve(ctx context.Context) (aws.Credentials, error) {
	c, valid, fresh := s.current(time.Now())
	if fresh {
		return c, nil
	}
	select {
	case s.turn <- struct{}{}:
	default:
		if valid { // somebody is at it
			return c, nil
		}
		select {
		case s.turn <- struct{}{}:
		case <-ctx.Done():
			return aws.Credentials{}, fmt.Errorf("wait for the token service: %w", context.Cause(ctx))
		}
	}
	defer func() { <-s.turn }()
	if c, _, fresh := s.current(time.Now()); fresh { // somebody else has renewed it
		return c, nil
	}
	s.mu.Lock()
	token, failed, wait := s.token, s.failed, time.Now().Before(s.until)
	s.mu.Unlock()
	if failed != nil && wait {
		return s.orElse(failed)
	}
	patience := askFor
	if valid {
		patience = askEarly
	}
	ask, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience) // for all who wait
	defer cancel()
	got, err := s.assume(ask, token)
	s.note(token, got, err)
	if err != nil {
		return s.orElse(err)
	}
	return got, nil
}

// orElse is the session that has not ended yet, or the error.
func (s *Session) orElse(err error) (aws.Credentials, error) {
	if c, valid, _ := s.current(time.Now()); valid {
		return c, nil
	}
	return aws.Credentials{}, err
}

// note keeps what the token service said to a token.
func (s *Session) note(token string, got aws.Credentials, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	switch {
	case err == nil:
		s.creds, s.failed, s.proven = got, nil, true
		s.renew = got.Expires.Add(-min(maxEarly, got.Expires.Sub(now)/4))
	case s.token != token: // there is another one
	case errors.Is(err, object.ErrDenied):
		s.failed, s.until = err, now.Add(afterDenial)
	default:
		s.failed, s.until = err, now.Add(afterNone)
	}
}

// current is the session; valid says that it has not ended, and fresh that it need not be renewed either.
func (s *Session) current(now time.Time) (c aws.Credentials, valid, fresh bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	valid = s.creds.HasKeys() && now.Before(s.creds.Expires)
	return s.creds, valid, valid && now.Before(s.renew)
}

func (s *Session) assume(ctx context.Context, token string) (c aws.Credentials, err error) {
	if token == "" {
		return c, &sessionError{fmt.Sprintf("assume %s: there is no token of a pod", s.cfg.RoleARN), object.ErrDenied}
	}
	out, err := s.api.AssumeRoleWithWebIdentity(ctx, &sts.AssumeRoleWithWebIdentityInput{
		RoleArn: &s.cfg.RoleARN, RoleSessionName: &s.cfg.Name, WebIdentityToken: &token,
	})
	if err != nil {
		return c, s.wrap(err)
	}
	k := out.Credentials
	if k == nil || aws.ToString(k.AccessKeyId) == "" || aws.ToString(k.SecretAccessKey) == "" || !aws.ToTime(k.Expiration).After(time.Now()) {
		return c, &sessionError{fmt.Sprintf("assume %s: %s gave a session without keys, or one that has ended", s.cfg.RoleARN, s.where), object.ErrUnavailable}
	}
	return aws.Credentials{AccessKeyID: *k.AccessKeyId, SecretAccessKey: *k.SecretAccessKey, SessionToken: aws.ToString(k.SessionToken),
		CanExpire: true, Expires: *k.Expiration, Source: "larder"}, nil
}

// sessionError says why there is no session; its text has no token in it. The store was not asked, so it
// has refused nobody: see [object.ErrExpired].
type sessionError struct {
	text string
	is   error
}

func (e *sessionError) Error() string { return e.text }
func (e *sessionError) Unwrap() []error {
	if e.is == object.ErrDenied {
		return []error{object.ErrDenied, object.ErrExpired}
	}
	return []error{e.is}
}

// wrap says what the token service answered: the code, and not its message, which may repeat the token.
func (s *Session) wrap(err error) error {
	var api smithy.APIError
	var resp *smithyhttp.ResponseError
	text, is, status := innermost(err).Error(), object.ErrUnavailable, 0
	if errors.As(err, &resp) {
		status = resp.HTTPStatusCode()
		text = fmt.Sprintf("HTTP %d", status)
	}
	if errors.As(err, &api) && status != 0 {
		text = fmt.Sprintf("%s (HTTP %d)", api.ErrorCode(), status)
	}
	switch {
	case errors.Is(err, object.ErrInvalid): // from the dialer
		is = object.ErrInvalid
	case status >= 400 && status < 500 && !inTrouble(status) && !strings.HasPrefix(text, "IDPCommunicationError"):
		is = object.ErrDenied
	case status >= 300 && status < 400:
		is, text = object.ErrInvalid, text+": it redirects, which is not followed"
	}
	return &sessionError{fmt.Sprintf("assume %s at %s: %s", s.cfg.RoleARN, s.where, text), is}
}

// unproven is the credential before a pod has brought a token that the token service takes.
type unproven struct{}

func (unproven) Retrieve(context.Context) (aws.Credentials, error) {
	return aws.Credentials{}, &sessionError{"no pod has brought a token yet", object.ErrDenied}
}

// principal is the role's; nobody's before it was proven that it may be assumed.
func (s *Session) principal(nodeKey []byte, proven bool, volume string) object.Principal {
	if !proven {
		return source.Unproven(nodeKey, volume)
	}
	return source.Role(nodeKey, s.cfg.Endpoint, s.cfg.RoleARN)
}
