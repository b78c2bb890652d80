package s3

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/larderfs/larder/cacheworker/source"
	"github.com/larderfs/larder/sanity/s3test"
)

// answering is an HTTP client whose every answer is this body.
type answering func() io.Reader

func (a answering) Do(req *http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(a()), Request: req}, nil
}

// ask lists with the SDK, and with l for its answer unless that is nil.
func ask(ctx context.Context, body func() io.Reader, l *listing) (*s3.ListObjectsV2Output, error) {
	c := s3.New(s3.Options{Region: "us-east-1", HTTPClient: answering(body), Credentials: aws.AnonymousCredentials{}, Retryer: aws.NopRetryer{}})
	var with []func(*s3.Options)
	if l != nil {
		with = append(with, l.answer)
	}
	return c.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: aws.String("b")}, with...)
}

// sdk is what the SDK makes of a body.
func sdk(t testing.TB, body string) (*listing, error) {
	out, err := ask(t.Context(), func() io.Reader { return strings.NewReader(body) }, nil)
	if err != nil {
		return nil, err
	}
	l := &listing{}
	l.take(out)
	return l, nil
}

const anAnswer = `<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name><Prefix>a%2F</Prefix><StartAfter></StartAfter>
  <MaxKeys>1000</MaxKeys><KeyCount>3</KeyCount><Delimiter>%2F</Delimiter><EncodingType>url</EncodingType><IsTruncated>true</IsTruncated>
  <NextContinuationToken>1+&lt;/w==</NextContinuationToken>
  <Contents><Key>a%2Fb+c%25%0A%C3%A9</Key><LastModified>2024-02-29T12:34:56.789Z</LastModified><ETag>&quot;0123&quot;</ETag>
    <ChecksumAlgorithm>CRC32</ChecksumAlgorithm><Size>4096</Size><Owner><ID>me</ID><DisplayName/></Owner><StorageClass>STANDARD</StorageClass></Contents>
  <Contents><Key>é&amp;&apos;&#x1F600;&#10;</Key><LastModified>2024-02-29T12:34:56Z</LastModified><ETag>&#34;4-5&#34;</ETag><Size>0</Size></Contents>
  <Contents><Key>no more is known</Key><ETag/></Contents>
  <CommonPrefixes><Prefix>a%2Fd%2F</Prefix></CommonPrefixes><CommonPrefixes><Prefix>a/e/</Prefix></CommonPrefixes>
</ListBucketResult>
`

// variants are answers made from one, each with what it replaces. understood says that the SDK's decoder is not needed.
var variants = []struct {
	name, old, new string
	understood     bool
}{
	{"as it is", "", "", true},
	{"no declaration", `<?xml version="1.0" encoding="UTF-8"?>`, "", true},
	{"not encoded", "<EncodingType>url</EncodingType>", "", true},
	{"the last one", "<IsTruncated>true</IsTruncated>", "<IsTruncated>false</IsTruncated>", true},
	{"an element of the maker's", "<Size>4096</Size>", `<Size>4096</Size><Meta a:b="c d"><X><Y>1</Y></X></Meta>`, true},
	{"twice the same", "<Size>4096</Size>", "<Size>4096</Size><Size>5</Size><ETag></ETag>", true},
	{"in one line", "\n", "", true},
	{"an empty list", anAnswer[strings.Index(anAnswer, "<Name>"):strings.Index(anAnswer, "</ListBucketResult>")], "", true},
	{"another declaration", `encoding="UTF-8"`, "", false},
	{"a comment", "<Size>4096</Size>", "<!-- small --><Size>4096</Size>", false},
	{"a CDATA section", "<Key>a%2F", "<Key><![CDATA[a]]>%2F", false},
	{"a carriage return", "no more", "no\rmore", false},
	{"a prefix", "<Size>4096</Size>", `<x:Size xmlns:x="y">4096</x:Size>`, false},
	{"another case", "<Size>4096</Size>", "<size>4096</size>", false},
	{"no number", "<Size>4096</Size>", "<Size>many</Size>", false},
	{"no size", "<Size>4096</Size>", "<Size/>", false},
	{"no time", "2024-02-29T12:34:56Z", "today", false},
	{"no such character", "&#10;", "&#1;", false},
	{"an unknown reference", "&apos;", "&nbsp;", false},
	{"bytes that are no text", "é", "\xe9", false},
	{"a wrong end", "</ETag><Size>0", "</Etag><Size>0", false},
	{"no end", "</ListBucketResult>", "", false},
	{"an error", anAnswer, "<Error><Code>SlowDown</Code></Error>", false},
	{"nothing", anAnswer, "", false},
}

func TestAnAnswerIsReadAsTheSDKReadsIt(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			body := strings.ReplaceAll(anAnswer, v.old, v.new)
			if v.old == "" {
				body = anAnswer
			}
			var ours listing
			if got := ours.parse([]byte(body)); got != v.understood {
				t.Errorf("understood: %t", got)
			}
			want, wantErr := sdk(t, body)
			var got listing
			out, err := ask(t.Context(), func() io.Reader { return strings.NewReader(body) }, &got)
			if err == nil && !got.read {
				got.take(out)
			}
			if (err == nil) != (wantErr == nil) || err != nil && err.Error() != wantErr.Error() {
				t.Fatalf("%v; want %v", err, wantErr)
			}
			if err == nil && !same(&got, want) {
				t.Errorf("%+v\nwant %+v", got, *want)
			}
		})
	}
}

// What stands in a real answer is understood, or nothing is gained.
func TestARealAnswerNeedsNoSDK(t *testing.T) {
	srv := s3test.Start(t)
	put(t, srv, "d/a b+c&é", []byte("x"))
	put(t, srv, "d/e/f", []byte("x"))
	l, err := open(t, srv, nil).list(t.Context(), source.ListInput{Prefix: "d/"}, "", "")
	if err != nil || !l.read || len(l.files) != 1 || l.files[0].key != "d/a b+c&é" || l.files[0].size != 1 || !slices.Equal(l.folders, []string{"d/e/"}) {
		t.Errorf("%+v, %v", l, err)
	}
}

// What breaks off is an error, as it is to the SDK, and no shorter list.
func TestABrokenAnswerIsNoShortList(t *testing.T) {
	broken := errors.New("the connection is gone")
	for _, n := range []int{0, 1, len(anAnswer) / 2, len(anAnswer) - 2, len(anAnswer)} {
		body := func() io.Reader { return io.MultiReader(strings.NewReader(anAnswer[:n]), failing{broken}) }
		_, want := ask(t.Context(), body, nil)
		_, err := ask(t.Context(), body, new(listing))
		if (err == nil) != (want == nil) || n < len(anAnswer)-2 && !errors.Is(err, broken) {
			t.Errorf("%d bytes of %d: %v; want %v", n, len(anAnswer), err, want)
		}
	}
}

func same(a, b *listing) bool {
	x, y := *a, *b
	x.read, y.read = false, false
	return reflect.DeepEqual(x, y)
}

// FuzzListing: what is understood is XML, and if the SDK understands it, it says the same to it.
func FuzzListing(f *testing.F) {
	for _, v := range variants {
		f.Add([]byte(strings.ReplaceAll(anAnswer, v.old, v.new)))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var l listing
		if !l.parse(body) {
			return
		}
		if err := wellFormed(body); err != nil {
			t.Fatalf("%q was read: %v", body, err)
		}
		if want, err := sdk(t, string(body)); err == nil && !same(&l, want) {
			t.Fatalf("%q: %+v; the SDK reads %+v", body, l, *want)
		}
	})
}

// wellFormed reads a document to the end of its root element.
func wellFormed(body []byte) error {
	d := xml.NewDecoder(bytes.NewReader(body))
	for depth := 0; ; {
		tok, err := d.Token()
		if err != nil {
			return err
		}
		switch tok.(type) {
		case xml.StartElement:
			depth++
		case xml.EndElement:
			if depth--; depth == 0 {
				return nil
			}
		}
	}
}

// BenchmarkListing asks what our own reader of a page of 1000 objects saves.
func BenchmarkListing(b *testing.B) {
	head, tail := anAnswer[:strings.Index(anAnswer, "<Contents>")], "</ListBucketResult>"
	var page strings.Builder
	page.WriteString(head)
	for i := range 1000 {
		fmt.Fprintf(&page, "<Contents><ETag>&#34;d41d8cd98f00b204e9800998ecf8427e&#34;</ETag><Key>list-100x1000/d000/part-%06d</Key>"+
			"<LastModified>2024-02-29T12:34:56.789Z</LastModified><Size>100</Size><StorageClass>STANDARD</StorageClass>"+
			"<ChecksumAlgorithm>CRC64NVME</ChecksumAlgorithm><ChecksumType>FULL_OBJECT</ChecksumType></Contents>", i)
	}
	page.WriteString(tail)
	body := page.String()
	for name, l := range map[string]*listing{"Ours": {}, "SDK": nil} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := ask(b.Context(), func() io.Reader { return strings.NewReader(body) }, l); err != nil {
					b.Fatal(err)
				}
				if l != nil && !l.read {
					b.Fatal("it was not understood")
				}
			}
		})
	}
}
