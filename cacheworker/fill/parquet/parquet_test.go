package parquet

import (
	"os"
	"testing"
)

// lineitem is the footer of a file of 14622379 bytes that tpchgen-cli made: 4 row groups of 16 columns.
func lineitem(t testing.TB) (footer []byte, dataBytes int64) {
	t.Helper()
	b, err := os.ReadFile("testdata/lineitem.footer")
	if err != nil {
		t.Fatal(err)
	}
	return b, 14622379 - Tail - int64(len(b))
}

func TestPartsOfARealFile(t *testing.T) {
	l, err := Parse(lineitem(t))
	if err != nil {
		t.Fatal(err)
	}
	if len(l) != 64 {
		t.Fatalf("%d parts instead of 4 times 16", len(l))
	}
	for i, want := range map[int]Part{ // as parquet_metadata of DuckDB says
		0:  {4, 4 + 247642},
		4:  {1021362, 1021362 + 71113},
		31: {6055016, 6055016 + 1272468},
		63: {13332027, 13332027 + 1268170},
	} {
		if l[i] != want {
			t.Errorf("part %d is %v, not %v", i, l[i], want)
		}
	}
	for _, c := range []struct {
		off  int64
		want Part
	}{{0, Part{}}, {4, l[0]}, {1021361, l[3]}, {1021362, l[4]}, {1092474, l[4]}, {14600197, Part{}}, {-1, Part{}}} {
		if p, ok := l.At(c.off); p != c.want || ok != (p != Part{}) {
			t.Errorf("at %d is part %v, not %v", c.off, p, c.want)
		}
	}
	for _, c := range []struct {
		off, n int64
		want   Part
	}{{0, 4096, l[0]}, {4, 1, l[0]}, {5, 4096, Part{}}, {1021000, 4096, l[4]}, {1021000, 100_000, l[5]}, {14e6, 1e6, Part{}}} {
		if p, ok := l.Begins(c.off, c.n); p != c.want || ok != (p != Part{}) {
			t.Errorf("in %d bytes at %d begins part %v, not %v", c.n, c.off, p, c.want)
		}
	}
}

func TestWhatIsNoFooterIsAnError(t *testing.T) {
	good, data := lineitem(t)
	for name, c := range map[string]struct {
		footer []byte
		data   int64
	}{
		"Empty":       {nil, data},
		"CutOff":      {good[:len(good)/2], data},
		"Text":        {[]byte("once upon a time"), data},
		"ShorterFile": {good, data / 2},
	} {
		if l, err := Parse(c.footer, c.data); err == nil {
			t.Errorf("%s: %d parts and no error", name, len(l))
		}
	}
	for tail, want := range map[string]int64{"\x29\x2a\x00\x00PAR1": 10793, "\x29\x2a\x00\x00PAR2": -1, "PAR1": -1} {
		if n, ok := FooterLen([]byte(tail)); ok != (want >= 0) || ok && n != want {
			t.Errorf("the tail %q tells of a footer of %d bytes, %v", tail, n, ok)
		}
	}
}

func FuzzParse(f *testing.F) {
	const small = "\x49\x1c\x19\x1c\x3c\x76\xc8\x01\x26\x08\x00\x00\x00\x00" // 100 bytes at 4
	if l, err := Parse([]byte(small), 104); err != nil || len(l) != 1 || l[0] != (Part{4, 104}) {
		f.Fatalf("the seed has parts %v, err %v", l, err)
	}
	f.Add([]byte(small), int64(104))
	f.Fuzz(func(t *testing.T, footer []byte, data int64) {
		l, err := Parse(footer, data)
		end := int64(0)
		for _, p := range l {
			if err != nil || p.Start < end || p.End <= p.Start || p.End > data {
				t.Fatalf("part %v behind %d, with %d bytes of data, err %v", p, end, data, err)
			}
			end = p.End
			if q, ok := l.At(p.Start); !ok || q != p {
				t.Fatalf("at the beginning of %v is %v", p, q)
			}
		}
	})
}
