package s3

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

// maxPage is S3's limit of entries in one answer.
const maxPage = 1000

// List returns one page of a folder. Answers that hold nothing to show are passed over.
func (s *Source) List(ctx context.Context, in source.ListInput) (source.Page, error) {
	if err := source.CheckPrefix(in.Prefix); err != nil {
		return source.Page{}, err
	}
	after, token := in.After, s.tokens.take(in.Prefix, in.After)
	hidden := 0
	for {
		out, err := s.list(ctx, in, after, token)
		if err != nil {
			return source.Page{}, err
		}
		entries, h := s.entries(in.Prefix, after, out)
		hidden += h
		page := source.Page{Hidden: hidden}
		last := lastKey(in.Prefix, out)
		if in.Max > 0 && len(entries) > in.Max { // room was asked for the folder's own marker
			entries = entries[:in.Max]
			page.Next = entries[in.Max-1].behind()
		} else if out.truncated {
			page.Next = max(last, after)
		}
		if page.Next == "" || len(entries) > 0 {
			for _, e := range entries {
				e.addTo(&page)
			}
			if page.Next != "" && page.Next == last {
				s.tokens.put(in.Prefix, page.Next, out.next)
			}
			return page, nil
		}
		if page.Next == after && out.next == token {
			return source.Page{}, fmt.Errorf("list %q in %s: %w: the store's list does not go on behind %q", in.Prefix, s.where, object.ErrUnavailable, after)
		}
		after, token = page.Next, out.next
	}
}

// list asks for one page, by the token that the store gave for what follows after, or, if it
// does not know that one any more, by the name.
func (s *Source) list(ctx context.Context, in source.ListInput, after, token string) (*listing, error) {
	req := &s3.ListObjectsV2Input{
		Bucket: &s.bucket, Prefix: &in.Prefix, Delimiter: aws.String("/"),
		EncodingType: types.EncodingTypeUrl, // XML cannot express every key
	}
	if after != "" {
		req.StartAfter = aws.String(in.Prefix + after)
	}
	if in.Max > 0 && in.Max < maxPage {
		req.MaxKeys = aws.Int32(int32(in.Max))
		if after == "" && in.Prefix != "" {
			req.MaxKeys = aws.Int32(int32(in.Max + 1)) // the folder's own marker comes first
		}
	}
	if token != "" {
		req.ContinuationToken = &token
	}
	call, done := s.bounded(ctx)
	defer done()
	l := &listing{}
	out, err := s.api.ListObjectsV2(call, req, l.answer)
	if err == nil {
		if !l.read {
			l.take(out)
		}
		return l, nil
	}
	err = s.wrap(call, source.List, in.Prefix, err)
	if token != "" && ctx.Err() == nil && !decided(err) {
		return s.list(ctx, in, after, "")
	}
	return nil, err
}

// decided reports whether asking for the same page by its name would end in the same error.
func decided(err error) bool {
	return errors.Is(err, object.ErrDenied) || errors.Is(err, object.ErrNotFound) || errors.Is(err, object.ErrUnavailable)
}

// entry is a file or a folder of a page; key is relative to the prefix, with "/" behind a folder's.
type entry struct {
	key string
	obj object.Object // zero for a folder
}

func (e entry) behind() string {
	name, folder := strings.CutSuffix(e.key, "/")
	return source.AfterName(name, folder)
}

func (e entry) addTo(p *source.Page) {
	if name, folder := strings.CutSuffix(e.key, "/"); folder {
		p.Folders = append(p.Folders, name)
		return
	}
	p.Objects = append(p.Objects, e.obj)
}

// entries are what an answer holds behind after, in key order, and the number of keys that no path can express.
func (s *Source) entries(prefix, after string, l *listing) (all []entry, hidden int) {
	all = make([]entry, 0, len(l.files)+len(l.folders))
	for _, f := range l.files {
		if f.key == prefix && f.size == 0 {
			continue // the folder's own marker
		}
		name, folder, ok := source.Split(prefix, f.key)
		if !ok || folder || version(f.etag, f.modified) == "" {
			hidden++
			continue
		}
		all = append(all, entry{name, s.object(f.key, f.etag, f.modified, f.size)})
	}
	for _, key := range l.folders {
		name, folder, ok := source.Split(prefix, key)
		if !ok || !folder {
			hidden++
			continue
		}
		all = append(all, entry{key: name + "/"})
	}
	// A store may show the folder that after lies in once more.
	all = slices.DeleteFunc(all, func(e entry) bool { return e.key <= after })
	slices.SortFunc(all, func(a, b entry) int { return cmp.Compare(a.key, b.key) })
	return all, hidden
}

// lastKey is the After of what follows an answer: behind all keys of it, those that are
// hidden included.
func lastKey(prefix string, l *listing) string {
	last := ""
	for _, f := range l.files {
		last = max(last, strings.TrimPrefix(f.key, prefix))
	}
	for _, key := range l.folders {
		name := strings.TrimPrefix(key, prefix)
		last = max(last, source.AfterName(strings.TrimSuffix(name, "/"), true))
	}
	return last
}

// tokens remembers the continuation tokens of lists that are going on. Each is used once,
// and soon: some stores answer it from the state of the list's beginning.
type tokens struct {
	mu    sync.Mutex
	all   map[position]token
	order []position // oldest first; may name what was taken
}

type position struct{ prefix, after string }

type token struct {
	text string
	at   time.Time
}

const (
	maxTokens = 256
	tokenLife = 10 * time.Second
)

func (t *tokens) put(prefix, after, text string) {
	if text == "" {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.all == nil {
		t.all = map[position]token{}
	}
	p := position{prefix, after}
	t.all[p] = token{text, time.Now()}
	t.order = append(t.order, p)
	if len(t.order) > maxTokens {
		delete(t.all, t.order[0])
		t.order = t.order[1:]
	}
}

func (t *tokens) take(prefix, after string) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := position{prefix, after}
	k, ok := t.all[p]
	delete(t.all, p)
	if !ok || time.Since(k.at) > tokenLife {
		return ""
	}
	return k.text
}
