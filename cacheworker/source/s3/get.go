package s3

import (
	"context"
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
	if err := b.open(); err != nil {
		return nil, err
	}
	return b, nil
}

// body is a range that is being read.
type body struct {
	ctx  context.Context // of Get: a reader cannot be handed one with each Read
	src  *Source
	obj  object.Object
	off  int64
	left int64

	rc     io.ReadCloser // the answer; nil when it broke off
	failed error         // why it did
	broken int           // break-offs since the last byte
	end    error         // what every further Read returns
}

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
			if err := b.resume(); err != nil {
				b.end = err
				return 0, err
			}
		}
		n, err := b.rc.Read(p[:min(int64(len(p)), b.left)])
		b.off += int64(n)
		b.left -= int64(n)
		if b.left == 0 || err != nil {
			b.rc.Close()
			b.rc, b.failed = nil, err
		}
		if n > 0 {
			b.broken = 0
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
	b.broken++
	if b.broken >= s.retry.attempts {
		return fmt.Errorf("get %q in %s: %w: the body broke off %d times at byte %d: %v",
			b.obj.Key, s.where, object.ErrUnavailable, b.broken, b.off, b.failed)
	}
	if err := s.retry.wait(b.ctx, b.broken-1); err != nil {
		return fmt.Errorf("get %q in %s: %w", b.obj.Key, s.where, err)
	}
	return b.open()
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
	out, err := s.api.GetObject(b.ctx, in)
	if err != nil {
		return s.wrap(b.ctx, source.Get, b.obj.Key, err)
	}
	err = b.check(out)
	if err == nil && young(out) {
		err = s.confirm(b.ctx, b.obj)
	}
	if err != nil {
		out.Body.Close()
		return err
	}
	b.rc = out.Body
	return nil
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
	if got := version(out.ETag, out.LastModified); got != b.obj.Version {
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
	return fmt.Errorf("get %q in %s: %w: the answer cannot be used: %s", b.obj.Key, b.src.where, object.ErrUnavailable, fmt.Sprintf(format, args...))
}

func (b *body) Close() error {
	b.end = fmt.Errorf("read %q: %w", b.obj.Key, io.ErrClosedPipe)
	if b.rc == nil {
		return nil
	}
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
	if now.Version != obj.Version {
		return fmt.Errorf("get %q in %s: %w: its version is now %q, not %q", obj.Key, s.where, object.ErrChanged, now.Version, obj.Version)
	}
	return nil
}
