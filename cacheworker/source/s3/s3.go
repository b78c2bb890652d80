// Package s3 reads an S3 bucket, of any maker, with one credential.
//
// A byte that Get yields belongs to the version that was asked for. The store is told so
// (If-Match), and its answer is not trusted: etag, size and range of it are compared, every
// resumed body again, and where the object is so young that the store itself may have mixed
// two versions up, the store is asked once more (see confirm).
package s3

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

// Config of a source.
type Config struct {
	Bucket    string
	Endpoint  string // http[s]://host[:port]; "" means AWS
	Region    string // "" means us-east-1
	PathStyle bool

	Credentials Credentials // zero is anonymous, or the worker's own where Ambient is set
	Ambient     bool        // find the credential as the AWS tools do: environment, files, metadata service
	NodeKey     []byte      // of the principal

	Session *Session // in place of both: a role's
	Proven  bool     // the session's principal is the role; else it is nobody
	Volume  string   // whose session it is

	RequestTimeout time.Duration // until the answer begins; 0 means 20s
	IdleTimeout    time.Duration // of waiting for a body's next 256 KiB; 0 means 15s
	Patience       time.Duration // of all attempts of a request, waits between them included; 0 means 60s
	Attempts       int           // of a request, and of a body without progress; 0 means 8
	Backoff        time.Duration // at most, before the first retry, then doubled up to 5s; 0 means 100ms

	Transport http.RoundTripper // shared by all sources of a process; nil means a NewTransport
	Observer  source.Observer   // nil means nobody
	Guard     *source.Guard     // shared by all sources of an endpoint; nil means its own
}

// Credentials as in a Secret.
type Credentials struct {
	AccessKeyID, SecretAccessKey, SessionToken string
}

// String keeps the secret out of what prints.
func (Credentials) String() string { return "credentials" }

// GoString keeps the secret out of what prints with %#v.
func (Credentials) GoString() string { return "credentials" }

// Source is one bucket read with one credential.
type Source struct {
	bucket    string
	where     string // for errors: bucket and endpoint
	store     object.Store
	principal object.Principal
	api       *s3.Client
	retry     retryer
	patience  time.Duration
	tokens    tokens
}

var _ source.Source = (*Source)(nil)

// New makes a source; it asks nobody anything.
func New(cfg Config) (*Source, error) {
	host, err := cfg.validate()
	if err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	creds, principal, err := cfg.credential()
	if err != nil {
		return nil, err
	}
	s := &Source{
		bucket:    cfg.Bucket,
		where:     fmt.Sprintf("bucket %s at %s", cfg.Bucket, host),
		store:     object.Store("s3://" + host + "/" + cfg.Bucket),
		principal: principal,
		retry:     retryer{attempts: cfg.Attempts, backoff: cfg.Backoff, guard: cfg.Guard},
		patience:  cfg.Patience,
	}
	s.api = s3.New(s3.Options{
		Region:       cfg.Region,
		UsePathStyle: cfg.PathStyle,
		Credentials:  creds,
		HTTPClient:   &client{next: cfg.Transport, request: cfg.RequestTimeout, idle: cfg.IdleTimeout, observer: cfg.Observer, guard: cfg.Guard},
		Retryer:      s.retry.sdk(),
		// Checksums cover whole objects and we read ranges; what arrives is summed by the cache.
		RequestChecksumCalculation:                aws.RequestChecksumCalculationWhenRequired,
		ResponseChecksumValidation:                aws.ResponseChecksumValidationWhenRequired,
		DisableLogOutputChecksumValidationSkipped: true,
	}, func(o *s3.Options) {
		if cfg.Endpoint != "" {
			o.BaseEndpoint = aws.String(strings.TrimSuffix(cfg.Endpoint, "/"))
		}
	})
	return s, nil
}

func (c Config) withDefaults() Config {
	if c.Region == "" {
		c.Region = defaultRegion
	}
	if c.RequestTimeout == 0 {
		c.RequestTimeout = 20 * time.Second
	}
	if c.IdleTimeout == 0 {
		c.IdleTimeout = 15 * time.Second
	}
	if c.Patience == 0 {
		c.Patience = time.Minute
	}
	if c.Attempts == 0 {
		c.Attempts = 8
	}
	if c.Backoff == 0 {
		c.Backoff = 100 * time.Millisecond
	}
	if c.Transport == nil {
		c.Transport = NewTransport(TransportConfig{})
	}
	if c.Observer == nil {
		c.Observer = source.Unobserved{}
	}
	if c.Guard == nil {
		c.Guard = source.NewGuard(source.GuardConfig{})
	}
	return c
}

const defaultRegion = "us-east-1"

var (
	bucketName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{1,254}$`)
	regionName = regexp.MustCompile(`^[A-Za-z0-9-]*$`)
)

// validate names all mistakes at once, and otherwise returns the store's host[:port].
func (c Config) validate() (host string, err error) {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: "+format, append([]any{object.ErrInvalid}, args...)...))
	}
	if !bucketName.MatchString(c.Bucket) {
		bad("bucket %q: want letters, digits, dots and hyphens", c.Bucket)
	}
	if !regionName.MatchString(c.Region) {
		bad("region %q: want one like us-east-1", c.Region)
	}
	if len(c.NodeKey) == 0 {
		bad("no node key")
	}
	if (c.Credentials.AccessKeyID == "") != (c.Credentials.SecretAccessKey == "") {
		bad("an access key id and a secret access key go together; only one was given")
	}
	if (c.Ambient || c.Session != nil) && c.Credentials != (Credentials{}) {
		bad("credentials were given although the worker's own, or a role's, were asked for")
	}
	host, err = EndpointHost(c.Endpoint, c.Region)
	if err != nil {
		errs = append(errs, err)
	}
	return host, errors.Join(errs...)
}

// EndpointHost is the part of a store's identity that says where it is; the region counts where the
// endpoint is "".
func EndpointHost(endpoint, region string) (string, error) {
	if endpoint == "" {
		if region == "" {
			region = defaultRegion
		}
		return "s3." + region + ".amazonaws.com", nil
	}
	u, err := url.Parse(endpoint)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.User != nil ||
		strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
		return "", fmt.Errorf("%w: endpoint: want http://host[:port] or https://host[:port]", object.ErrInvalid) // not shown: it may hold a password
	}
	host := strings.ToLower(u.Host)
	if port := u.Port(); port == "80" && u.Scheme == "http" || port == "443" && u.Scheme == "https" {
		host = strings.TrimSuffix(host, ":"+port)
	}
	return host, nil
}

func (c Config) credential() (aws.CredentialsProvider, object.Principal, error) {
	k := c.Credentials
	switch {
	case c.Session != nil && !c.Proven:
		return unproven{}, c.Session.principal(c.NodeKey, false, c.Volume), nil
	case c.Session != nil:
		return c.Session, c.Session.principal(c.NodeKey, true, c.Volume), nil
	case c.Ambient:
		// Only the credential is taken from the environment, never an endpoint or a region.
		found, err := config.LoadDefaultConfig(context.Background(), config.WithRegion(c.Region))
		if err != nil {
			return nil, object.Principal{}, fmt.Errorf("find the worker's own credential: %w", err)
		}
		return found.Credentials, source.Ambient(c.NodeKey), nil
	case k == Credentials{}:
		return aws.AnonymousCredentials{}, source.PrincipalOf(c.NodeKey, "", "", ""), nil
	}
	static := credentials.NewStaticCredentialsProvider(k.AccessKeyID, k.SecretAccessKey, k.SessionToken)
	return static, source.PrincipalOf(c.NodeKey, k.AccessKeyID, k.SecretAccessKey, k.SessionToken), nil
}

// Store is the bucket at its endpoint.
func (s *Source) Store() object.Store { return s.store }

// Principal is whose credential it is.
func (s *Source) Principal() object.Principal { return s.principal }

// errPatience ends a call whose attempts have taken too long.
var errPatience = errors.New("patience is at an end")

// bounded gives a call, with all its attempts, the time of one's patience.
func (s *Source) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, s.patience, errPatience)
}

// maxKey is S3's limit. A longer key is not asked for: a HEAD's refusal has no body that
// would tell it from an expired token.
const maxKey = 1024

// Head asks the store about one key.
func (s *Source) Head(ctx context.Context, key string) (object.Object, error) {
	if err := source.CheckKey(key); err != nil {
		return object.Object{}, err
	}
	if len(key) > maxKey {
		return object.Object{}, fmt.Errorf("head %s in %s: %w: longer than %d bytes", key, s.where, object.ErrNotFound, maxKey)
	}
	ctx, done := s.bounded(ctx)
	defer done()
	out, err := s.api.HeadObject(ctx, &s3.HeadObjectInput{Bucket: &s.bucket, Key: &key})
	if err != nil {
		return object.Object{}, s.wrap(ctx, source.Head, key, err)
	}
	if out.ContentLength == nil || out.ETag == nil && out.LastModified == nil {
		return object.Object{}, fmt.Errorf("head %s in %s: %w: the answer has no length or no version", key, s.where, object.ErrUnavailable)
	}
	return s.object(key, aws.ToString(out.ETag), aws.ToTime(out.LastModified), *out.ContentLength), nil
}

// object is one version of key. Times are cut to seconds, because HTTP has no finer ones and
// a LIST has: one object would get two versions.
func (s *Source) object(key, etag string, modified time.Time, size int64) object.Object {
	o := object.Object{Store: s.store, Key: key, Version: version(etag, modified), Size: size}
	if !modified.IsZero() {
		o.ModTime = modified.UTC().Truncate(time.Second)
	}
	return o
}

const mtimePrefix = "mtime:"

// version is the etag, or Last-Modified where there is none that If-Match could compare.
func version(etag string, modified time.Time) string {
	e := strings.Trim(etag, `"`)
	if e != "" && !strings.HasPrefix(e, "W/") {
		return e
	}
	if modified.IsZero() {
		return ""
	}
	return mtimePrefix + strconv.FormatInt(modified.Unix(), 10)
}
