package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// task is what a child process is to read, because a path below a mount may block for ever. The
// clock runs for just that and not for the start of the process.
type task struct {
	Do     string   // first, whole, pieces, mapped, each: see readers
	Files  []string // absolute
	Known  bool     // the file was looked up before the clock starts, not only its folder
	Pieces []piece  // of Files[0]
}

type piece struct{ Off, N int64 }

// report is what the child found.
type report struct {
	Seconds float64
	Bytes   int64
}

// readers are what a child can do.
var readers = map[string]func(task) (int64, error){
	"first":  task.first,
	"whole":  task.whole,
	"pieces": task.pieces,
	"mapped": task.mapped,
	"each":   task.each,
}

// read is the child process.
func read(in io.Reader, out io.Writer) error {
	var t task
	if err := json.NewDecoder(in).Decode(&t); err != nil {
		return fmt.Errorf("the task: %w", err)
	}
	do := readers[t.Do]
	if do == nil {
		return fmt.Errorf("nobody can do %q", t.Do)
	}
	for _, f := range t.Files {
		if !t.Known {
			f = filepath.Dir(f)
		}
		if _, err := os.Stat(f); err != nil {
			return err
		}
	}
	start := time.Now()
	n, err := do(t)
	if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(report{time.Since(start).Seconds(), n})
}

// first opens a file and reads its first byte.
func (t task) first() (int64, error) {
	f, err := os.Open(t.Files[0])
	if err != nil {
		return 0, err
	}
	defer f.Close()
	n, err := f.ReadAt(make([]byte, 1), 0)
	return int64(n), err
}

// whole reads all files at once, each from its beginning to its end.
func (t task) whole() (n int64, err error) {
	var g errgroup.Group
	sizes := make([]int64, len(t.Files))
	for i, name := range t.Files {
		g.Go(func() error {
			f, err := os.Open(name)
			if err != nil {
				return err
			}
			defer f.Close()
			buf := make([]byte, 1<<20)
			for {
				k, err := f.Read(buf)
				sizes[i] += int64(k)
				if err == io.EOF {
					return nil
				}
				if err != nil {
					return err
				}
			}
		})
	}
	err = g.Wait()
	for _, k := range sizes {
		n += k
	}
	return n, err
}

// pieces reads some pieces of one file, one after the other.
func (t task) pieces() (n int64, err error) {
	f, err := os.Open(t.Files[0])
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for _, p := range t.Pieces {
		k, err := f.ReadAt(make([]byte, p.N), p.Off)
		n += int64(k)
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// mapped maps a file and touches the pages of the pieces.
func (t task) mapped() (n int64, err error) {
	f, err := os.Open(t.Files[0])
	if err != nil {
		return 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	m, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return 0, err
	}
	defer unix.Munmap(m)
	sum := byte(0)
	for _, p := range t.Pieces {
		for at := p.Off; at < p.Off+p.N; at += 4096 {
			sum += m[at]
		}
		n += p.N
	}
	if sum == 0 && n == 0 {
		return 0, errors.New("nothing was read")
	}
	return n, nil
}

// each opens, reads and closes all files, one after the other.
func (t task) each() (n int64, err error) {
	for _, name := range t.Files {
		b, err := os.ReadFile(name)
		n += int64(len(b))
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// child has a process do the task.
func (s *site) child(ctx context.Context, t task) (report, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	in, err := json.Marshal(t)
	if err != nil {
		return report{}, err
	}
	self, err := os.Executable()
	if err != nil {
		return report{}, err
	}
	var out, diag bytes.Buffer
	cmd := s.stack.Command(ctx, self, "-read")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &out, &diag
	if err := cmd.Run(); err != nil {
		return report{}, fmt.Errorf("read %s: %w: %s", t.Do, err, bytes.TrimSpace(diag.Bytes()))
	}
	var r report
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		return r, fmt.Errorf("what the child said: %w", err)
	}
	return r, nil
}
