package cacheworker

import (
	"os"
	"path/filepath"
	"testing"
)

func TestMemoryLimitIsTheSmallestOfTheCgroups(t *testing.T) {
	for _, c := range []struct {
		name, self string
		files      map[string]string
		want       int64
	}{
		{"v2", "0::/kube/pod/c\n", map[string]string{"kube/pod/c/memory.max": "max\n", "kube/pod/memory.max": "1073741824\n"}, 1 << 30},
		{"v1", "9:memory:/kube/c\n1:cpu:/x\n", map[string]string{"memory/kube/c/memory.limit_in_bytes": "536870912\n", "memory/memory.limit_in_bytes": "9223372036854771712\n"}, 512 << 20},
		{"hybrid", "9:memory:/c\n0::/c\n", map[string]string{"memory/c/memory.limit_in_bytes": "9223372036854771712\n", "unified/c/memory.max": "1048576\n"}, 1 << 20},
		{"none", "0::/\n", map[string]string{"memory.max": "max\n"}, 0},
		{"no files", "0::/gone\n", map[string]string{}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			self := filepath.Join(root, "self")
			c.files["self"] = c.self
			for name, text := range c.files {
				if err := os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			got, err := cgroupLimit(root, self)
			if err != nil || got != c.want {
				t.Errorf("limit %d, %v; want %d", got, err, c.want)
			}
			m, err := newMemory(0, 0, root, self)
			if err != nil || m.limit != c.want/10*9 {
				t.Errorf("nine tenths: %d, %v", m.limit, err)
			}
			m, err = newMemory(0, 256<<20, root, self)
			if tooLittle := c.want > 0 && c.want < 320<<20; (err != nil) != tooLittle {
				t.Errorf("with a tier in memory: %v", err)
			} else if c.want > 0 && err == nil && m.limit != (c.want-256<<20)/10*9 {
				t.Errorf("with a tier in memory: %d", m.limit)
			}
		})
	}
}

func TestMemoryIsDivided(t *testing.T) {
	m, err := newMemory(100<<20, 0, "/nowhere", "/nowhere")
	if err != nil {
		t.Fatal(err)
	}
	f := m.fills()
	if m.goLimit()+f.MaxInFlightBytes+f.RecentBytes >= m.limit || f.MaxInFlightBytes+f.RecentBytes+int64(m.names())*250 > m.limit/2 {
		t.Errorf("of %d: heap %d, in flight %d, recent %d, names %d", m.limit, m.goLimit(), f.MaxInFlightBytes, f.RecentBytes, m.names())
	}
}
