package cachestore

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"github.com/larderfs/larder/cacheworker/object"
)

// model is what the store may and must answer: under a lease a chunk that was there stays
// there; what is there has the object's bytes; what is evicted and unleased may come back empty.
type model struct {
	t       *testing.T
	r       *rand.Rand
	cfg     Config
	s       *Store
	objects []object.Object
	bytes   [][]byte
	leases  []*modelLease
}

type modelLease struct {
	n       int // of the object
	f       *File
	present map[int]bool
}

const modelCapacity = 10 * chunk

func newModel(t *testing.T, seed uint64) *model {
	m := &model{t: t, r: rand.New(rand.NewPCG(seed, 1)), cfg: testConfig(t, t.TempDir(), modelCapacity)}
	for n, size := range []int64{0, 1, 4096, 4097, 100000, chunk - 1, chunk, chunk + 1, 2 * chunk, 3*chunk + 5, 4 * chunk, 5 * chunk, 700, 5000, 2*chunk - 1, 6 * chunk} {
		o := obj(fmt.Sprint("m", n), size)
		b := make([]byte, 0, size)
		for i := range o.Chunks() {
			b = append(b, content(o, i)...)
		}
		m.objects = append(m.objects, o)
		m.bytes = append(m.bytes, b)
	}
	m.open()
	return m
}

func (m *model) open() {
	s, err := Open(m.cfg)
	if err != nil {
		m.t.Fatal(err)
	}
	<-s.swept
	m.s = s
}

func (m *model) pick() *modelLease {
	if len(m.leases) == 0 {
		return nil
	}
	return m.leases[m.r.IntN(len(m.leases))]
}

func (m *model) step() {
	switch k := m.r.IntN(100); {
	case k < 15:
		m.lease()
	case k < 18:
		m.tail()
	case k < 45:
		m.put()
	case k < 75:
		m.read()
	case k < 92:
		m.release()
	case k < 95:
		id := m.objects[m.r.IntN(len(m.objects))].ID()
		existed := m.s.Peek(id).Exists
		if m.s.Evict(id) != existed {
			m.t.Errorf("evict of an object that exists: %v", existed)
		}
	case k < 98:
		checkInvariants(m.t, m.s)
	default:
		m.restart()
	}
}

func (m *model) lease() {
	if len(m.leases) > 6 {
		return
	}
	n := m.r.IntN(len(m.objects))
	before := m.s.Peek(m.objects[n].ID())
	f, err := m.s.Open(m.objects[n])
	if m.objects[n].Size > modelCapacity/2 {
		if !errors.Is(err, object.ErrNoSpace) {
			m.t.Errorf("open of a large object: %v", err)
		}
		return
	}
	if err != nil {
		m.t.Errorf("open: %v", err)
		return
	}
	if f.PresentBytes() != before.PresentBytes {
		m.t.Errorf("%d bytes present, %d before the lease", f.PresentBytes(), before.PresentBytes)
	}
	l := &modelLease{n: n, f: f, present: map[int]bool{}}
	for i := range m.objects[n].Chunks() {
		if f.Has(i) {
			l.present[i] = true
		}
	}
	m.leases = append(m.leases, l)
}

// tail keeps one or reads it.
func (m *model) tail() {
	n := m.r.IntN(len(m.objects))
	o, b := m.objects[n], m.bytes[n]
	last := b[len(b)-len(b)/3:]
	if len(last) == 0 {
		return
	}
	if err := m.s.KeepTail(o, last); err != nil && !errors.Is(err, object.ErrNoSpace) {
		m.t.Errorf("keep a tail: %v", err)
	}
	p := make([]byte, 1+m.r.IntN(len(last)))
	off := m.r.IntN(len(b) - len(p) + 1)
	if m.s.ReadTail(o, p, int64(off)) && (!bytes.Equal(p, b[off:off+len(p)]) || off < len(b)-len(last)) {
		m.t.Errorf("read of %d bytes at %d of the tail of %v: others, or not in it", len(p), off, o)
	}
}

func (m *model) put() {
	l := m.pick()
	if l == nil || m.objects[l.n].Size == 0 {
		return
	}
	o := m.objects[l.n]
	i := m.r.IntN(o.Chunks())
	data := m.bytes[l.n][i*chunk : i*chunk+o.ChunkLen(i)]
	if l.present[i] {
		data = make([]byte, len(data)) // must not be written
	}
	switch err := l.f.Put(i, data); {
	case err == nil:
		l.present[i] = true
	case !errors.Is(err, object.ErrNoSpace):
		m.t.Errorf("put: %v", err)
	case l.present[i]:
		m.t.Errorf("put of a present chunk: %v", err)
	}
	if st := m.s.Stats(); st.DiskBytes > modelCapacity {
		m.t.Errorf("%+v", st)
	}
}

func (m *model) read() {
	l := m.pick()
	if l == nil {
		return
	}
	o := m.objects[l.n]
	off := m.r.Int64N(o.Size + 2)
	p := make([]byte, m.r.IntN(3*chunk/2))
	want := m.bytes[l.n][min(off, o.Size):]
	var wantErr error
	if len(p) > len(want) {
		wantErr = io.EOF
	} else {
		want = want[:len(p)]
	}
	there := true
	for i := off / chunk; len(want) > 0 && i*chunk < off+int64(len(want)); i++ {
		if !l.f.Has(int(i)) {
			there = false
		} else {
			l.present[int(i)] = true // another lease may have put it
		}
	}
	for i := range l.present {
		if !l.f.Has(i) {
			m.t.Errorf("chunk %d of %v went away under a lease", i, o)
		}
	}
	n, err := l.f.ReadAt(p, off)
	if !there {
		if !errors.Is(err, object.ErrIncomplete) || n != 0 {
			m.t.Errorf("read of absent bytes: %d, %v", n, err)
		}
		return
	}
	if n != len(want) || !bytes.Equal(p[:n], want) || err != wantErr && !(len(p) == 0 && err == nil) {
		m.t.Errorf("read %d at %d of %v: %d, %v", len(p), off, o, n, err)
	}
}

func (m *model) release() {
	if len(m.leases) == 0 {
		return
	}
	i := m.r.IntN(len(m.leases))
	if err := m.leases[i].f.Close(); err != nil {
		m.t.Errorf("close: %v", err)
	}
	m.leases = append(m.leases[:i], m.leases[i+1:]...)
}

// restart keeps some leases over the Close: they go on reading.
func (m *model) restart() {
	checkInvariants(m.t, m.s)
	had := map[object.ID]Info{}
	for _, o := range m.objects {
		had[o.ID()] = m.s.Peek(o.ID())
	}
	old := m.leases
	m.leases = nil
	if err := m.s.Close(); err != nil {
		m.t.Fatal(err)
	}
	for _, l := range old {
		for i := range l.present {
			wantChunk(m.t, l.f, i)
		}
		l.f.Close()
	}
	m.open()
	for _, o := range m.objects {
		want := had[o.ID()]
		if want.PresentBytes == 0 && o.Size > 0 {
			want = Info{} // it had nothing, and now has no file
		}
		if got := m.s.Peek(o.ID()); got != want {
			m.t.Errorf("%v after a restart: %+v, before %+v", o, got, want)
		}
	}
	checkInvariants(m.t, m.s)
}

func TestStoreAgainstAModel(t *testing.T) {
	for range 3 {
		seed := rand.Uint64()
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			m := newModel(t, seed)
			for step := 0; step < 1500; step++ {
				m.step()
				if t.Failed() {
					t.Fatalf("at step %d", step)
				}
			}
			for len(m.leases) > 0 {
				m.release()
			}
			checkInvariants(t, m.s)
			if err := m.s.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestManyAtOnce is for the race detector: all methods on a few objects in a tier that is too small.
func TestManyAtOnce(t *testing.T) {
	cfg, _ := viewConfig(t, modelCapacity)
	s := open(t, cfg)
	s.OnEvict(func(id object.ID) { s.Peek(id) })
	var objects []object.Object
	for n := range 12 {
		objects = append(objects, obj(fmt.Sprint("c", n), int64(1+n%4)*chunk/2+int64(n)))
	}
	var wg sync.WaitGroup
	for w := range uint64(6) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(w, 9))
			for range 40 {
				busy(t, r, s, objects[r.IntN(len(objects))])
			}
		})
	}
	wg.Wait()
	eventually(t, "views are closed, and so nothing is held", func() bool { return s.Stats().UnlinkedBytes == 0 })
	if st := s.Stats(); st.Evictions == 0 || st.LeasedObjects != 0 {
		t.Errorf("%+v", st)
	}
}

func busy(t *testing.T, r *rand.Rand, s *Store, o object.Object) {
	f, err := s.Open(o)
	if err != nil {
		if !errors.Is(err, object.ErrNoSpace) {
			t.Error(err)
		}
		return
	}
	defer f.Close()
	s.Grant(o, principal(byte(r.IntN(3)+1)), o.ModTime)
	for i := range o.Chunks() {
		if err := f.Put(i, content(o, i)); err != nil {
			if !errors.Is(err, object.ErrNoSpace) {
				t.Error(err)
			}
			continue
		}
		wantChunk(t, f, i)
	}
	switch r.IntN(8) {
	case 0:
		s.Evict(o.ID())
	case 1:
		s.Stats()
	case 2:
		s.Revoke(principal(1), o.Store)
	}
	v, err := f.View()
	if errors.Is(err, object.ErrIncomplete) {
		return
	}
	if err != nil {
		t.Error(err)
		return
	}
	defer v.Close()
	got, err := os.ReadFile(dir{f: v}.path())
	if err != nil || !bytes.Equal(got[:o.ChunkLen(0)], content(o, 0)) || int64(len(got)) != o.Size {
		t.Errorf("view of %v: %d bytes, %v", o, len(got), err)
	}
}
