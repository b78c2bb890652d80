package metadata

import (
	"sort"
	"strings"
)

// pace is how far the pages of a folder reach: what lies between two names, as a number made of the bytes in
// which names differ. It only ever guesses: any name may be asked for, and the store says what
// comes behind.
type pace struct {
	from, to int    // the bytes of a name that make the number
	fixed    uint32 // those of them that are the same in all names and no digits, as bits
	digits   string // in their order
	step     uint64 // of a page
}

const (
	paceBytes  = 10 // of a number at most: 62 to this power is below 2 to the 64
	finePlaces = 5  // bytes that count from the first difference on
	paceNames  = 64 // of a page that are looked at
)

var alphabets = []string{
	"0123456789",
	"0123456789ABCDEF",
	"0123456789abcdef",
	"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ",
	"0123456789abcdefghijklmnopqrstuvwxyz",
	alphanumeric,
}

const alphanumeric = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

// paceOf measures pages that begin at a name, from the last of them. The zero pace knows nothing.
func paceOf(first string, pages int, page []slot, prefixLen int) pace {
	if len(page) < 2 || pages < 1 {
		return pace{}
	}
	last := page[len(page)-1].key[prefixLen:]
	i := 0
	for i < len(first) && i < len(last) && first[i] == last[i] {
		i++
	}
	p := pace{from: i, to: min(i+finePlaces, len(last))}
	varies := p.alphabet(page, prefixLen)
	for p.from > 0 && p.to-p.from < paceBytes && (p.digit(last[p.from-1]) || strings.IndexByte(alphanumeric, last[p.from-1]) < 0) {
		p.from--
	}
	for at := p.from; at < p.to; at++ {
		if !p.digit(last[at]) && !strings.Contains(varies, string(rune(at))) {
			p.fixed |= 1 << (at - p.from)
		}
	}
	if a, b := p.number(first), p.number(last); p.digits != "" && a < b {
		p.step = max(1, (b-a)/uint64(pages))
	}
	return p
}

// alphabet sets the digits: the fewest that the page's names need where they differ. It returns the places
// where they do.
func (p *pace) alphabet(page []slot, prefixLen int) (varies string) {
	seen := ""
	for at := p.from; at < p.to; at++ {
		here := ""
		for i := 0; i < len(page); i += max(1, len(page)/paceNames) {
			name := page[i].key[prefixLen:]
			if at < len(name) && strings.IndexByte(here, name[at]) < 0 {
				here += name[at : at+1]
			}
		}
		if len(here) > 1 || at == p.from {
			seen += here
			varies += string(rune(at))
		}
	}
	for _, a := range alphabets {
		if p.digits = a; !strings.ContainsFunc(seen, func(c rune) bool { return strings.ContainsRune(alphanumeric, c) && !strings.ContainsRune(a, c) }) {
			break
		}
	}
	if !strings.ContainsAny(seen, alphanumeric) {
		p.digits = ""
	}
	return varies
}

func (p pace) digit(c byte) bool { return strings.IndexByte(p.digits, c) >= 0 }

// number is what the bytes of a name mean. What is no digit is the one before which it sorts; what is missing is zero.
func (p pace) number(name string) (n uint64) {
	for i := p.from; i < p.to; i++ {
		if p.fixed>>(i-p.from)&1 == 1 {
			continue
		}
		d := 0
		if i < len(name) {
			d = min(len(p.digits)-1, sort.Search(len(p.digits), func(k int) bool { return p.digits[k] >= name[i] }))
		}
		n = n*uint64(len(p.digits)) + uint64(d)
	}
	return n
}

// beyond guesses the name that lies so many pages behind another; false if there can be none.
func (p pace) beyond(name string, pages int) (string, bool) {
	if p.step == 0 || len(name) < p.from {
		return "", false
	}
	out := []byte(name)[:min(p.to, len(name))]
	for len(out) < p.to {
		out = append(out, p.digits[0])
	}
	base, limit := uint64(len(p.digits)), uint64(1)
	for i := p.from; i < p.to; i++ {
		if p.fixed>>(i-p.from)&1 == 0 {
			limit *= base
		}
	}
	n, target := p.number(name), limit-1
	if (limit-1-n)/p.step > uint64(pages) {
		target = n + uint64(pages)*p.step
	}
	if target == n {
		return "", false
	}
	for i := p.to - 1; i >= p.from; i-- {
		if p.fixed>>(i-p.from)&1 == 0 {
			out[i] = p.digits[target%base]
			target /= base
		}
	}
	return string(out), true
}
