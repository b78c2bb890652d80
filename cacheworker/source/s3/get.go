package s3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

// Get reads a range of one version. ctx bounds the reader too.
func (s *Source) Get(ctx context.Context, obj object.Object, off, n int64) (io.ReadCloser, error) {
	if err := source.CheckKey(obj.Key); err != nil {
		return nil, err
	}
	if err := source.CheckRange(obj, off, n); err != nil {
		return nil, err
	}
	b := &body{ctx: ctx, src: s, obj: obj, off: off, left: n}
	err := b.open()
	for errors.Is(err, errUnusable) {
		b.failed = err
		err = b.resume()
	}
	if err != nil {
		return nil, err
	}
	return b, nil
}

// errUnusable is an answer that is not what was asked for, which another attempt may be.
var errUnusable = errors.New("the answer cannot be used")

// body is a range that is being read.
type body struct {
	ctx  context.Context // of Get: a reader cannot be handed one with each Read
	src  *Source
	obj  object.Object
	off  int64
	left int64

	rc     io.ReadCloser      // the answer; nil when it broke off
	cancel context.CancelFunc // of its request
	failed error              // why it broke off
	came   int                // bytes since it did
	broken int                // break-offs since there was progress
	end    error              // what every further Read returns
}

// progress is what a body has to bring, or all that is left, to be worth another attempt after those that were allowed.
const progress = 64 << 10

func (b *body) Read(p []byte) (int, error) {
	for {
		if b.end != nil || b.left == 0 {
			return 0, b.ended()
		}
		if len(p) == 0 {
			return 0, nil
		}
		if err := context.Cause(b.ctx); err != nil { // what has come already must not hide it
			return 0, fmt.Errorf("get %q in %s: %w", b.obj.Key, b.src.where, err)
		}
		if b.rc == nil {
			err := b.resume()
			if errors.Is(err, errUnusable) {
				b.failed = err
				continue
			}
			if err != nil {
				b.end = err
				return 0, err
			}
		}
		n, err := b.rc.Read(p[:min(int64(len(p)), b.left)])
		b.off += int64(n)
		b.left -= int64(n)
		b.came += n
		if b.left == 0 || err != nil {
			b.stop()
			b.failed = err
		}
		if n > 0 {
			return n, nil
		}
	}
}

func (b *body) ended() error {
	if b.end != nil {
		return b.end
	}
	return io.EOF
}

// resume asks for the rest of a body that broke off.
func (b *body) resume() error {
	s := b.src
	if b.failed == io.EOF {
		b.failed = io.ErrUnexpectedEOF
	}
	further := b.came >= progress
	if further {
		b.broken = 0
	}
	b.came = 0
	b.broken++
	if b.broken >= s.retry.attempts {
		return fmt.Errorf("get %q in %s: %w: %d answers broke off or were of no use, the last at byte %d: %v",
			b.obj.Key, s.where, object.ErrUnavailable, b.broken, b.off, b.failed)
	}
	ctx, done := s.bounded(b.ctx)
	defer done()
	if err := s.retry.wait(ctx, b.broken-1, !further); err != nil {
		return s.wrap(ctx, source.Get, b.obj.Key, err)
	}
	return b.open()
}

// stop ends the answer.
func (b *body) stop() {
	b.rc.Close()
	b.cancel()
	b.rc = nil
}

// open asks for the rest of the range and checks that the answer is just that.
func (b *body) open() error {
	s := b.src
	in := &s3.GetObjectInput{
		Bucket: &s.bucket, Key: &b.obj.Key,
		Range: aws.String(fmt.Sprintf("bytes=%d-%d", b.off, b.off+b.left-1)),
	}
	if err := condition(in, b.obj.Version); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(b.ctx) // of the body too, which patience does not bound
	late := time.AfterFunc(s.patience, func() { cancel(errPatience) })
	out, err := s.api.GetObject(ctx, in)
	if !late.Stop() && err == nil {
		out.Body.Close()
		err = context.Cause(ctx)
	}
	if err != nil {
		err = s.wrap(ctx, source.Get, b.obj.Key, err)
		cancel(nil)
		return err
	}
	b.rc, b.cancel = out.Body, func() { cancel(nil) }
	err = b.check(out)
	if errors.Is(err, object.ErrChanged) { // it was asked not to answer then: perhaps that is not so
		if now := s.confirm(b.ctx, b.obj); now == nil {
			err = b.unusable("%v", err)
		} else {
			err = now
		}
	} else if err == nil && young(out) {
		err = s.confirm(b.ctx, b.obj)
	}
	if err != nil {
		b.stop()
	}
	return err
}

// condition makes the store refuse to answer with another version.
func condition(in *s3.GetObjectInput, version string) error {
	seconds, ok := strings.CutPrefix(version, mtimePrefix)
	if !ok {
		in.IfMatch = aws.String(`"` + version + `"`)
		return nil
	}
	at, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil {
		return fmt.Errorf("%w: version %q", object.ErrInvalid, version)
	}
	// Last-Modified has lost a fraction of a second, which some stores compare; check is exact.
	in.IfUnmodifiedSince = aws.Time(time.Unix(at+1, 0).UTC())
	return nil
}

// check compares an answer with what was asked for.
func (b *body) check(out *s3.GetObjectOutput) error {
	if got := version(aws.ToString(out.ETag), aws.ToTime(out.LastModified)); got != b.obj.Version {
		return b.changed("its version is %q, not %q", got, b.obj.Version)
	}
	if out.ContentRange == nil {
		return b.checkWhole(out)
	}
	var first, last, size int64
	if _, err := fmt.Sscanf(*out.ContentRange, "bytes %d-%d/%d", &first, &last, &size); err != nil {
		return b.unusable("its range is %q", *out.ContentRange)
	}
	if size != b.obj.Size {
		return b.changed("its size is %d, not %d", size, b.obj.Size)
	}
	if first != b.off || last != b.off+b.left-1 {
		return b.unusable("it has the bytes %d-%d, not %d-%d", first, last, b.off, b.off+b.left-1)
	}
	return nil
}

// checkWhole is for a store that answers with the whole object.
func (b *body) checkWhole(out *s3.GetObjectOutput) error {
	if out.ContentLength == nil || *out.ContentLength != b.obj.Size {
		return b.changed("its size is %d, not %d", aws.ToInt64(out.ContentLength), b.obj.Size)
	}
	if b.off != 0 {
		return b.unusable("the store does not answer with ranges")
	}
	return nil
}

func (b *body) changed(format string, args ...any) error {
	return fmt.Errorf("get %q in %s: %w: %s", b.obj.Key, b.src.where, object.ErrChanged, fmt.Sprintf(format, args...))
}

func (b *body) unusable(format string, args ...any) error {
	return fmt.Errorf("get %q in %s: %w: %w: %s", b.obj.Key, b.src.where, object.ErrUnavailable, errUnusable, fmt.Sprintf(format, args...))
}

func (b *body) Close() error {
	b.end = fmt.Errorf("read %q: %w", b.obj.Key, io.ErrClosedPipe)
	if b.rc == nil {
		return nil
	}
	defer b.cancel()
	err := b.rc.Close()
	b.rc = nil
	return err
}

// racePeriod is how long after a write a gateway may still answer a GET with the etag of
// one version and the bytes of the next.
const racePeriod = 5 * time.Second

// young reports whether what is served was written just now, by the store's own clock. A
// gateway over a file system (versitygw 1.8) reads the etag, then opens the file; a PUT
// between the two makes it serve new bytes, and their Last-Modified, under the old etag.
func young(out *s3.GetObjectOutput) bool {
	if out.LastModified == nil {
		return false
	}
	now, ok := awsmiddleware.GetServerTime(out.ResultMetadata)
	if !ok {
		now = time.Now()
	}
	return now.Sub(*out.LastModified) < racePeriod
}

// confirm asks for the etag once more. The bytes were bound to a version before we asked;
// if that was a later one than obj's, the store has it now and not obj's.
func (s *Source) confirm(ctx context.Context, obj object.Object) error {
	now, err := s.Head(ctx, obj.Key)
	if err != nil {
		return err
	}
	if now.Version != obj.Version || now.Size != obj.Size {
		return fmt.Errorf("get %q in %s: %w: now it is %q of %d bytes, not %q of %d",
			obj.Key, s.where, object.ErrChanged, now.Version, now.Size, obj.Version, obj.Size)
	}
	return nil
}
