package tiers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/cachestore"
	"github.com/larderfs/larder/cacheworker/object"
)

const (
	chunk = object.ChunkSize
	unit  = 64 << 10 // as good as a chunk for most tests, and faster
)

func obj(key string, size int64) object.Object {
	return object.Object{Store: "s3://host/bucket", Key: key, Version: "v1", Size: size, ModTime: time.Unix(1700000000, 5)}
}

var contents sync.Map // what content made

// content is chunk i of an object. Not to be changed.
func content(o object.Object, i int) []byte {
	id := o.ID()
	var seed [32]byte
	copy(seed[:], id[:])
	seed[31] = byte(i)
	if b, ok := contents.Load(seed); ok {
		return b.([]byte)
	}
	b := make([]byte, o.ChunkLen(i))
	rand.NewChaCha8(seed).Read(b)
	contents.Store(seed, b)
	return b
}

// memoryDir is a folder on a tmpfs.
func memoryDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "larder-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Type != unix.TMPFS_MAGIC {
		t.Fatalf("%s is not on a tmpfs (%v)", dir, err)
	}
	return dir
}

// config is a tier in memory above one on the disk.
func config(t testing.TB, upper, lower int64) Config {
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	store := func(dir string, capacity int64) cachestore.Config {
		return cachestore.Config{Dir: dir, CapacityBytes: capacity, BootID: "boot-1", Log: log}
	}
	return Config{Log: log, Tiers: []Tier{{SSD, store(t.TempDir(), lower)}, {Memory, store(memoryDir(t), upper)}}}
}

func open(t testing.TB, cfg Config) *Cache {
	t.Helper()
	c, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	loaded(t, c)
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func loaded(t testing.TB, c *Cache) {
	t.Helper()
	eventually(t, "the index is read", func() bool { return !c.Stats().Reading })
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it never came that %s", what)
		}
	}
}

// settle has all moved that is to be.
func settle(c *Cache) {
	c.makeMargins(context.Background())
	for id, ok := c.next(); ok; id, ok = c.next() {
		c.promote(context.Background(), id)
	}
	c.makeMargins(context.Background())
}

// use opens an object, puts what is absent, and checks all of it. It returns the tier that it is in.
func use(t testing.TB, c *Cache, o object.Object) int {
	t.Helper()
	f, err := c.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i := range o.Chunks() {
		if err := f.Put(i, content(o, i)); err != nil {
			t.Fatalf("chunk %d of %v: %v", i, o, err)
		}
	}
	check(t, f)
	return c.best(o.ID(), 0)
}

func check(t testing.TB, f *cachestore.File) {
	t.Helper()
	o := f.Object()
	buf := make([]byte, chunk)
	for i := range o.Chunks() {
		want := content(o, i)
		n, _ := f.ReadAt(buf[:len(want)], int64(i)*chunk)
		if !f.Has(i) || !bytes.Equal(buf[:n], want) {
			t.Errorf("chunk %d of %v is absent or has wrong bytes", i, o)
		}
	}
}

// account compares what each tier counts with its files.
func account(t testing.TB, c *Cache) {
	t.Helper()
	if err := accounted(c); err != nil {
		t.Error(err)
	}
}

func accounted(c *Cache) error {
	c.moving.Lock()
	defer c.moving.Unlock()
	for _, tier := range c.tiers {
		var onDisk int64 // with up to one block more for each file: of its extents, if these are many
		files := 0
		err := filepath.WalkDir(filepath.Join(tier.dir, "objects"), func(p string, d fs.DirEntry, err error) error {
			var st unix.Stat_t
			if err == nil && d.Type().IsRegular() {
				err = unix.Stat(p, &st)
				onDisk += st.Blocks * 512
				files++
			}
			return err
		})
		s := tier.Stats()
		more := onDisk - (s.DiskBytes - s.UnlinkedBytes)
		if err != nil || s.Objects != files || more < 0 || more > int64(files)*4096 || s.DiskBytes > s.CapacityBytes {
			return fmt.Errorf("%v counts %+v, and has %d files of %d bytes (%v)", tier.kind, s, files, onDisk, err)
		}
	}
	return nil
}

func TestNewObjectsBeginInTheFastestTierWithRoomAndMoveDown(t *testing.T) {
	c := open(t, config(t, 16*unit, 64*unit))
	var all []object.Object
	for n := range 40 {
		o := obj(fmt.Sprint("o", n), unit)
		all = append(all, o)
		if in := use(t, c, o); in != 0 {
			t.Errorf("%v is in tier %d, though the first one has room", o, in)
		}
		settle(c)
		if free := c.tiers[0].Free(); free < unit {
			t.Errorf("%d bytes of the first tier are free", free)
		}
	}
	for _, o := range all {
		if !c.Peek(o.ID()).Complete {
			t.Errorf("%v is lost", o)
		}
	}
	if s := c.Stats(); s.Evictions != 0 || s.Objects != len(all) {
		t.Errorf("%+v", s)
	}
	account(t, c)
	for size, want := range map[int64]int{8*unit + 1: 1, 7 * unit: 1, 0: 0} { // too large, no room for it now, none needed
		if in := use(t, c, obj(fmt.Sprint("large", size), size)); in != want {
			t.Errorf("%d bytes are in tier %d, want %d", size, in, want)
		}
	}
	if _, err := c.Open(obj("too large", 33*unit)); !errors.Is(err, object.ErrNoSpace) {
		t.Errorf("more than half of the largest tier: %v", err)
	}
}

func TestWhatIsAskedForAgainMovesUp(t *testing.T) {
	c := open(t, config(t, 16*unit, 64*unit))
	for n := range 14 {
		use(t, c, obj(fmt.Sprint("first", n), unit))
	}
	hot := obj("hot", 3*unit)
	who := object.Principal{1}
	if in := use(t, c, hot); in != 1 {
		t.Fatalf("it is in tier %d", in)
	}
	c.Grant(hot, who, time.Now())
	var told []object.ID
	c.OnEvict(func(id object.ID) { told = append(told, id) })
	for range 4 {
		use(t, c, hot)
		settle(c)
	}
	if c.best(hot.ID(), 0) != 0 || !slices.Contains(told, hot.ID()) {
		t.Errorf("asked for four times it is in tier %d, of which those who use it were told: %v", c.best(hot.ID(), 0), told)
	}
	if !c.tiers[1].Peek(hot.ID()).Complete {
		t.Error("the copy below went though there is room")
	}
	if !c.tiers[0].Granted(hot.ID(), who) || c.Granted(hot.ID(), object.Principal{2}) {
		t.Error("who may read it has not moved with it")
	}
	use(t, c, hot)
	account(t, c)

	for n := range 80 { // the copy is the first to go below, and above it stays
		use(t, c, obj(fmt.Sprint("scan", n), unit))
		settle(c)
	}
	if c.tiers[1].Peek(hot.ID()).Exists || !c.tiers[0].Peek(hot.ID()).Complete {
		t.Errorf("after a scan: %+v above, %+v below", c.tiers[0].Peek(hot.ID()), c.tiers[1].Peek(hot.ID()))
	}
	account(t, c)
	c.Revoke(who, hot.Store)
	if c.Granted(hot.ID(), who) {
		t.Error("a grant outlives its revocation in a tier")
	}
}

// A hot set that does not fit does not go up and down: part of it is above, and stays.
func TestAHotSetThatDoesNotFitDoesNotPingPong(t *testing.T) {
	c := open(t, config(t, 16*unit, 128*unit))
	var hot []object.Object
	for n := range 40 {
		hot = append(hot, obj(fmt.Sprint("hot", n), unit))
	}
	r := rand.New(rand.NewPCG(1, 1))
	above := 0
	epoch := func() {
		above = 0
		r.Shuffle(len(hot), func(i, j int) { hot[i], hot[j] = hot[j], hot[i] })
		for _, o := range hot {
			if use(t, c, o) == 0 {
				above++
			}
			settle(c)
		}
	}
	for range 5 {
		epoch()
	}
	before := c.tiers[0].received.Load()
	for range 10 {
		epoch()
	}
	moved := (c.tiers[0].received.Load() - before) / unit
	t.Logf("of %d uses %d moved an object up; of the last %d, %d found it above", 10*len(hot), moved, len(hot), above)
	if moved > int64(len(hot)) {
		t.Errorf("of %d uses %d moved an object up", 10*len(hot), moved)
	}
	if above < 10 {
		t.Errorf("of %d objects %d are found above, where 15 fit", len(hot), above)
	}
	account(t, c)
}

// The hotter an object, the faster its tier.
func TestTheHottestAreAbove(t *testing.T) {
	c := open(t, config(t, 16*unit, 128*unit))
	r := rand.New(rand.NewPCG(2, 2))
	z := rand.NewZipf(r, 1.2, 1, 59)
	hits := 0
	for n := range 1500 {
		if use(t, c, obj(fmt.Sprint("z", z.Uint64()), unit)) == 0 && n >= 500 {
			hits++
		}
		settle(c)
	}
	t.Logf("%d of 1000 uses found the object in the first tier, which holds a quarter of all", hits)
	if hits < 600 {
		t.Errorf("%d of 1000 uses found the object above", hits)
	}
	account(t, c)
}

func TestPinsAreInTheTierThatOutlivesTheMachine(t *testing.T) {
	cfg := config(t, 16*unit, 32*unit)
	c := open(t, cfg)
	o := obj("o", 2*unit)
	use(t, c, o)
	if err := c.Pin(t.Context(), obj("nowhere", 5).ID()); !errors.Is(err, object.ErrIncomplete) {
		t.Errorf("pin of what is not here: %v", err)
	}
	if err := c.Pin(t.Context(), o.ID()); err != nil {
		t.Fatal(err)
	}
	for n := range 60 {
		use(t, c, obj(fmt.Sprint("scan", n), unit))
		settle(c)
	}
	if s := c.tiers[1].Stats(); s.PinnedObjects != 1 || !c.tiers[1].Peek(o.ID()).Complete {
		t.Errorf("%+v", s)
	}
	for n := range 7 {
		p := obj(fmt.Sprint("pin", n), 2*unit)
		use(t, c, p)
		if err := c.Pin(t.Context(), p.ID()); err != nil {
			t.Errorf("pin %d: %v", n, err)
		}
	}
	more := obj("more", 2*unit)
	use(t, c, more)
	if err := c.Pin(t.Context(), more.ID()); !errors.Is(err, object.ErrNoSpace) {
		t.Errorf("more than half of the tier is pinned: %v", err)
	}
	account(t, c)
	if !c.Unpin(o.ID()) || c.Unpin(o.ID()) || c.Stats().PinnedObjects != 7 {
		t.Error("unpin")
	}
	if !c.Evict(obj("pin1", 2*unit).ID()) || c.Stats().PinnedObjects != 6 {
		t.Error("a pinned object cannot be evicted by name")
	}
}

func TestWhatIsTooOldIsFoundInAllTiersAndGoesWithItsTail(t *testing.T) {
	c := open(t, config(t, 16*unit, 64*unit))
	long := time.Now().Add(-2 * time.Hour)
	old, washed, pinned, young := obj("old", unit), obj("washed", unit), obj("pinned", unit), obj("young", unit)
	for _, o := range []object.Object{old, washed, pinned} {
		f, err := c.tiers[0].Receive(o, 0, long)
		if err != nil {
			t.Fatal(err)
		}
		for i := range o.Chunks() {
			err = errors.Join(err, f.Put(i, content(o, i)))
		}
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	use(t, c, young)
	if err := errors.Join(c.KeepTail(washed, make([]byte, 1000)), c.Pin(t.Context(), pinned.ID())); err != nil {
		t.Fatal(err)
	}
	c.moving.Lock()
	m := c.tiers[0].Copy(old.ID())
	err := c.copy(t.Context(), m, 1)
	c.moving.Unlock()
	if err := errors.Join(err, m.Keep()); err != nil || !c.tiers[0].Evict(old.ID()) || !c.tiers[1].Peek(old.ID()).Complete {
		t.Fatalf("it has not moved: %v", err)
	}
	for _, tier := range c.tiers {
		tier.Evict(washed.ID())
	}
	ids, err := c.Older(t.Context(), func(object.Store) func([]byte) time.Time {
		return func([]byte) time.Time { return time.Now().Add(-time.Hour) }
	})
	if err != nil || len(ids) != 2 || !slices.Contains(ids, old.ID()) || !slices.Contains(ids, washed.ID()) {
		t.Errorf("too old are %v, %v; want %v and, by its tail, %v", ids, err, old.ID(), washed.ID())
	}
	if all, err := c.IDs(t.Context(), func(object.Store) func([]byte) bool {
		return func([]byte) bool { return true }
	}); err != nil || len(all) != 4 {
		t.Errorf("%d objects, %v; want each of 4 once", len(all), err)
	}
	if c.TailBytes(washed.ID()) == 0 || !c.Evict(washed.ID()) || c.TailBytes(washed.ID()) != 0 || c.Evict(washed.ID()) {
		t.Error("a tail outlives its object that was freed")
	}
	account(t, c)
}

func TestTiersComeAndGoAndTheWorkerStays(t *testing.T) {
	cfg := config(t, 16*unit, 32*unit)
	ssd, mem := cfg.Tiers[0], cfg.Tiers[1]
	hdd := Tier{HDD, ssd.Store}
	hdd.Store.Dir = t.TempDir()
	o := obj("o", unit)
	who := func(tiers ...Tier) string {
		t.Helper()
		cfg.Tiers = tiers
		c, err := Open(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		loaded(t, c)
		use(t, c, o)
		account(t, c)
		defer c.Close()
		return c.UUID().String() + string(c.NodeKey())
	}
	id := who(ssd)
	for _, tiers := range [][]Tier{{ssd, mem}, {hdd, mem, ssd}, {mem, hdd}, {hdd}, {hdd, ssd}} {
		if got := who(tiers...); got != id {
			t.Errorf("with %d tiers it is another worker", len(tiers))
		}
	}
	if err := os.RemoveAll(mem.Store.Dir); err != nil { // a boot, and what makes the folder is late
		t.Fatal(err)
	}
	cfg.Tiers = []Tier{mem, ssd}
	c, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	loaded(t, c)
	use(t, c, o)
	all := c.Tiers()
	if len(all) != 2 || all[0].Kind != SSD || all[1].Kind != Memory || all[1].Err == nil || c.UUID().String()+string(c.NodeKey()) != id {
		t.Errorf("without a tier: %+v", all)
	}
	if _, err := Open(t.Context(), Config{Tiers: []Tier{mem}}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without any: %v", err)
	}
}

func TestAnotherProcesssTierIsAnError(t *testing.T) {
	cfg := config(t, 16*unit, 32*unit)
	open(t, Config{Tiers: cfg.Tiers[:1], Log: cfg.Log})
	asked := 0
	cfg.AskOwner = func() { asked++ }
	for i := range cfg.Tiers {
		cfg.Tiers[i].Store.LockWait = 100 * time.Millisecond
	}
	if _, err := Open(t.Context(), cfg); !errors.Is(err, cachestore.ErrTaken) || asked == 0 {
		t.Errorf("%v after %d questions", err, asked)
	}
	cfg.Standby = true
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Open(ctx, cfg); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("in reserve: %v", err)
	}
}

// What was handed over can be read, and the next process has all of it.
func TestAllTiersAreHandedOver(t *testing.T) {
	cfg := config(t, 16*unit, 32*unit)
	first := open(t, cfg)
	for n := range 20 {
		use(t, first, obj(fmt.Sprint(n), unit))
		settle(first)
	}
	cfg.AskOwner = func() {
		if err := first.HandOver(); err != nil {
			t.Error(err)
		}
	}
	second := open(t, cfg)
	for n := range 20 {
		for _, c := range []*Cache{first, second} {
			f, err := c.Open(obj(fmt.Sprint(n), unit))
			if err != nil {
				t.Fatal(err)
			}
			check(t, f)
			f.Close()
		}
	}
	if _, err := first.Open(obj("new", unit)); !errors.Is(err, object.ErrNoSpace) {
		t.Errorf("a new object where all was handed over: %v", err)
	}
	account(t, second)
}

// A file system that others have filled takes nothing, and what is new goes to the next one; when there is room again
// it does again.
func TestAFullTierIsPassedOver(t *testing.T) {
	cfg := config(t, 16*chunk, 64*chunk)
	small := t.TempDir()
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=28m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(small, 0); err != nil {
			t.Error(err)
		}
	})
	cfg.Tiers[1].Store.Dir = small
	c := open(t, cfg)
	if in := use(t, c, obj("before", chunk)); in != 0 {
		t.Errorf("it is in tier %d", in)
	}
	ballast := filepath.Join(small, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 22*chunk), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the tier sees it", func() bool { return c.tiers[0].Free() == 0 })
	for n := range 10 {
		if in := use(t, c, obj(fmt.Sprint("during", n), chunk)); in != 1 {
			t.Errorf("it is in tier %d", in)
		}
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the tier has room", func() bool { return c.tiers[0].Free() > chunk && c.tiers[0].Accepts() })
	if in := use(t, c, obj("after", chunk)); in != 0 {
		t.Errorf("it is in tier %d", in)
	}
	account(t, c)
}

// TestModel does at random what a worker does, beside the mover: nothing that was put is lost unless a tier says that it has
// evicted, all bytes are right, and each tier's counts are exact.
func TestModel(t *testing.T) {
	for seed := range uint64(2) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			cfg := config(t, 16*chunk, 80*chunk)
			c := open(t, cfg)
			var objects []object.Object
			put := map[string]int{}
			evictions, bursts, asked := int64(0), 0, 0
			for n, size := range []int64{0, 1, 4097, chunk - 1, chunk, chunk + 1, 2 * chunk, 3*chunk + 5, 9 * chunk} {
				for k := range 4 {
					objects = append(objects, obj(fmt.Sprint("m", n, k), size))
				}
			}
			r := rand.New(rand.NewPCG(seed, 1))
			for range 250 {
				if now := c.Stats().Evictions; now != evictions { // a burst, faster than the mover
					evictions = now
					bursts++
					clear(put)
				}
				o := objects[r.IntN(len(objects))]
				f, err := c.Open(o)
				if err != nil {
					t.Fatal(err)
				}
				for i := range o.Chunks() {
					if put[fmt.Sprint(o.Key, i)] > 0 {
						asked++
						if !f.Has(i) && c.Stats().Evictions == evictions {
							t.Errorf("chunk %d of %v was lost", i, o)
						}
					}
					if r.IntN(3) > 0 {
						if err := f.Put(i, content(o, i)); err != nil {
							t.Errorf("put: %v", err)
						}
						put[fmt.Sprint(o.Key, i)]++
					}
					if f.Has(i) {
						buf := make([]byte, o.ChunkLen(i))
						if f.ReadAt(buf, int64(i)*chunk); !bytes.Equal(buf, content(o, i)) {
							t.Errorf("chunk %d of %v has wrong bytes", i, o)
						}
					}
				}
				if err := f.Close(); err != nil {
					t.Error(err)
				}
				switch r.IntN(20) {
				case 0:
					account(t, c)
				case 1:
					settle(c)
				case 2:
					c.Evict(o.ID())
					evictions = c.Stats().Evictions
					for i := range o.Chunks() {
						delete(put, fmt.Sprint(o.Key, i))
					}
				case 3:
					if err := c.Close(); err != nil {
						t.Error(err)
					}
					c, evictions = open(t, cfg), 0
				}
			}
			account(t, c)
			eventually(t, "nobody holds what was evicted", func() bool { return c.Stats().UnlinkedFiles == 0 })
			t.Logf("%d times something was there that had been put; %d times something was evicted", asked, bursts)
			if asked < 300 {
				t.Error("that is too seldom")
			}
		})
	}
}
