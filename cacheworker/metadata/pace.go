package metadata

import (
	"strings"
)

// pace is how far the pages of a folder reach: what lies between two names, as a number made of the bytes in
// which names differ. It only ever guesses: any name may be asked for, and the store says what
// comes behind.
type pace struct {
	from, to int    // the bytes of a name that make the number, where they are digits
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
	p.digits = p.alphabet(page, prefixLen)
	for p.from > 0 && p.to-p.from < paceBytes && (p.digit(last, p.from-1) || strings.IndexByte(alphanumeric, last[p.from-1]) < 0) {
		p.from--
	}
	if a, b := p.number(first), p.number(last); p.digits != "" && a < b {
		p.step = max(1, (b-a)/uint64(pages))
	}
	return p
}

// alphabet is the smallest one that has all digits in which names of the page differ.
func (p pace) alphabet(page []slot, prefixLen int) string {
	seen := ""
	for at := p.from; at < p.to; at++ {
		here := ""
		for i := 0; i < len(page); i += max(1, len(page)/paceNames) {
			name := page[i].key[prefixLen:]
			if at < len(name) && strings.IndexByte(alphanumeric, name[at]) >= 0 && strings.IndexByte(here, name[at]) < 0 {
				here += string(name[at])
			}
		}
		if len(here) > 1 || at == p.from {
			seen += here
		}
	}
	for _, a := range alphabets {
		if seen != "" && strings.Trim(seen, a) == "" {
			return a
		}
	}
	return ""
}

func (p pace) digit(name string, i int) bool { return strings.IndexByte(p.digits, name[i]) >= 0 }

// number is what the digits of a name mean. Other bytes do not count, and missing ones are zero.
func (p pace) number(name string) (n uint64) {
	for i := p.from; i < p.to; i++ {
		if i >= len(name) {
			n *= uint64(len(p.digits))
		} else if p.digit(name, i) {
			n = n*uint64(len(p.digits)) + uint64(strings.IndexByte(p.digits, name[i]))
		}
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
		if p.digit(string(out), i) {
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
		if p.digit(string(out), i) {
			out[i] = p.digits[target%base]
			target /= base
		}
	}
	return string(out), true
}
