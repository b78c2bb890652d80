package sanity

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/larderfs/larder/cacheworker/domainsocket/shortcircuit"
	"github.com/larderfs/larder/sanity/s3test"
)

const rebootFiles = 150

func rebootDataset() map[string][]byte {
	objects := map[string][]byte{}
	for i := range rebootFiles {
		objects[fmt.Sprintf("ds/f%03d", i)] = pattern(1+i*i*60, uint64(i+1)) // up to 1.3 MiB
	}
	return objects
}

// A machine stops without a warning and comes back: another boot id; bytes of cache files have flipped, chunks hold what
// was there before, files are short; the index's log has lost its end; in the end the index is gone. Nobody reads a
// wrong byte, through the mount (with the worker and past it) or the socket, and all of it is passed through
// again although nobody read it.
func TestAfterAPowerCut(t *testing.T) {
	store := s3test.Start(t)
	objects := rebootDataset()
	put(t, store, objects)
	a := startApart(t, store.Endpoint)
	v, target := publish(t, a.Kubelet, bucket(store, "v", "ds"))
	for range 2 {
		checkAll(t, target+"/data", objects)
	}
	if err := a.Unpublish(t.Context(), v); err != nil { // it does not outlive a reboot
		t.Fatal(err)
	}
	a.end("worker", syscall.SIGKILL)

	r := rand.New(rand.NewPCG(1, 2))
	damageTier(t, r, filepath.Join(a.dir, "tier"))
	otherBoot(t, a, "one")
	a.start("worker")
	if err := a.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, target = publish(t, a.Kubelet, bucket(store, "v", "ds"))
	some := map[string][]byte{}
	for key, b := range objects {
		if r.IntN(3) == 0 {
			some[key] = b
		}
	}
	checkAll(t, target+"/data", some) // while it is being verified
	socketAll(t, target, objects)
	eventually(t, "all is verified", func() bool { return metric(t, a.dir, "larder_cache_unverified_bytes") == 0 })
	bad := metric(t, a.dir, "larder_cache_bad_chunks_total")
	if bad < 100 {
		t.Errorf("%v bad chunks, of 100 bytes that flipped", bad)
	}
	checkAll(t, target+"/data", objects)
	reads, fetched := metric(t, a.dir, "larder_fuse_reads_total"), metric(t, a.dir, "larder_store_bytes_total")
	mustShell(t, "echo 1 > /proc/sys/vm/drop_caches")
	checkAll(t, target+"/data", objects)
	small := 0.0 // these are not passed through: a READ for each
	for _, b := range objects {
		if len(b) <= 64<<10 {
			small++
		}
	}
	if n := metric(t, a.dir, "larder_fuse_reads_total") - reads; n > small {
		t.Errorf("%v READs reached the worker, of %v small files: not all else is passed through", n, small)
	}
	socketAll(t, target, objects)
	t.Logf("%v bad chunks; %v of %d bytes were fetched again", bad, fetched, total(objects))
	if fetched > float64(total(objects)) {
		t.Errorf("%v bytes fetched of %d: the cache is of no use", fetched, total(objects))
	}

	a.end("worker", syscall.SIGKILL)
	if err := os.RemoveAll(filepath.Join(a.dir, "tier", "index")); err != nil {
		t.Fatal(err)
	}
	a.start("worker") // the volume stays mounted, and its files are held by the kernel
	checkAll(t, target+"/data", objects)
	socketAll(t, target, objects)
	if err := a.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		checkAll(t, target+"/data", objects)
	}
}

// otherBoot has workers that are started from now on see another boot id.
func otherBoot(t *testing.T, a *apart, id string) {
	t.Helper()
	file, worker := filepath.Join(a.dir, "boot-"+id), filepath.Join(a.dir, "worker-"+id)
	script := fmt.Sprintf("#!/bin/sh\nexec unshare -m --propagation slave sh -c 'mount --bind %s /proc/sys/kernel/random/boot_id && exec %s \"$@\"' sh \"$@\"\n",
		file, larderBinary)
	if err := errors.Join(os.WriteFile(file, []byte(id+"\n"), 0o644), os.WriteFile(worker, []byte(script), 0o755)); err != nil {
		t.Fatal(err)
	}
	a.binary["worker"] = worker
}

// damageTier flips a byte in each of 100 cache files, puts older bytes into 20, cuts 10, and cuts the index's log.
func damageTier(t *testing.T, r *rand.Rand, tier string) {
	t.Helper()
	files, err := filepath.Glob(tier + "/objects/*/*")
	if err != nil || len(files) != rebootFiles {
		t.Fatalf("%d cache files: %v", len(files), err)
	}
	r.Shuffle(len(files), func(i, j int) { files[i], files[j] = files[j], files[i] })
	for n, name := range files[:130] {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case n < 100:
			b[r.IntN(len(b))] ^= 1 << r.IntN(8)
		case n < 120:
			at := r.IntN(len(b)) &^ 4095
			copy(b[at:], pattern(4096, 999))
		default:
			b = b[:r.IntN(len(b))]
		}
		if err := os.WriteFile(name, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	logs, err := filepath.Glob(tier + "/index/db/*.log")
	if err != nil || len(logs) == 0 {
		t.Fatalf("no log of the index: %v", err)
	}
	slices.Sort(logs)
	last := logs[len(logs)-1]
	b, err := os.ReadFile(last)
	if err != nil {
		t.Fatal(err)
	}
	end := len(bytes.TrimRight(b, "\x00"))
	if err := os.Truncate(last, int64(end-min(end/20, 2000))); err != nil {
		t.Fatal(err)
	}
}

func total(objects map[string][]byte) (n int64) {
	for _, b := range objects {
		n += int64(len(b))
	}
	return n
}

// checkAll reads files through the mount, in a child process.
func checkAll(t *testing.T, data string, objects map[string][]byte) {
	t.Helper()
	var want strings.Builder
	for key, b := range objects {
		fmt.Fprintf(&want, "%s  %s\n", sum(b), strings.TrimPrefix(key, "ds/"))
	}
	list := filepath.Join(t.TempDir(), "sums")
	if err := os.WriteFile(list, []byte(want.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := shell(t, "cd "+data+" && sha256sum --quiet -c "+list); err != nil {
		t.Fatalf("through the mount: %v\n%s", err, out)
	}
}

// socketAll reads all files through the socket.
func socketAll(t *testing.T, target string, objects map[string][]byte) {
	t.Helper()
	path, err := shortcircuit.Find(filepath.Join(target, "domain"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := shortcircuit.Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for key, want := range objects {
		f, err := c.Open(t.Context(), strings.TrimPrefix(key, "ds/"))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(io.NewSectionReader(f, 0, f.Size()))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s through the socket: %d bytes of %d, %v; or wrong ones", key, len(got), len(want), err)
		}
		f.Close()
	}
}
