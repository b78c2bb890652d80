package s3

import (
	"bytes"
	"strconv"
	"unicode/utf8"
)

// xmlReader reads the part of XML that stores write: elements with text or elements in them. Whatever else there is makes it
// bad, and then it finds nothing any more.
type xmlReader struct {
	b     []byte
	at    int
	bad   bool
	empty bool // the element whose tag was read last is closed by that tag

	scratch []byte // a text with references in it
}

// plain reports whether all are characters that XML allows, without what it treats specially: a carriage return, and
// the end of a CDATA section.
func plain(b []byte) bool {
	ascii := true
	for _, c := range b {
		if c < ' ' && c != '\n' && c != '\t' {
			return false
		}
		ascii = ascii && c < utf8.RuneSelf
	}
	if !ascii && (!utf8.Valid(b) || bytes.Contains(b, []byte("\uFFFE")) || bytes.Contains(b, []byte("\uFFFF"))) {
		return false
	}
	return !bytes.Contains(b, []byte("]]>"))
}

const declaration = `<?xml version="1.0" encoding="UTF-8"?>`

// root reads what stands before the root element, and its tag.
func (x *xmlReader) root(name string) {
	if n := len(declaration); len(x.b) >= n && bytes.EqualFold(x.b[:n], []byte(declaration)) {
		x.at = n
	}
	if x.child("") != name {
		x.bad = true
	}
}

// child reads the next tag. It returns the name of the element that begins, whose content is to be read next, or "" where
// parent ends.
func (x *xmlReader) child(parent string) string {
	switch {
	case x.bad:
		return ""
	case x.empty:
		x.empty = false
		return ""
	}
	x.space()
	if !x.skipByte('<') {
		return ""
	}
	if x.peek() == '/' {
		x.at++
		x.end(parent)
		return ""
	}
	name := x.name()
	for x.space() && x.peek() != '/' && x.peek() != '>' && !x.bad {
		x.attribute()
	}
	if x.peek() == '/' {
		x.at++
		x.empty = true
	}
	if !x.skipByte('>') {
		return ""
	}
	return known(name)
}

// end reads the end of a closing tag.
func (x *xmlReader) end(name string) {
	if string(x.name()) != name || name == "" {
		x.bad = true
	}
	x.space()
	x.skipByte('>')
}

// text is the content of the element that began last, which may hold nothing else. It is valid until the next one.
func (x *xmlReader) text(name string) []byte {
	if x.bad || x.empty {
		x.empty = false
		return nil
	}
	n := bytes.IndexByte(x.b[x.at:], '<')
	if n < 0 {
		x.bad = true
		return nil
	}
	t := x.b[x.at : x.at+n]
	x.at += n + 1
	x.skipByte('/')
	x.end(name)
	if bytes.IndexByte(t, '&') >= 0 {
		t = x.unescape(t)
	}
	if x.bad {
		return nil
	}
	return t
}

// skip reads an element that means nothing.
func (x *xmlReader) skip(name string, depth int) {
	if depth == 0 {
		x.bad = true
	}
	if n := bytes.IndexByte(x.b[x.at:], '<'); !x.empty && n >= 0 && x.at+n+1 < len(x.b) && x.b[x.at+n+1] == '/' {
		x.text(name)
		return
	}
	for c := x.child(name); c != ""; c = x.child(name) {
		x.skip(c, depth-1)
	}
}

func (x *xmlReader) unescape(t []byte) []byte {
	x.scratch = x.scratch[:0]
	for {
		n := bytes.IndexByte(t, '&')
		if n < 0 {
			x.scratch = append(x.scratch, t...)
			return x.scratch
		}
		x.scratch = append(x.scratch, t[:n]...)
		end := bytes.IndexByte(t, ';')
		if end < n {
			x.bad = true
			return nil
		}
		r := reference(string(t[n+1 : end]))
		if r == 0 {
			x.bad = true
			return nil
		}
		x.scratch = utf8.AppendRune(x.scratch, r)
		t = t[end+1:]
	}
}

// reference is the character that stands between "&" and ";", 0 if that is none.
func reference(s string) rune {
	switch s {
	case "lt":
		return '<'
	case "gt":
		return '>'
	case "amp":
		return '&'
	case "quot":
		return '"'
	case "apos":
		return '\''
	}
	if len(s) < 2 || s[0] != '#' {
		return 0
	}
	digits, base := s[1:], 10
	if s[1] == 'x' {
		digits, base = s[2:], 16
	}
	n, err := strconv.ParseUint(digits, base, 21)
	r := rune(n)
	if err != nil || !utf8.ValidRune(r) || r < ' ' && r != '\n' && r != '\t' && r != '\r' || r == 0xFFFE || r == 0xFFFF {
		return 0
	}
	return r
}

// attribute reads one, which means nothing.
func (x *xmlReader) attribute() {
	x.name()
	if x.peek() == ':' {
		x.at++
		x.name()
	}
	x.skipByte('=')
	if !x.skipByte('"') {
		return
	}
	n := bytes.IndexByte(x.b[x.at:], '"')
	if n < 0 || bytes.ContainsAny(x.b[x.at:x.at+n], "<&") {
		x.bad = true
		return
	}
	x.at += n + 1
}

// name reads one, without a prefix.
func (x *xmlReader) name() []byte {
	from := x.at
	for x.at < len(x.b) && isName(x.b[x.at], x.at > from) {
		x.at++
	}
	if x.at == from {
		x.bad = true
	}
	return x.b[from:x.at]
}

func isName(c byte, further bool) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '_' || further && c >= '0' && c <= '9'
}

// space passes over white space, and returns true.
func (x *xmlReader) space() bool {
	for x.at < len(x.b) && (x.b[x.at] == ' ' || x.b[x.at] == '\n' || x.b[x.at] == '\t') {
		x.at++
	}
	return true
}

// peek is the next byte, 0 at the end.
func (x *xmlReader) peek() byte {
	if x.at < len(x.b) {
		return x.b[x.at]
	}
	return 0
}

// skipByte passes over c, and reports whether there it was.
func (x *xmlReader) skipByte(c byte) bool {
	if x.bad || x.peek() != c {
		x.bad = true
		return false
	}
	x.at++
	return true
}

// known makes a string of a name, mostly without an allocation.
func known(name []byte) string {
	for _, n := range [...]string{"Key", "LastModified", "ETag", "Size", "StorageClass", "Contents", "ChecksumAlgorithm", "ChecksumType"} {
		if n == string(name) {
			return n
		}
	}
	return string(name)
}
