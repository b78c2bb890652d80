package s3

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/ratelimit"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/aws/smithy-go"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

// codes maps S3's error codes to the decisions of callers, where the status does not.
var codes = map[string]error{
	"NoSuchKey":                          object.ErrNotFound,
	"NoSuchBucket":                       object.ErrNotFound,
	"PreconditionFailed":                 object.ErrChanged,
	"InvalidRange":                       object.ErrChanged, // it was within the size once
	"ExpiredToken":                       object.ErrDenied,  // these three are 400s
	"InvalidToken":                       object.ErrDenied,
	"TokenRefreshRequired":               object.ErrDenied,
	"InvalidObjectState":                 nil, // a 403, but about the archive that it lies in, not about us
	"InvalidBucketName":                  object.ErrInvalid,
	"AuthorizationHeaderMalformed":       object.ErrInvalid, // the region is another one
	"IllegalLocationConstraintException": object.ErrInvalid,
	"SlowDown":                           object.ErrUnavailable,
	"RequestTimeTooSkewed":               object.ErrUnavailable, // a 403, but about somebody's clock
}

// sentinel decides what an answer with that status and code means.
func sentinel(kind source.Kind, status int, code string) error {
	if err, ok := codes[code]; ok {
		return err
	}
	switch {
	case status == http.StatusNotFound:
		return object.ErrNotFound
	case status == http.StatusPreconditionFailed || status == http.StatusRequestedRangeNotSatisfiable:
		return object.ErrChanged
	case status == http.StatusUnauthorized || status == http.StatusForbidden:
		return object.ErrDenied
	case status == http.StatusBadRequest && kind == source.Head:
		return object.ErrDenied // no body tells why; the key was checked, so it is the token
	case status >= 300 && status < 400:
		return object.ErrInvalid // the bucket is elsewhere
	case status == 0 || status >= 500 || status == http.StatusTooManyRequests || status == http.StatusRequestTimeout:
		return object.ErrUnavailable
	}
	return nil
}

// wrap says what was asked of whom and what came back: the code, not the store's message,
// which may repeat what was sent.
func (s *Source) wrap(ctx context.Context, kind source.Kind, what string, err error) error {
	if cause := context.Cause(ctx); cause == errPatience {
		return fmt.Errorf("%s %q in %s: %w: no answer that can be used within %v%s",
			kind, what, s.where, object.ErrUnavailable, s.patience, s.retry.guard.Trouble())
	} else if cause != nil {
		return fmt.Errorf("%s %q in %s: %w", kind, what, s.where, cause)
	}
	var session *sessionError
	if errors.As(err, &session) {
		return fmt.Errorf("%s %q in %s: %w", kind, what, s.where, session)
	}
	var api smithy.APIError
	var resp *smithyhttp.ResponseError
	code, status := "", 0
	if errors.As(err, &api) {
		code = api.ErrorCode()
	}
	if errors.As(err, &resp) {
		status = resp.HTTPStatusCode()
	}
	is := sentinel(kind, status, code)
	if status >= 200 && status < 300 {
		is = object.ErrUnavailable // its body could not be understood or broke off
	}
	if errors.Is(err, object.ErrInvalid) { // from the dialer
		is = object.ErrInvalid
	}
	skew := skewOf(resp)
	if is == object.ErrDenied && tooSkewed(skew) {
		is = object.ErrUnavailable // nobody lost a right
	}
	var text string
	switch {
	case code != "" && status != 0:
		text = fmt.Sprintf("%s (HTTP %d)", code, status)
	case status != 0:
		text = fmt.Sprintf("HTTP %d", status)
	default:
		text = innermost(err).Error()
	}
	if region := regionOf(resp); is == object.ErrInvalid && region != "" {
		text += ": the bucket is in region " + region
	}
	if tooSkewed(skew) {
		text += fmt.Sprintf(": the store's clock is %v ahead of ours", skew.Truncate(time.Second))
	}
	if is == nil {
		return fmt.Errorf("%s %q in %s: %s", kind, what, s.where, text)
	}
	return fmt.Errorf("%s %q in %s: %w: %s", kind, what, s.where, is, text)
}

func regionOf(resp *smithyhttp.ResponseError) string {
	if resp == nil || resp.Response == nil {
		return ""
	}
	region := resp.Response.Header.Get("X-Amz-Bucket-Region")
	if !regionName.MatchString(region) {
		return ""
	}
	return region
}

// skewOf is by how much the store's clock is ahead of the time that a refused request was signed with; 0 if it was
// not refused, or that is not known.
func skewOf(resp *smithyhttp.ResponseError) time.Duration {
	if resp == nil || resp.Response == nil || resp.Response.Request == nil || resp.HTTPStatusCode() != http.StatusForbidden {
		return 0
	}
	signed, err := time.Parse("20060102T150405Z", resp.Response.Request.Header.Get("X-Amz-Date"))
	date, err2 := http.ParseTime(resp.Response.Header.Get("Date"))
	if err != nil || err2 != nil {
		return 0
	}
	return date.Sub(signed)
}

// tooSkewed is the SDK's own bound; stores refuse from 15 minutes on.
func tooSkewed(d time.Duration) bool { return d.Abs() > 4*time.Minute }

// innermost takes the SDK's wrapping off a network error.
func innermost(err error) error {
	var send *smithyhttp.RequestSendError
	if errors.As(err, &send) {
		return send.Err
	}
	var op *smithy.OperationError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

// retryer bounds and spaces attempts.
type retryer struct {
	attempts int
	backoff  time.Duration
	guard    *source.Guard
}

const (
	maxBackoff    = 5 * time.Second
	maxRetryAfter = 20 * time.Second
)

// delay before attempt n+2, counted from 0: anything up to a bound that doubles.
func (r retryer) delay(n int) time.Duration {
	bound := min(r.backoff<<min(n, 20), maxBackoff)
	return rand.N(bound) + 1
}

// wait is for who makes its attempts itself. What has brought something is no retry.
func (r retryer) wait(ctx context.Context, n int, retry bool) error {
	t := time.NewTimer(r.delay(n))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if !retry {
		return nil
	}
	return r.guard.Retry(ctx)
}

// sdk is the retryer of single requests. Its attempts are bounded, and they wait for the guard's budget; the SDK's own
// would fail the readers of one file because those of another were unlucky.
func (r retryer) sdk() aws.Retryer {
	return guarded{guard: r.guard, RetryerV2: retry.NewStandard(func(o *retry.StandardOptions) {
		o.MaxAttempts = r.attempts
		o.RateLimiter = ratelimit.None
		o.Backoff = retry.BackoffDelayerFunc(func(n int, err error) (time.Duration, error) {
			return r.delay(n-1) + retryAfter(err), nil
		})
		o.Retryables = append([]retry.IsErrorRetryable{retry.IsErrorRetryableFunc(decidedHere)},
			append(o.Retryables, retry.IsErrorRetryableFunc(worthRetrying))...)
	})}
}

// guarded waits for the guard before each retry.
type guarded struct {
	aws.RetryerV2
	guard *source.Guard
}

// GetRetryToken implements aws.Retryer.
func (g guarded) GetRetryToken(ctx context.Context, _ error) (func(error) error, error) {
	return func(error) error { return nil }, g.guard.Retry(ctx)
}

// retryAfter is for how long the store wants to be left alone.
func retryAfter(err error) time.Duration {
	var resp *smithyhttp.ResponseError
	if !errors.As(err, &resp) || resp.Response == nil {
		return 0
	}
	return retryAfterOf(resp.Response.Header)
}

func retryAfterOf(h http.Header) time.Duration {
	v := h.Get("Retry-After")
	if s, err := strconv.ParseUint(v, 10, 32); err == nil {
		return min(time.Duration(s)*time.Second, maxRetryAfter)
	}
	if at, err := http.ParseTime(v); err == nil {
		return min(max(0, time.Until(at)), maxRetryAfter)
	}
	return 0
}

// decidedHere goes before what the SDK thinks: an address that our dialer does not connect to, and a store that is
// left alone, are not tried again; a name that does not resolve, and a signature whose time was wrong, are.
func decidedHere(err error) aws.Ternary {
	var dns *net.DNSError
	var resp *smithyhttp.ResponseError
	switch {
	case errors.Is(err, object.ErrInvalid), errors.Is(err, object.ErrUnavailable), errors.Is(err, object.ErrDenied):
		return aws.FalseTernary
	case errors.As(err, &dns):
		return aws.TrueTernary
	case errors.As(err, &resp) && tooSkewed(skewOf(resp)):
		return aws.TrueTernary
	}
	return aws.UnknownTernary
}

// worthRetrying adds what the SDK lets pass: broken bodies of lists and unlisted statuses.
func worthRetrying(err error) aws.Ternary {
	var resp *smithyhttp.ResponseError
	if !errors.As(err, &resp) {
		return aws.UnknownTernary
	}
	status := resp.HTTPStatusCode()
	return aws.BoolTernary(status < 300 || inTrouble(status))
}

// inTrouble reports whether a status says that the store cannot answer now.
func inTrouble(status int) bool {
	return status >= 500 && status != http.StatusNotImplemented ||
		status == http.StatusTooManyRequests || status == http.StatusRequestTimeout
}
