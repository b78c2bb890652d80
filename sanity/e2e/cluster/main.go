// Command cluster runs a real Kubernetes on one machine, without a container engine, a registry or
// systemd: etcd, control plane, containerd, kubelets and kube-proxy, built from Go modules.
//
// Each node is a set of private namespaces (mount, pid, net, uts, ipc) whose first process is this
// program. So the standard paths exist in it, real manifests run unmodified, and with that process
// ends everything: processes, mounts, interfaces. Of the machine only three things change: an
// interface to the nodes' network, cgroups, and files below -dir; down removes them.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

const usage = `usage: cluster [-dir DIR] COMMAND

  build                     build the programs (minutes; later runs find them in the user's cache directory)
  up [NODES]                start nodes n1 (with the control plane), n2, …; 2 by default
  down                      end all nodes and remove what they left
  load ARCHIVE…             import image archives into every node
  images DIR                write the archives of the tests' own images, for other clusters
  exec NODE COMMAND…        run a command inside a node
  restart-kubelet NODE      end the node's kubelet and start it again; likewise any program: restart NODE PROGRAM
  stop NODE PROGRAM         end one of the node's programs
  start NODE PROGRAM        start it again
  kill-node NODE            end a node as a power cut does
  start-node NODE           start it again, with its disk as it was
  env                       print shell lines that set KUBECONFIG and PATH
`

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func run() error {
	dir := flag.String("dir", filepath.Join(os.TempDir(), "larder-e2e"), "`directory` of the running cluster's state")
	cache := flag.String("cache", "", "`directory` of the built programs (default: larder-e2e in the user's cache directory)")
	flag.Usage = func() { fmt.Fprint(os.Stderr, usage); flag.PrintDefaults() }
	flag.Parse()
	if flag.NArg() == 0 {
		flag.Usage()
		return errors.New("which command?")
	}
	if *cache == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return err
		}
		*cache = filepath.Join(user, "larder-e2e")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	c := &cluster{dir: *dir, cache: *cache}
	return c.command(ctx, flag.Arg(0), flag.Args()[1:])
}

// cluster is what all commands know: where things are. Everything else is in files below dir.
type cluster struct {
	dir, cache string
}

func (c *cluster) command(ctx context.Context, name string, args []string) error {
	if want, fixed := map[string]int{"build": 0, "down": 0, "env": 0, "images": 1, "restart-kubelet": 1, "kill-node": 1, "start-node": 1,
		"restart": 2, "stop": 2, "start": 2, "node": 2}[name]; fixed && len(args) != want {
		return fmt.Errorf("%s takes %d arguments, not %d", name, want, len(args))
	}
	switch name {
	case "build":
		_, err := c.build(ctx)
		return err
	case "up":
		return c.up(ctx, args)
	case "down":
		return c.down()
	case "images":
		return c.exportImages(ctx, args[0])
	case "load":
		return c.load(ctx, args)
	case "exec":
		if len(args) < 2 {
			return errors.New("exec takes a node and a command")
		}
		return c.exec(args[0], args[1:])
	case "restart-kubelet":
		return c.ask(args[0], "restart", "kubelet")
	case "restart", "stop", "start":
		return c.ask(args[0], name, args[1])
	case "kill-node":
		return c.killNode(args[0])
	case "start-node":
		return c.startNode(args[0])
	case "env":
		fmt.Printf("export KUBECONFIG=%s PATH=%s:$PATH\n", c.kubeconfig("admin"), c.bin())
		return nil
	case "pause":
		pause()
		return nil
	case "node": // what a node's first process is called with
		index, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		return c.runNode(args[0], index)
	}
	return fmt.Errorf("no command %q\n%s", name, usage)
}

func (c *cluster) bin() string { return filepath.Join(c.dir, "bin") }

func (c *cluster) nodeDir(node string) string { return filepath.Join(c.dir, node) }

// nodes are those that were ever started.
func (c *cluster) nodes() ([]string, error) {
	dirs, err := filepath.Glob(filepath.Join(c.dir, "n[0-9]*"))
	for i, d := range dirs {
		dirs[i] = filepath.Base(d)
	}
	return dirs, err
}

func index(node string) (int, error) {
	digits, ok := strings.CutPrefix(node, "n")
	i, err := strconv.Atoi(digits)
	if !ok || err != nil || i < 1 || i > 250 {
		return 0, fmt.Errorf("%q is not the name of a node: n1, n2, …", node)
	}
	return i, nil
}
