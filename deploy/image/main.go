// Command image writes Larder's container image as an OCI archive, without a container engine.
//
// The same binary, version and Go toolchain give the same bits: what is in the image comes from
// the binary and from modules whose sums are in go.sum, all times are the epoch, and tar
// headers name no user of this machine.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

func main() {
	var s spec
	binary := flag.String("binary", "", "the static `file` that becomes /larder")
	out := flag.String("o", "larder-image.tar", "the archive's `file`")
	flag.StringVar(&s.Name, "name", "localhost/larder:dev", "the image's `name` with its tag")
	flag.StringVar(&s.Version, "version", "dev", "`version` for its labels")
	flag.StringVar(&s.Arch, "arch", "amd64", "`architecture` of the binary, as Go names it")
	flag.Parse()
	if err := run(s, *binary, *out); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(s spec, binary, out string) (err error) {
	if s.Binary, err = os.ReadFile(binary); err != nil {
		return fmt.Errorf("-binary: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(out), ".image-*") // nobody sees half an archive
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	digest, err := write(f, s)
	if err = errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), out); err != nil {
		return err
	}
	_, err = io.WriteString(os.Stdout, fmt.Sprintf("%s: %s@%s\n", out, s.Name, digest))
	return err
}
