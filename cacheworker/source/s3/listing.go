package s3

import (
	"bytes"
	"context"
	"io"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go/middleware"
	smithytime "github.com/aws/smithy-go/time"
	smithyhttp "github.com/aws/smithy-go/transport/http"
)

// listing is what a ListObjectsV2 answer says, as far as anybody here wants to know.
type listing struct {
	files     []listed
	folders   []string // common prefixes
	truncated bool
	next      string // token for what follows
	read      bool   // by [listing.parse]
}

// listed is one object. A field that the answer does not have is zero.
type listed struct {
	key, etag string
	size      int64
	modified  time.Time
}

// answer has a request read its answer into l: by [listing.parse], which takes a tenth of the time that the
// SDK's decoder takes, and where that does not understand it, by the SDK's.
func (l *listing) answer(o *s3.Options) {
	o.APIOptions = append(o.APIOptions, func(stack *middleware.Stack) error {
		ours := middleware.DeserializeMiddlewareFunc("LarderListing", l.deserialize)
		return stack.Deserialize.Insert(ours, "OperationDeserializer", middleware.After)
	})
}

// deserialize stands before the SDK's decoder, which takes an empty body for an empty answer.
func (l *listing) deserialize(ctx context.Context, in middleware.DeserializeInput, next middleware.DeserializeHandler) (
	middleware.DeserializeOutput, middleware.Metadata, error,
) {
	*l = listing{}
	out, meta, err := next.HandleDeserialize(ctx, in)
	resp, ok := out.RawResponse.(*smithyhttp.Response)
	if err != nil || !ok || resp.StatusCode < 200 || resp.StatusCode >= 300 {
		return out, meta, err
	}
	body := resp.Body
	b := bodies.Get().(*bytes.Buffer)
	defer bodies.Put(b)
	b.Reset()
	_, err = io.Copy(b, io.LimitReader(body, maxBody+1))
	if err == nil && b.Len() <= maxBody && l.parse(b.Bytes()) {
		resp.Body = readCloser{bytes.NewReader(nil), body}
		return out, meta, nil
	}
	*l = listing{}
	rest := io.Reader(body)
	if err != nil {
		rest = failing{err}
	}
	resp.Body = readCloser{io.MultiReader(bytes.NewReader(bytes.Clone(b.Bytes())), rest), body}
	return out, meta, nil
}

// maxBody is more than a thousand of the longest keys take, escaped in every way.
const maxBody = 16 << 20

var bodies = sync.Pool{New: func() any { return new(bytes.Buffer) }}

type readCloser struct {
	io.Reader
	io.Closer
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// take takes what the SDK has read.
func (l *listing) take(out *s3.ListObjectsV2Output) {
	*l = listing{truncated: aws.ToBool(out.IsTruncated), next: aws.ToString(out.NextContinuationToken)}
	for _, c := range out.Contents {
		l.files = append(l.files, listed{aws.ToString(c.Key), aws.ToString(c.ETag), aws.ToInt64(c.Size), aws.ToTime(c.LastModified)})
	}
	for _, c := range out.CommonPrefixes {
		l.folders = append(l.folders, aws.ToString(c.Prefix))
	}
	l.decode(out.EncodingType)
}

// decode undoes the encoding that was asked for, if the store says that it did it.
func (l *listing) decode(t types.EncodingType) {
	if t != types.EncodingTypeUrl {
		return
	}
	decode := func(s *string) {
		if plain, err := url.QueryUnescape(*s); err == nil {
			*s = plain
		}
	}
	for i := range l.files {
		decode(&l.files[i].key)
	}
	for i := range l.folders {
		decode(&l.folders[i])
	}
}

// parse reads an answer. It reports false of one that it does not understand: what is not well-formed, or more than
// elements, text and the usual references, or where a value has not the form it should have. Then l may hold some of it.
func (l *listing) parse(b []byte) bool {
	if !plain(b) {
		return false
	}
	p := pageReader{xmlReader: xmlReader{b: b}}
	p.root(page)
	for name := p.child(page); name != ""; name = p.child(page) {
		switch name {
		case "Contents":
			p.file()
		case "CommonPrefixes":
			p.folder()
		case "IsTruncated":
			p.truth(&l.truncated, name)
		case "NextContinuationToken":
			p.string(&l.next, name)
		case "EncodingType":
			p.string((*string)(&p.encoding), name)
		default:
			p.other(name)
		}
	}
	if p.bad {
		return false
	}
	l.collect(&p)
	l.decode(p.encoding)
	l.read = true
	return true
}

const page = "ListBucketResult"

// pageReader holds what was read of an answer. The texts of files and folders lie one behind the other: they are one
// allocation in the end, and not two for each of a thousand.
type pageReader struct {
	xmlReader
	files    []rawListed
	folders  []span
	texts    []byte
	encoding types.EncodingType
}

type span struct{ from, to int } // of pageReader.texts

type rawListed struct {
	key, etag span
	size      int64
	modified  time.Time
}

func (l *listing) collect(p *pageReader) {
	all := string(p.texts)
	l.files = slices.Grow(l.files, len(p.files))
	for _, f := range p.files {
		l.files = append(l.files, listed{all[f.key.from:f.key.to], all[f.etag.from:f.etag.to], f.size, f.modified})
	}
	for _, f := range p.folders {
		l.folders = append(l.folders, all[f.from:f.to])
	}
}

func (p *pageReader) file() {
	var f rawListed
	for name := p.child("Contents"); name != ""; name = p.child("Contents") {
		switch name {
		case "Key":
			p.keep(&f.key, name)
		case "ETag":
			p.keep(&f.etag, name)
		case "Size":
			p.number(&f.size, name)
		case "LastModified":
			p.time(&f.modified, name)
		default:
			p.other(name)
		}
	}
	p.files = append(p.files, f)
}

func (p *pageReader) folder() {
	var prefix span
	for name := p.child("CommonPrefixes"); name != ""; name = p.child("CommonPrefixes") {
		if name == "Prefix" {
			p.keep(&prefix, name)
		} else {
			p.other(name)
		}
	}
	p.folders = append(p.folders, prefix)
}

func (p *pageReader) keep(to *span, name string) {
	from := len(p.texts)
	p.texts = append(p.texts, p.text(name)...)
	*to = span{from, len(p.texts)}
}

func (p *pageReader) string(to *string, name string) { *to = string(p.text(name)) }

func (p *pageReader) truth(to *bool, name string) {
	t := string(p.text(name))
	*to = t == "true"
	p.bad = p.bad || !*to && t != "false"
}

func (p *pageReader) number(to *int64, name string) {
	n, err := strconv.ParseInt(string(p.text(name)), 10, 64)
	*to = n
	p.bad = p.bad || err != nil
}

func (p *pageReader) time(to *time.Time, name string) {
	at, err := smithytime.ParseDateTime(string(p.text(name)))
	*to = at
	p.bad = p.bad || err != nil
}

// other passes over an element of a name that means nothing here. To the SDK it may: that does not look at the case.
func (p *pageReader) other(name string) {
	for _, n := range [...]string{"Contents", "CommonPrefixes", "IsTruncated", "NextContinuationToken", "EncodingType",
		"Key", "ETag", "Size", "LastModified", "Prefix"} {
		if len(n) == len(name) && n != name && strings.EqualFold(n, name) {
			p.bad = true
		}
	}
	p.skip(name, 4)
}
