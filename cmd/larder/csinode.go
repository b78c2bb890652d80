package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/larderfs/larder/cacheworker/telemetry"
	"github.com/larderfs/larder/driver"
	"github.com/larderfs/larder/driver/broker"
	"github.com/larderfs/larder/driver/kube"
	"github.com/larderfs/larder/driver/kubelet"
	"github.com/larderfs/larder/driver/localpv"
)

// csiNode is the node plugin: CSI node service, broker, and what the kubelet has to know.
type csiNode struct {
	driver  driver.Config
	broker  broker.Config
	run     string
	mounts  string // where inline volumes are mounted; "" is run
	listens listens

	registry  string // the kubelet's folder for registrations; "" registers nowhere
	taint     string // key of the startup taint; "" removes none
	daemonSet string // namespace/name of what runs this; "" outside of a cluster
	drain     time.Duration
	cluster   kubernetes

	log  *slog.Logger
	lost func(paths []string, why string) // set by newParts
}

func csiNodeCommand() *cobra.Command {
	n := &csiNode{driver: driver.Config{Node: true}}
	return service("node", "Serve the CSI node service, with the broker that makes and holds the mounts",
		`Privileged: it mounts. When it is stopped the mounts stay with the worker, which gives them to the next one.`,
		func(f *pflag.FlagSet) {
			brokerFlags(f, &n.broker, &n.run)
			f.StringArrayVar(&n.broker.ViewDirs, "view", nil, "show each tier read-only at a `directory`, for the worker, in the order of --tier-dir")
			f.StringVar(&n.mounts, "mount-dir", "", "`directory` of the mounts of inline volumes, which the kubelet has to see (default --run-dir)")
			f.StringVar(&n.driver.Endpoint, "endpoint", "unix:///run/larder/csi.sock", "CSI `endpoint`")
			f.StringVar(&n.driver.NodeID, "node-name", hostname(), "`name` of this node")
			n.listens.flags(f, "127.0.0.1:9812")
			f.StringVar(&n.registry, "registration-dir", "", "register with the kubelet that watches this `directory`")
			f.StringVar(&n.taint, "startup-taint", "", "`key` of a taint to remove from this node once volumes can be published")
			f.StringVar(&n.daemonSet, "daemonset", "", "`namespace/name` of the DaemonSet that runs this: if it is gone when this is told to stop, volumes in use are waited for")
			f.DurationVar(&n.drain, "drain-timeout", time.Minute, "how long, when told to stop, to wait for a worker that holds all mounts")
			sourceFlags(f, &n.driver.FileRoot, &n.driver.InlineEndpoints)
			tenantFlags(f, &n.driver.DriverCredentials, &n.driver.STSEndpoints)
			n.cluster.flags(f)
		},
		func(ctx context.Context, log *slog.Logger) error {
			n.log = log
			return n.serve(ctx)
		})
}

// serve stops in order: first the CSI service, then, when a worker holds all mounts, the broker. If Larder is being uninstalled, all of it goes on until no volume is in use:
// nobody else could unmount them, and their pods could not end.
func (n *csiNode) serve(ctx context.Context) (err error) {
	if err := n.validate(); err != nil {
		return err
	}
	if n.driver.Tracer, err = n.listens.tracer(ctx, "node", n.driver.NodeID, n.log); err != nil {
		return err
	}
	defer closing(n.driver.Tracer, n.log)
	if err := n.giveDirs(); err != nil {
		return err
	}
	n.broker.Lost = func(paths []string, why string) { n.lost(paths, why) }
	br, err := newBroker(n.broker, n.run, n.log)
	if err != nil {
		return err
	}
	parts, err := n.newParts(br)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, parts.close()) }()

	bg := context.WithoutCancel(ctx)
	brokerStage, stopBroker := stage(bg, br.Run)
	csiStage, stopCSI := stage(bg, parts.serve)
	select {
	case <-ctx.Done():
		parts.finish(hurry(ctx))
	case err = <-csiStage:
	case err = <-brokerStage:
		return errors.Join(err, stopCSI())
	}
	err = errors.Join(err, stopCSI())
	parts.leave(hurry(ctx))
	return errors.Join(err, stopBroker())
}

func (n *csiNode) validate() error {
	errs := []error{n.listens.validate()}
	if space, name, ok := strings.Cut(n.daemonSet, "/"); n.daemonSet != "" && (!ok || space == "" || name == "" || strings.Contains(name, "/")) {
		errs = append(errs, fmt.Errorf("--daemonset %q: want namespace/name", n.daemonSet))
	}
	if n.registry != "" && !filepath.IsAbs(n.registry) {
		errs = append(errs, fmt.Errorf("--registration-dir %q: want an absolute path", n.registry))
	}
	if n.drain < 0 {
		errs = append(errs, fmt.Errorf("--drain-timeout %v is negative", n.drain))
	}
	return errors.Join(errs...)
}

// nodeParts is what runs beside the broker.
type nodeParts struct {
	*csiNode
	node         *node
	collect      prometheus.Collector
	registration *kubelet.Registration // nil without --registration-dir
	kube         *kube.Client          // nil outside of a cluster
	local        *localpv.Controller   // nil without --local-datasets
	self         *grpc.ClientConn      // to our own CSI socket
	leaving      func()                // tells the worker that nobody follows
	seen         atomic.Bool           // the DaemonSet could be asked for, and was there
}

func (n *csiNode) newParts(br *broker.Broker) (p *nodeParts, err error) {
	p = &nodeParts{csiNode: n, collect: br.Mounts().Collector(), leaving: br.Leaving}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
		}
	}()
	n.driver.RunDir, n.driver.Log, n.driver.Version = cmp.Or(n.mounts, n.run), n.log, version
	socket := strings.TrimPrefix(n.driver.Endpoint, "unix://")
	if n.registry != "" {
		if err := os.MkdirAll(filepath.Dir(socket), 0o750); err != nil {
			return p, err
		}
		p.registration, err = kubelet.NewRegistration(kubelet.Config{Dir: n.registry, Name: driver.Name, Endpoint: socket, Log: n.log})
		if err != nil {
			return p, err
		}
	}
	if p.kube, err = n.cluster.connect(n.log, n.taint != "" || n.daemonSet != ""); err != nil {
		return p, err
	}
	n.driver.Pods, n.driver.KubeletDir = nodePods(p.kube, n.driver.NodeID), n.cluster.kubelet
	n.driver.Secrets = secretReader(p.kube)
	if p.node, err = newNode(n.driver, n.run, nil); err != nil {
		return p, err
	}
	if p.local, err = n.cluster.localVolumes(p.kube, n.driver, p.node.broker); err != nil {
		return p, err
	}
	n.lost = func(paths []string, why string) {
		p.node.srv.Lost(paths, why)
		if p.local != nil {
			p.local.Wake()
		}
	}
	p.self, err = dialUnix(socket)
	return p, err
}

func (p *nodeParts) close() (err error) {
	if p.node != nil {
		err = p.node.Close()
	}
	if p.self != nil {
		err = errors.Join(err, p.self.Close())
	}
	return err
}

func (p *nodeParts) serve(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return p.node.srv.Run(ctx) })
	g.Go(func() error { return p.introduce(ctx) })
	if p.local != nil {
		g.Go(func() error { return p.local.Run(ctx) })
	}
	g.Go(func() error {
		return p.listens.serve(ctx, "node", telemetry.Probes{Live: csiAnswers(p.self), Ready: p.ready}, p.collect, p.node.srv.Collector())
	})
	return g.Wait()
}

// ready says that a pod of this node would get its volume now.
func (p *nodeParts) ready(ctx context.Context) error {
	if p.registration != nil && p.registration.Err() != nil {
		return p.registration.Err()
	}
	return p.node.ready(ctx)
}

// introduce makes the driver known to the kubelet, then lets pods come to the node.
func (p *nodeParts) introduce(ctx context.Context) error {
	if err := p.until(ctx, "the CSI service answers", csiAnswers(p.self)); err != nil {
		return nil
	}
	g, ctx := errgroup.WithContext(ctx)
	if p.registration != nil {
		g.Go(func() error { return p.registration.Run(ctx) })
	}
	if p.taint != "" {
		g.Go(func() error { p.untaint(ctx); return nil })
	}
	if p.daemonSet != "" {
		g.Go(func() error { p.until(ctx, "the DaemonSet is found", p.see); return nil })
	}
	return g.Wait()
}

// see asks once whether our DaemonSet can be asked for: who never may would take each update for the end.
func (p *nodeParts) see(ctx context.Context) error {
	space, name, _ := strings.Cut(p.daemonSet, "/")
	there, err := p.kube.DaemonSet(ctx, space, name)
	if err == nil && !there {
		err = fmt.Errorf("daemonset %s is not there, or not to be seen", p.daemonSet)
	}
	p.seen.Store(err == nil)
	return err
}

func (p *nodeParts) untaint(ctx context.Context) {
	if p.until(ctx, "volumes can be published", p.ready) != nil {
		return
	}
	p.until(ctx, "the startup taint is removed", func(ctx context.Context) error {
		removed, err := kubelet.RemoveTaint(ctx, p.kube.Nodes(), p.driver.NodeID, p.taint)
		if removed {
			p.log.Info("startup taint removed", "node", p.driver.NodeID, "taint", p.taint)
		}
		return err
	})
}

// retry is the pause between questions to which the answer may take a while.
const retry = 250 * time.Millisecond

// until asks again and again until the answer is nil or ctx ends; then its error is returned. What is
// in the way is told now and then.
func (n *csiNode) until(ctx context.Context, what string, check func(context.Context) error) error {
	var told time.Time
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil && time.Since(told) >= time.Minute {
			told = time.Now()
			n.log.Info("waiting until "+what, "now", err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(retry):
		}
	}
}

// finish goes on as before until no volume is in use, if Larder is being uninstalled.
func (p *nodeParts) finish(ctx context.Context) {
	if !p.seen.Load() {
		return
	}
	space, name, _ := strings.Cut(p.daemonSet, "/")
	asked, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	there, err := p.kube.DaemonSet(asked, space, name)
	if err != nil {
		p.log.Warn("is Larder being uninstalled? Taken for an update", "err", err)
		return
	}
	if there {
		return
	}
	p.log.Info("larder is being uninstalled: the node plugin stays until no volume is in use")
	p.leaving()
	if p.local != nil {
		p.local.Withdraw()
	}
	p.until(ctx, "no volume is in use", func(ctx context.Context) error {
		held, err := p.node.broker.Mounts(ctx)
		if err == nil && len(held) > 0 {
			err = fmt.Errorf("volumes in use: %d", len(held))
		}
		return err
	})
}

const askTimeout = 5 * time.Second // for the Kubernetes API, when the process is to end

// leave waits until a worker holds every mount, or they would be lost with this process.
func (p *nodeParts) leave(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, p.drain)
	defer cancel()
	err := p.until(ctx, "a worker holds all mounts", func(ctx context.Context) error {
		held, err := p.node.broker.Mounts(ctx)
		for _, m := range held {
			if !m.Served {
				return fmt.Errorf("volume %q has no worker", m.VolumeID)
			}
		}
		return err
	})
	if err != nil {
		p.log.Error("mounts without a worker are lost with this process")
	}
}

// giveDirs gives the worker what it owns, and does without tiers that cannot be given.
func (n *csiNode) giveDirs() error {
	b, views := &n.broker, n.broker.ViewDirs
	if len(views) != 0 && len(views) != len(b.TierDirs) {
		return fmt.Errorf("--view: %d views of %d tiers", len(views), len(b.TierDirs))
	}
	given, err := giveTiers(b.TierDirs, int(b.WorkerUID), n.log)
	if err != nil {
		return err
	}
	var dirs []string
	b.ViewDirs = nil
	for _, i := range given {
		dirs = append(dirs, b.TierDirs[i])
		if len(views) > 0 {
			b.ViewDirs = append(b.ViewDirs, views[i])
		}
	}
	b.TierDirs = dirs
	return giveRunDir(n.run, int(b.WorkerUID))
}

// giveTiers gives the worker its tiers, and returns the numbers of those that it has then: one of several may be on a disk
// that is broken.
func giveTiers(dirs []string, worker int, log *slog.Logger) (given []int, err error) {
	var errs []error
	for i, d := range dirs {
		err := os.MkdirAll(d, 0o755)
		if err == nil {
			err = chownTree(d, worker)
		}
		if err == nil {
			given = append(given, i)
			continue
		}
		errs = append(errs, fmt.Errorf("tier %s: %w", d, err))
		log.Error("a tier cannot be used", "dir", d, "err", err)
	}
	if len(given) == 0 {
		return nil, errors.Join(errs...)
	}
	return given, nil
}

// giveRunDir gives the worker a place for its sockets.
func giveRunDir(run string, worker int) error {
	if err := os.MkdirAll(run, 0o755); err != nil {
		return err
	}
	// Sticky, so that the worker cannot put a socket in the broker's place.
	return errors.Join(os.Chown(run, 0, worker), os.Chmod(run, os.ModeSticky|0o770))
}
