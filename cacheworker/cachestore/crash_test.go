package cachestore

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"

	"github.com/larderfs/larder/cacheworker/object"
)

// TestMain is also the process that the crash tests kill.
func TestMain(m *testing.M) {
	if dir := os.Getenv("CACHESTORE_VICTIM"); dir != "" {
		capacity, _ := strconv.ParseInt(os.Getenv("CACHESTORE_CAPACITY"), 10, 64)
		seed, _ := strconv.ParseUint(os.Getenv("CACHESTORE_SEED"), 10, 64)
		if err := victim(dir, capacity, seed); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

const victimObjects = 40

func victimObject(n int) object.Object {
	return obj(fmt.Sprint("v", n), []int64{700, 5000, chunk, 2*chunk + 9, 3 * chunk}[n%5])
}

// victim puts chunks until it is killed, and says each one that Put returned for.
func victim(dir string, capacity int64, seed uint64) error {
	go func() { // the test is gone: so are we
		io.Copy(io.Discard, os.Stdin)
		os.Exit(1)
	}()
	s, err := Open(Config{Dir: dir, CapacityBytes: capacity, BootID: "boot-1", Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		return err
	}
	var stdout sync.Mutex
	errs := make(chan error)
	for w := range uint64(4) {
		go func() {
			r := rand.New(rand.NewPCG(seed, w))
			for {
				n := r.IntN(victimObjects)
				o := victimObject(n)
				f, err := s.Open(o)
				if errors.Is(err, object.ErrNoSpace) {
					continue
				}
				if err != nil {
					errs <- err
					return
				}
				i := r.IntN(o.Chunks())
				err = f.Put(i, content(o, i))
				if err != nil && !errors.Is(err, object.ErrNoSpace) {
					errs <- err
					return
				}
				if err == nil {
					stdout.Lock()
					fmt.Println("put", n, i)
					stdout.Unlock()
				}
				f.Close()
			}
		}()
	}
	return <-errs
}

type chunkName struct{ object, chunk int }

// killVictim runs one, kills it after so many puts, and returns what it had put.
func killVictim(t *testing.T, dir string, capacity int64, seed uint64, puts int) map[chunkName]bool {
	t.Helper()
	return killCommand(t, exec.Command(os.Args[0]), dir, capacity, seed, puts)
}

func killCommand(t *testing.T, cmd *exec.Cmd, dir string, capacity int64, seed uint64, puts int) map[chunkName]bool {
	t.Helper()
	cmd.Env = append(os.Environ(), "CACHESTORE_VICTIM="+dir,
		fmt.Sprint("CACHESTORE_CAPACITY=", capacity), fmt.Sprint("CACHESTORE_SEED=", seed))
	cmd.Stderr = t.Output()
	stdin, err := cmd.StdinPipe() // held open by us: its lifeline
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	done := map[chunkName]bool{}
	lines := bufio.NewScanner(stdout)
	for n := 0; lines.Scan(); n++ { // what it said before it died counts, too
		var c chunkName
		if _, err := fmt.Sscanf(lines.Text(), "put %d %d", &c.object, &c.chunk); err == nil {
			done[c] = true
		}
		if n == puts {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if len(done) == 0 {
		t.Fatal("the victim put nothing")
	}
	return done
}

// verifyAll reads every chunk that the store claims to have, and returns them.
func verifyAll(t *testing.T, s *Store) map[chunkName]bool {
	t.Helper()
	have := map[chunkName]bool{}
	for n := range victimObjects {
		o := victimObject(n)
		if !s.Peek(o.ID()).Exists {
			continue
		}
		f := lease(t, s, o)
		for i := range o.Chunks() {
			if f.Has(i) {
				wantChunk(t, f, i)
				have[chunkName{n, i}] = true
			}
		}
		f.Close()
	}
	return have
}

// TestWhatWasPutBeforeSIGKILLIsThereAfterIt: all of it, since Put returned.
func TestWhatWasPutBeforeSIGKILLIsThereAfterIt(t *testing.T) {
	const capacity = 1 << 30
	dir := t.TempDir()
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	put := map[chunkName]bool{}
	for round := range 12 {
		if round%4 == 0 { // from an empty cache again
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			clear(put)
		}
		done := killVictim(t, dir, capacity, r.Uint64(), 1+r.IntN(80))
		for c := range done {
			put[c] = true
		}
		if round%4 == 1 {
			continue // the next one starts on what this one left
		}
		s := open(t, testConfig(t, dir, capacity))
		have := verifyAll(t, s)
		for c := range put {
			if !have[c] {
				t.Errorf("seed %d round %d: chunk %d of object %d was put and is gone", seed, round, c.chunk, c.object)
			}
		}
		if st := s.Stats(); st.BadChunks != 0 {
			t.Errorf("seed %d round %d: %+v", seed, round, st)
		}
		checkInvariants(t, s)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSIGKILLUnderEvictionServesNoWrongByte has a tier that is always full.
func TestSIGKILLUnderEvictionServesNoWrongByte(t *testing.T) {
	const capacity = 20 * chunk
	dir := t.TempDir()
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	for round := range 10 {
		killVictim(t, dir, capacity, r.Uint64(), 20+r.IntN(150))
		if round%2 == 0 {
			continue // the next one starts on what this one left
		}
		s := open(t, testConfig(t, dir, capacity))
		have := verifyAll(t, s)
		eventually(t, "what puts in flight left on the disk is counted", func() bool {
			st := s.Stats()
			return usedOnDisk(t, s) <= st.DiskBytes && st.DiskBytes <= capacity
		})
		if used := usedOnDisk(t, s); len(have) < 5 || s.Stats().BadChunks != 0 {
			t.Errorf("seed %d round %d: %d bytes on disk, %d chunks, %+v", seed, round, used, len(have), s.Stats())
		}
		checkInvariants(t, s)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestAPowerCutServesNoWrongByte tears the index's log and loses pages of cache files, as a
// machine does that stops between write and write-back.
func TestAPowerCutServesNoWrongByte(t *testing.T) {
	const capacity = 1 << 30
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	kept, lost := 0, int64(0)
	for round := range 6 {
		dir := t.TempDir()
		done := killVictim(t, dir, capacity, r.Uint64(), 60+r.IntN(60))
		tear(t, r, dir)
		cfg := testConfig(t, dir, capacity)
		cfg.BootID = "boot-2"
		s := open(t, cfg)
		have := verifyAll(t, s)
		kept += len(have)
		lost += s.Stats().BadChunks
		if t.Failed() {
			t.Fatalf("seed %d round %d", seed, round)
		}
		for n := range victimObjects {
			fill(t, s, victimObject(n))
		}
		if got := verifyAll(t, s); len(got) < len(done) {
			t.Errorf("seed %d round %d: %d chunks after filling", seed, round, len(got))
		}
		checkInvariants(t, s)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if kept == 0 || lost == 0 {
		t.Errorf("seed %d: %d chunks kept, %d bad: the test shows nothing", seed, kept, lost)
	}
}

func tear(t *testing.T, r *rand.Rand, dir string) {
	t.Helper()
	logs := glob(t, dir+"/"+indexName+"/db", "*.log")
	last := logs[len(logs)-1]
	b, err := os.ReadFile(last)
	if err != nil {
		t.Fatal(err)
	}
	end := len(b)
	for end > 0 && b[end-1] == 0 {
		end--
	}
	switch r.IntN(3) {
	case 0: // cut short
		b = b[:r.IntN(end+1)]
	case 1: // a page in the middle never came to the disk, later ones did
		at := r.IntN(end+1) &^ 511
		clear(b[at:min(at+512, len(b))])
	}
	if err := os.WriteFile(last, b, 0o600); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(dir + "/" + objectsName + "/*/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		st, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		switch r.IntN(6) {
		case 0:
			_, err = f.WriteAt(make([]byte, 4096), r.Int64N(st.Size()+1)&^4095)
		case 1:
			err = f.Truncate(r.Int64N(st.Size() + 1))
		}
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestAWorkerNeedsNoRightsOutsideItsDirectory runs as nobody, below a folder that it may not enter.
func TestAWorkerNeedsNoRightsOutsideItsDirectory(t *testing.T) {
	const nobody, capacity = 65534, 20 * chunk
	closed := t.TempDir() + "/closed"
	tier := closed + "/tier"
	if err := errors.Join(os.Mkdir(closed, 0o700), os.Mkdir(tier, 0o700), os.Chown(tier, nobody, nobody)); err != nil {
		t.Fatal(err)
	}
	d, err := os.Open(tier)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	bin, err := os.MkdirTemp("", "cachestore-test-") // where nobody may run it
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(bin)
	program := bin + "/victim"
	b, err := os.ReadFile(os.Args[0])
	if err := errors.Join(err, os.Chmod(bin, 0o755), os.WriteFile(program, b, 0o755)); err != nil {
		t.Fatal(err)
	}
	run := func(seed uint64) {
		cmd := exec.Command(program)
		cmd.Dir = "/"
		cmd.ExtraFiles = []*os.File{d}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		killCommand(t, cmd, "/proc/self/fd/3", capacity, seed, 100)
	}
	run(1)
	run(2) // opens again what it made
	if used, err := os.Stat(tier + "/" + uuidName); err != nil || used.Sys().(*syscall.Stat_t).Uid != nobody {
		t.Errorf("%v, %v", used, err)
	}
	s := open(t, testConfig(t, tier, capacity))
	if have := verifyAll(t, s); len(have) < 5 {
		t.Errorf("%d chunks", len(have))
	}
}
