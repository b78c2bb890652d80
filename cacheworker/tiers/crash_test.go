package tiers

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"testing"

	"github.com/larderfs/larder/cacheworker/cachestore"
	"github.com/larderfs/larder/cacheworker/object"
)

// TestMain is also the process that the crash test kills.
func TestMain(m *testing.M) {
	if dir := os.Getenv("TIERS_VICTIM_DISK"); dir != "" {
		seed, _ := strconv.ParseUint(os.Getenv("TIERS_VICTIM_SEED"), 10, 64)
		if err := victim(dir, os.Getenv("TIERS_VICTIM_MEMORY"), seed); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

const victimObjects = 60

func victimObject(n int) object.Object {
	return obj(fmt.Sprint("v", n), []int64{700, unit, chunk, chunk + 9, 2 * chunk}[n%5])
}

func victimConfig(disk, memory string) Config {
	return Config{Log: slog.New(slog.NewTextHandler(os.Stderr, nil)), Tiers: []Tier{
		{SSD, cachestore.Config{Dir: disk, CapacityBytes: 256 * chunk, BootID: "boot-1"}},
		{Memory, cachestore.Config{Dir: memory, CapacityBytes: 32 * chunk, BootID: "boot-1"}},
	}}
}

// victim uses objects until it is killed, and says each chunk that it has put or found.
func victim(disk, memory string, seed uint64) error {
	go func() { // the test is gone: so are we
		io.Copy(io.Discard, os.Stdin)
		os.Exit(1)
	}()
	c, err := Open(context.Background(), victimConfig(disk, memory))
	if err != nil {
		return err
	}
	r := rand.New(rand.NewPCG(seed, 1))
	z := rand.NewZipf(r, 1.1, 2, victimObjects-1)
	for {
		n := int(z.Uint64())
		o := victimObject(n)
		f, err := c.Open(o)
		if err != nil {
			return err
		}
		for i := range o.Chunks() {
			if err := f.Put(i, content(o, i)); err != nil {
				return err
			}
			fmt.Println("has", n, i)
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
}

// A SIGKILL in the middle of moves loses nothing that was announced, and each tier's counts are exact afterwards. The next process
// goes on with copies that were cut off.
func TestASIGKILLInTheMiddleOfMovesLosesNothing(t *testing.T) {
	disk, memory := t.TempDir(), memoryDir(t)
	type name struct{ object, chunk int }
	had := map[name]bool{}
	half := 0
	for round := range 6 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "TIERS_VICTIM_DISK="+disk, "TIERS_VICTIM_MEMORY="+memory, fmt.Sprint("TIERS_VICTIM_SEED=", round))
		cmd.Stderr = t.Output()
		stdin, err := cmd.StdinPipe() // held open by us: its lifeline
		if err != nil {
			t.Fatal(err)
		}
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(stdout)
		for n := 0; lines.Scan(); n++ { // what it said before it died counts, too
			var c name
			if _, err := fmt.Sscanf(lines.Text(), "has %d %d", &c.object, &c.chunk); err == nil {
				had[c] = true
			}
			if n == 150+37*round {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		cmd.Wait()
		stdin.Close()

		c, err := Open(t.Context(), victimConfig(disk, memory))
		if err != nil {
			t.Fatal(err)
		}
		loaded(t, c)
		if s := c.Stats(); s.Evictions != 0 {
			t.Errorf("%+v", s)
		}
		for n := range victimObjects {
			o := victimObject(n)
			upper, lower := c.tiers[0].Peek(o.ID()), c.tiers[1].Peek(o.ID())
			if upper.Exists && lower.Exists && upper.PresentBytes != lower.PresentBytes {
				half++
			}
			f, err := c.Open(o)
			if err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, chunk)
			for i := range o.Chunks() {
				b := buf[:o.ChunkLen(i)]
				if f.Has(i) {
					if f.ReadAt(b, int64(i)*chunk); string(b) != string(content(o, i)) {
						t.Errorf("round %d: chunk %d of %v has wrong bytes", round, i, o)
					}
				} else if had[name{n, i}] {
					t.Errorf("round %d: chunk %d of %v is lost: %+v, %+v", round, i, o, upper, lower)
				}
			}
			f.Close()
		}
		eventually(t, "what half-written chunks left is counted", func() bool { return accounted(c) == nil })
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	t.Logf("%d chunks; %d copies had been cut off", len(had), half)
	if len(had) < 60 {
		t.Error("the victims did next to nothing")
	}
}
