// Package spark makes an image of unmodified Spark and its test data, without a container engine.
//
// Spark comes from PyPI, Java from the machine, TPC-H data from tpchgen-cli (PyPI too). What was made is
// kept below a cache directory, and made again when the versions or what goes into the image change.
package spark

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/larderfs/larder/sanity/e2e/archive"
)

const (
	// Image is the name of the image.
	Image = "localhost/spark:4.3.0"
	// Jar is the test job's in the image, and Class its main class.
	Jar   = "local:///opt/larder/job.jar"
	Class = "SumJob"

	pyspark = "pyspark==4.3.0"
	tpchgen = "tpchgen-cli==4.0.0"
)

//go:embed SumJob.java
var job string

//go:embed entry.sh
var entry string

// Spark is where things are.
type Spark struct {
	Archive string // of the image
	Home    string // SPARK_HOME, for spark-submit on this machine
	Java    string // JAVA_HOME
	Data    string // folders parquet and csv with table lineitem at scale 1, in 16 files each
}

// Make makes what is not in the cache directory yet; packages python3-venv and a JDK (17 or later) have to
// be installed.
func Make(ctx context.Context, cache string) (Spark, error) {
	dir := filepath.Join(cache, fmt.Sprintf("spark-%.8x", sha256.Sum256([]byte(pyspark+tpchgen))))
	s := Spark{Archive: filepath.Join(dir, fmt.Sprintf("image-%.8x.tar", sha256.Sum256([]byte(job+entry)))), Data: filepath.Join(dir, "data")}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return s, err
	}
	var err error
	if s.Java, err = javaHome(); err != nil {
		return s, err
	}
	venv := filepath.Join(dir, "venv")
	if _, err := os.Stat(filepath.Join(venv, "done")); err != nil {
		if err := install(ctx, venv); err != nil {
			return s, err
		}
	}
	homes, err := filepath.Glob(filepath.Join(venv, "lib/python3*/site-packages/pyspark"))
	if err != nil || len(homes) != 1 {
		return s, fmt.Errorf("pyspark in %s: %v, %w", venv, homes, err)
	}
	s.Home = homes[0]
	if _, err := os.Stat(s.Data); err != nil {
		if err := makeData(ctx, venv, s.Data); err != nil {
			return s, err
		}
	}
	if _, err := os.Stat(s.Archive); err != nil {
		if err := s.makeImage(ctx, dir); err != nil {
			return s, fmt.Errorf("Spark's image: %w", err)
		}
	}
	return s, nil
}

func run(ctx context.Context, name string, args ...string) error {
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err, out)
	}
	return nil
}

func javaHome() (string, error) {
	javac, err := exec.LookPath("javac")
	if err != nil {
		return "", fmt.Errorf("%w: install openjdk-17-jdk-headless", err)
	}
	if javac, err = filepath.EvalSymlinks(javac); err != nil {
		return "", err
	}
	return filepath.Dir(filepath.Dir(javac)), nil
}

func install(ctx context.Context, venv string) error {
	if err := run(ctx, "python3", "-m", "venv", "--clear", venv); err != nil {
		return err
	}
	if err := run(ctx, filepath.Join(venv, "bin/pip"), "install", "-q", pyspark, tpchgen); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(venv, "done"), nil, 0o644)
}

// makeData writes table lineitem of TPC-H at scale 1 in both formats.
func makeData(ctx context.Context, venv, data string) error {
	partial := data + ".partial"
	if err := os.RemoveAll(partial); err != nil {
		return err
	}
	for _, format := range []string{"parquet", "csv"} {
		err := run(ctx, filepath.Join(venv, "bin/tpchgen-cli"), format, "-s", "1", "--tables=lineitem", "--parts=16",
			"--output-dir="+filepath.Join(partial, format))
		if err != nil {
			return err
		}
	}
	return os.Rename(partial, data)
}

func (s Spark) makeImage(ctx context.Context, dir string) error {
	root := filepath.Join(dir, "rootfs")
	if err := os.RemoveAll(root); err != nil {
		return err
	}
	for _, f := range []func() error{
		func() error { return makeTree(root) },
		func() error { return s.copyJava(ctx, root) },
		func() error { return s.makeJob(ctx, dir, root) },
		func() error { return copyLibraries(ctx, root) },
		func() error {
			return archive.Write(s.Archive, archive.Image{Name: Image, Entrypoint: []string{"/opt/entry.sh"}, User: "185"}, root)
		},
		func() error { return os.RemoveAll(root) },
	} {
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}

// applets are what Spark's scripts call.
var applets = strings.Fields("sh ls cat id hostname sleep env mkdir rm cp mv grep sed awk head tail find sort tr wc dirname basename uname ps nice tee")

func makeTree(root string) error {
	for _, d := range []string{"opt/spark", "opt/larder", "bin", "usr/bin", "lib/x86_64-linux-gnu", "lib64", "etc", "proc", "sys", "dev"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	tmp := filepath.Join(root, "tmp")
	if err := errors.Join(os.Mkdir(tmp, 0o777), os.Chmod(tmp, 0o777|fs.ModeSticky)); err != nil {
		return err
	}
	for _, a := range applets {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", a)); err != nil {
			return err
		}
	}
	if err := os.Symlink("/bin/busybox", filepath.Join(root, "usr/bin/env")); err != nil {
		return err
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return err
	}
	files := map[string]string{"bin/busybox": busybox, "bin/bash": "/bin/bash"}
	for to, from := range files {
		if err := copyFile(filepath.Join(root, to), from); err != nil {
			return err
		}
	}
	for name, text := range map[string]string{
		"etc/passwd": "root:x:0:0:root:/:/bin/sh\nspark:x:185:0:spark:/tmp:/bin/sh\n", "etc/group": "root:x:0:\n",
		"etc/nsswitch.conf": "hosts: files dns\n", "opt/entry.sh": entry,
	} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o755); err != nil {
			return err
		}
	}
	return nil
}

func (s Spark) copyJava(ctx context.Context, root string) error {
	// -L: Debian's JDK has links into /etc. What they lead to nowhere is not needed.
	err := run(ctx, "cp", "-rL", s.Java, filepath.Join(root, "opt/jdk"))
	if _, statErr := os.Stat(filepath.Join(root, "opt/jdk/lib/server/libjvm.so")); statErr != nil {
		return errors.Join(err, statErr)
	}
	for _, d := range []string{"jmods", "man", "include", "lib/src.zip", "lib/ct.sym"} {
		if err := os.RemoveAll(filepath.Join(root, "opt/jdk", d)); err != nil {
			return err
		}
	}
	return run(ctx, "cp", "-a", filepath.Join(s.Home, "jars"), filepath.Join(s.Home, "bin"), filepath.Join(s.Home, "sbin"), filepath.Join(root, "opt/spark"))
}

func (s Spark) makeJob(ctx context.Context, dir, root string) error {
	classes := filepath.Join(dir, "classes")
	if err := errors.Join(os.RemoveAll(classes), os.MkdirAll(classes, 0o755)); err != nil {
		return err
	}
	source := filepath.Join(dir, Class+".java")
	if err := os.WriteFile(source, []byte(job), 0o644); err != nil {
		return err
	}
	if err := run(ctx, filepath.Join(s.Java, "bin/javac"), "-nowarn", "-cp", filepath.Join(s.Home, "jars/*"), "-d", classes, source); err != nil {
		return err
	}
	return run(ctx, filepath.Join(s.Java, "bin/jar"), "cf", filepath.Join(root, "opt/larder/job.jar"), "-C", classes, ".")
}

var library = regexp.MustCompile(`/[^ ]+\.so[^ ]*`)

// copyLibraries copies what java, its libraries, bash and Spark's native code load.
func copyLibraries(ctx context.Context, root string) error {
	programs := []string{filepath.Join(root, "opt/jdk/bin/java"), "/bin/bash"}
	err := filepath.WalkDir(filepath.Join(root, "opt/jdk/lib"), func(p string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(p, ".so") {
			programs = append(programs, p)
		}
		return err
	})
	if err != nil {
		return err
	}
	libraries := []string{}
	for _, p := range programs {
		out, err := exec.CommandContext(ctx, "ldd", p).Output()
		if err != nil {
			return fmt.Errorf("ldd %s: %w", p, err)
		}
		libraries = append(libraries, library.FindAllString(string(out), -1)...)
	}
	for _, l := range []string{"libpthread.so.0", "libdl.so.2", "libm.so.6", "librt.so.1", "libstdc++.so.6", "libgcc_s.so.1", "libnss_files.so.2", "libnss_dns.so.2", "libresolv.so.2"} {
		libraries = append(libraries, "/lib/x86_64-linux-gnu/"+l) // zstd-jni and the resolver load them by name
	}
	slices.Sort(libraries)
	for _, l := range slices.Compact(libraries) {
		if _, err := os.Stat(l); err != nil || strings.HasPrefix(l, root) {
			continue
		}
		if err := copyFile(filepath.Join(root, "lib/x86_64-linux-gnu", filepath.Base(l)), l); err != nil {
			return err
		}
	}
	const loader = "/lib64/ld-linux-x86-64.so.2"
	return copyFile(filepath.Join(root, loader), loader)
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		return errors.Join(err, out.Close())
	}
	return out.Close()
}
