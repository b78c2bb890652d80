package s3

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
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
	if ctx.Err() != nil {
		return fmt.Errorf("%s %q in %s: %w", kind, what, s.where, context.Cause(ctx))
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
}

const maxBackoff = 5 * time.Second

// delay before attempt n+2, counted from 0: anything up to a bound that doubles.
func (r retryer) delay(n int) time.Duration {
	bound := min(r.backoff<<min(n, 20), maxBackoff)
	return rand.N(bound) + 1
}

func (r retryer) wait(ctx context.Context, n int) error {
	t := time.NewTimer(r.delay(n))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// sdk is the retryer of single requests. Its attempts are bounded; the SDK's token bucket
// would fail the readers of one file because those of another were unlucky.
func (r retryer) sdk() aws.Retryer {
	return retry.NewStandard(func(o *retry.StandardOptions) {
		o.MaxAttempts = r.attempts
		o.RateLimiter = ratelimit.None
		o.Backoff = retry.BackoffDelayerFunc(func(n int, _ error) (time.Duration, error) { return r.delay(n - 1), nil })
		o.Retryables = append([]retry.IsErrorRetryable{retry.IsErrorRetryableFunc(refused)},
			append(o.Retryables, retry.IsErrorRetryableFunc(worthRetrying))...)
	})
}

// refused keeps the SDK from trying an address again that our dialer does not connect to.
func refused(err error) aws.Ternary {
	if errors.Is(err, object.ErrInvalid) {
		return aws.FalseTernary
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
	return aws.BoolTernary(status < 300 || status >= 500 && status != http.StatusNotImplemented ||
		status == http.StatusTooManyRequests || status == http.StatusRequestTimeout)
}
