package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.opentelemetry.io/otel"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/larderfs/larder/cacheworker"
	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/telemetry"
	"github.com/larderfs/larder/cacheworker/workerpb"
	"github.com/larderfs/larder/driver"
	"github.com/larderfs/larder/driver/broker"
	"github.com/larderfs/larder/master"
	"github.com/larderfs/larder/master/client"
)

// Names in a run directory, which worker, broker and node service share.
const (
	brokerSocket  = "broker.sock"
	controlSocket = "worker.sock"
	masterSocket  = "master.sock"
)

func hostname() string {
	name, err := os.Hostname()
	if err != nil || name == "" {
		return "localhost"
	}
	return name
}

func masterCommand() *cobra.Command {
	var c master.Config
	var l listens
	var kubeconfig string
	return service("master", "Serve the cluster's memory: volumes, workers, mounts",
		`The master keeps volumes, workers and mounts in etcd: embedded in its --dir by default, or an
external cluster by --etcd-endpoints. Three masters embed one etcd together by --name and
--initial-cluster. It is never on the path of a read.`,
		func(f *pflag.FlagSet) {
			f.StringVar(&c.Dir, "dir", "/var/lib/larder/master", "`directory` of the embedded etcd")
			f.StringSliceVar(&c.EtcdEndpoints, "etcd-endpoints", nil, "`URLs` of an external etcd, instead of the embedded one")
			f.StringVar(&c.EtcdCAFile, "etcd-ca", "", "PEM `file` with the etcd's certificate authority")
			f.StringVar(&c.EtcdCertFile, "etcd-cert", "", "PEM `file` with the client certificate")
			f.StringVar(&c.EtcdKeyFile, "etcd-key", "", "PEM `file` with its key")
			f.StringVar(&c.EtcdPrefix, "etcd-prefix", "larder/", "`prefix` of all keys in etcd")
			f.StringVar(&c.Listen, "listen", "unix:///run/larder/master.sock", "gRPC `address`: unix:///path or host:port")
			l.flags(f, "127.0.0.1:9810")
			f.DurationVar(&c.WorkerLease, "worker-lease", 30*time.Second, "how long a worker is believed alive without a heartbeat")
			f.DurationVar(&c.WorkerForget, "worker-forget", time.Hour, "how long one without a heartbeat is listed as gone")
			f.BoolVar(&c.MountObjects, "mount-objects", false, "take the mounts of the namespace from the cluster's Mount objects (mounts.larder.dev), and from no call; and do what its Load objects (loads.larder.dev) ask for")
			f.StringVar(&kubeconfig, "kubeconfig", "", "kubeconfig `file` for those (default the pod's service account)")
			f.StringVar(&c.Member.Name, "name", "", "`name` of this one of several masters")
			f.StringVar(&c.Member.Cluster, "initial-cluster", "", "all masters that embed one etcd, as `NAME=URL,…`, alike on each: a=http://host:2380,b=…")
			f.StringVar(&c.Member.Listen, "peer-listen", ":2380", "`address` for the other masters")
			f.StringVar(&c.Member.CAFile, "peer-ca", "", "PEM `file` with the authority of the masters' certificates, for https URLs")
			f.StringVar(&c.Member.CertFile, "peer-cert", "", "PEM `file` with this master's certificate")
			f.StringVar(&c.Member.KeyFile, "peer-key", "", "PEM `file` with its key")
		},
		func(ctx context.Context, log *slog.Logger) error {
			c.Log, c.Version, c.MetricsListen = log, version, l.metrics
			if err := l.validate(); err != nil {
				return err
			}
			var err error
			if c.Tracer, err = l.tracer(ctx, "master", hostname(), log); err != nil {
				return err
			}
			defer closing(c.Tracer, log)
			m, err := master.New(c)
			if err != nil {
				return err
			}
			g, ctx := errgroup.WithContext(ctx)
			g.Go(func() error { return m.Run(ctx) })
			g.Go(func() error { return cacheworker.ServeProfiles(ctx, l.profiles) })
			if c.MountObjects {
				g.Go(func() error { return followObjects(ctx, m, kubeconfig, log) })
			}
			return g.Wait()
		})
}

// featureFlags registers what a worker is told alike on its own and in `up`.
func featureFlags(f *pflag.FlagSet, c *cacheworker.Features) {
	f.BoolVar(&c.NoPassthrough, "no-passthrough", false, "do without FUSE passthrough, as on kernels before 6.9")
	f.BoolVar(&c.NoResend, "no-resend", false, "do without FUSE_NOTIFY_RESEND, as on kernels before 6.9")
	f.BoolVar(&c.NoSplice, "no-splice", false, "copy instead of splicing")
}

func workerCommand() *cobra.Command {
	var (
		c          cacheworker.Config
		l          listens
		t          = tierFlag{tiers: []tier{{dir: "/var/cache/larder"}}}
		run        string
		minFree    size
		memory     size
		views      []string
		tierWait   time.Duration
		linger     time.Duration
		socketDir  string
		parameters map[string]string
	)
	cmd := service("worker", "Serve the node's cache",
		`The cache worker of one node. It needs no privilege: the broker (larder csi node) makes the mounts
and shares them. It may be stopped, killed and upgraded at any time; readers wait for the next one.`,
		func(f *pflag.FlagSet) {
			f.Var(&t, "tier", "cache directory, its capacity, and its kind, MEM, SSD or HDD (repeated; SSD unless it says)")
			f.DurationVar(&linger, "linger", 0, "how long, when told to stop, to ask the broker whether Larder is being uninstalled: then volumes in use are waited for")
			f.StringVar(&socketDir, "socket-dir", "", "be a pod's sidecar: serve the volume of --parameter by a socket in this `directory`, without a broker and without a mount")
			f.StringToStringVar(&parameters, "parameter", nil, "parameter of that volume, as in a StorageClass (repeated): source=s3://bucket/prefix")
			f.DurationVar(&tierWait, "tier-wait", 0, "how long to wait for the node plugin to give the tiers to this user")
			f.StringArrayVar(&views, "view", nil, "each tier's `directory` through a read-only mount, in the order of --tier; without it nothing is passed through")
			f.Var(&minFree, "min-free", "bytes of each tier's file system that stay free")
			f.Int64Var(&c.MinFreeInodes, "min-free-inodes", 0, "inodes of each tier's file system that stay free")
			f.Var(&memory, "memory", "bytes that this process may use (default nine tenths of its cgroup's limit)")
			f.StringVar(&run, "run-dir", "/run/larder", "`directory` of the sockets that worker, broker and node service share")
			f.StringVar(&c.Node, "node-name", hostname(), "`name` of this node")
			f.StringVar(&c.Instance, "instance", "", "`name`, of its pod say, by which a worker that took the cache over knows the one that it has it from, and does not give it back")
			f.StringVar(&c.Master, "master", "", "`address` of the master: unix:///path or host:port, several with commas between; empty for none")
			f.StringVar(&c.Listen, "listen", "", "TCP `address` where masters ask what is cached: host:port; empty for none")
			f.StringVar(&c.Advertise, "advertise", "", "IP `address` at which masters reach that (default that of --listen, or the one towards the master)")
			l.flags(f, "127.0.0.1:9811")
			f.StringVar(&c.FileRoot, "file-root", "", "`directory` below which file:// sources may lie")
			f.StringVar(&c.FileRootPath, "file-root-path", "", "`path` by which to open the file root")
			f.MarkHidden("file-root-path")
			f.StringVar(&c.CredentialRoot, "credential-root", "", "`directory` below which mounts of the namespace may name files with their credentials (file:/path); empty allows none")
			f.BoolVar(&c.Standby, "standby", false, "wait until no other worker has the cache, instead of asking for it")
			f.MarkHidden("standby")
			featureFlags(f, &c.Features)
		},
		func(ctx context.Context, log *slog.Logger) error {
			if n := len(views); n != 0 && n != len(t.tiers) {
				return fmt.Errorf("--view: %d views of %d tiers", n, len(t.tiers))
			}
			for i, t := range t.tiers {
				c.Tiers = append(c.Tiers, cacheworker.Tier{Dir: t.dir, Kind: t.kind, CapacityBytes: t.bytes})
				if len(views) > 0 {
					c.Tiers[i].ViewDir = views[i]
				}
			}
			c.MinFreeBytes, c.MemoryBytes, c.Getenv = minFree.bytes, memory.bytes, os.Getenv
			c.BrokerSocket, c.ControlSocket = filepath.Join(run, brokerSocket), filepath.Join(run, controlSocket)
			c.Log, c.Version, c.MetricsListen, c.Profiles = log, version, l.metrics, l.profiles
			if err := alone(&c, socketDir, parameters); err != nil {
				return err
			}
			if err := l.validate(); err != nil {
				return err
			}
			var err error
			if c.Tracer, err = l.tracer(ctx, "worker", c.Node, log); err != nil {
				return err
			}
			defer closing(c.Tracer, log)
			w, err := cacheworker.New(c)
			if err != nil {
				return err
			}
			if err := awaitTiers(ctx, t.tiers, tierWait, log); err != nil || ctx.Err() != nil {
				return err
			}
			if linger == 0 {
				return w.Run(ctx)
			}
			life, end := context.WithCancel(context.WithoutCancel(ctx))
			defer end()
			defer context.AfterFunc(ctx, func() { w.Linger(hurry(ctx), linger); end() })()
			return w.Run(life)
		})
	cmd.AddCommand(workerListCommand(), workerDrainCommand(), workerUndrainCommand())
	return cmd
}

func brokerFlags(f *pflag.FlagSet, c *broker.Config, run *string) {
	f.StringVar(run, "run-dir", "/run/larder", "`directory` of the sockets that worker, broker and node service share")
	f.StringArrayVar(&c.TierDirs, "tier-dir", []string{"/var/cache/larder"}, "a cache `directory` of the worker: backing files lie in its file system (repeated)")
	f.Uint32Var(&c.WorkerUID, "worker-uid", 0, "user `id` of the worker")
	f.StringVar(&c.Name, "mount-source", "", "`name` of the mounts in the mount table (default made from --run-dir)")
	f.DurationVar(&c.TakeoverDeadline, "takeover-deadline", 10*time.Minute, "how long readers wait for a worker before their mount is given up")
}

// mountSource names a directory's mounts in the mount table.
func mountSource(dir string) string {
	return fmt.Sprintf("larder-%x", sha256.Sum256([]byte(dir)))[:len("larder-")+16]
}

func newBroker(c broker.Config, run string, log *slog.Logger) (*broker.Broker, error) {
	c.Socket, c.Log = filepath.Join(run, brokerSocket), log
	if c.Name == "" {
		c.Name = mountSource(run)
	}
	warnRequestTimeout(log)
	return broker.New(c)
}

// warnRequestTimeout says that a sysctl would kill mounts that wait for a worker.
func warnRequestTimeout(log *slog.Logger) {
	const name = "/proc/sys/fs/fuse/max_request_timeout"
	b, err := os.ReadFile(name)
	if s := strings.TrimSpace(string(b)); err == nil && s != "0" {
		log.Warn("sysctl fs.fuse.max_request_timeout is not 0: mounts die while they wait for a worker", "seconds", s)
	}
}

// brokerCommand is a child of `up`; elsewhere the broker is part of `csi node`.
func brokerCommand() *cobra.Command {
	var c broker.Config
	var run string
	var l listens
	cmd := service("broker", "Hold the node's mounts (part of csi node; a child of up)", "",
		func(f *pflag.FlagSet) {
			brokerFlags(f, &c, &run)
			f.StringArrayVar(&c.ViewDirs, "view", nil, "where to show each tier read-only, in the order of --tier-dir")
			l.flags(f, "")
			f.BoolVar(&c.UnmountAtExit, "unmount-at-exit", false, "leave no mount")
		},
		func(ctx context.Context, log *slog.Logger) error {
			b, err := newBroker(c, run, log)
			if err = errors.Join(err, l.validate()); err != nil {
				return err
			}
			g, ctx := errgroup.WithContext(ctx)
			g.Go(func() error { return b.Run(ctx) })
			g.Go(func() error { return l.serve(ctx, "broker", telemetry.Probes{}, b.Mounts().Collector()) })
			return g.Wait()
		})
	cmd.Hidden = true
	return cmd
}

func csiCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "csi", Short: "Serve CSI: the node service with the broker, or the controller"}
	cmd.AddCommand(csiNodeCommand(), csiControllerCommand())
	return cmd
}

func csiControllerCommand() *cobra.Command {
	var (
		d      = driver.Config{Controller: true}
		target string
		l      listens
	)
	return service("controller", "Serve the CSI controller, beside the external-provisioner", "",
		func(f *pflag.FlagSet) {
			f.StringVar(&d.Endpoint, "endpoint", "unix:///run/larder/csi.sock", "CSI `endpoint`")
			f.StringVar(&target, "master", "unix:///run/larder/master.sock", "`address` of the master: unix:///path or host:port, several with commas between")
			l.flags(f, "127.0.0.1:9813")
			sourceFlags(f, &d.FileRoot, &d.InlineEndpoints)
		},
		func(ctx context.Context, log *slog.Logger) error {
			if err := l.validate(); err != nil {
				return err
			}
			tracer, err := l.tracer(ctx, "controller", hostname(), log)
			if err != nil {
				return err
			}
			defer closing(tracer, log)
			m, err := client.New(client.Config{Target: target, Tracer: tracer, Log: log})
			if err != nil {
				return err
			}
			defer m.Close()
			d.Tracer = tracer
			d.Log, d.Version = log, version
			d.Ready = func(ctx context.Context) error { _, err := m.Status(ctx); return err }
			srv, err := driver.New(d, m, nil, nil)
			if err != nil {
				return err
			}
			self, err := dialUnix(strings.TrimPrefix(d.Endpoint, "unix://"))
			if err != nil {
				return err
			}
			defer self.Close()
			g, ctx := errgroup.WithContext(ctx)
			g.Go(func() error { return srv.Run(ctx) })
			g.Go(func() error {
				return l.serve(ctx, "controller", telemetry.Probes{Live: csiAnswers(self), Ready: d.Ready}, srv.Collector())
			})
			return g.Wait()
		})
}

// csiAnswers is the liveness of a CSI service: a call by its own socket.
func csiAnswers(self *grpc.ClientConn) func(context.Context) error {
	return func(ctx context.Context) error {
		_, err := csi.NewIdentityClient(self).GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
		return err
	}
}

func sourceFlags(f *pflag.FlagSet, fileRoot *string, inlineEndpoints *[]string) {
	f.StringVar(fileRoot, "file-root", "", "`directory` below which file:// sources may lie; empty allows none")
	f.StringArrayVar(inlineEndpoints, "inline-endpoint", nil, "S3 endpoint `URL` that inline volumes may name (repeated)")
}

func tenantFlags(f *pflag.FlagSet, driverCredentials, stsEndpoints *[]string) {
	f.StringArrayVar(driverCredentials, "driver-credentials", nil,
		"`NAMESPACE=s3://bucket/prefix[,endpoint=URL]`: inline volumes of pods of that Kubernetes namespace may read there with the worker's own credential (repeated)")
	f.StringArrayVar(stsEndpoints, "sts-endpoint", nil, "token service `URL`, beside AWS's own, that inline volumes may name (repeated)")
}

// node is the CSI server of a node and what it talks to.
type node struct {
	srv    *driver.Server
	broker *brokerwire.Client
	worker *grpc.ClientConn
	ready  func(context.Context) error // nil when a volume can be published now
}

// newNode wires the node service to broker and worker in a run directory; volumes makes it a
// controller too.
func newNode(d driver.Config, run string, volumes driver.Volumes) (*node, error) {
	conn, err := dialUnix(filepath.Join(run, controlSocket), d.Tracer.DialOptions()...)
	if err != nil {
		return nil, err
	}
	n := &node{broker: brokerwire.NewClient(filepath.Join(run, brokerSocket)), worker: conn}
	also := d.Ready
	d.Ready = func(ctx context.Context) error {
		if _, err := n.broker.Mounts(ctx); err != nil {
			return fmt.Errorf("broker: %w", err)
		}
		if _, err := workerpb.NewWorkerClient(conn).Status(ctx, &workerpb.StatusRequest{}); err != nil {
			return fmt.Errorf("worker: %w", err)
		}
		if also != nil {
			return also(ctx)
		}
		return nil
	}
	n.ready = d.Ready
	n.srv, err = driver.New(d, volumes, n.broker, driver.WorkerStats{Conn: conn})
	if err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

func (n *node) Close() error { return errors.Join(n.broker.Close(), n.worker.Close()) }

// dialUnix connects lazily to a gRPC socket, however long its path.
func dialUnix(path string, more ...grpc.DialOption) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///worker", append(more,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(unixDialer(path)),
		grpc.WithConnectParams(quickBackoff))...)
}

// listens is where a process tells of itself.
type listens struct {
	metrics, profiles string
	trace             telemetry.TraceConfig
}

func (l *listens) flags(f *pflag.FlagSet, metrics string) {
	f.StringVar(&l.metrics, "metrics-listen", metrics, "`address` of /metrics, /healthz and /readyz; empty for none")
	f.StringVar(&l.profiles, "pprof", "", "loopback `address`, or unix:///path, of /debug/pprof/; empty for none")
	l.traceFlags(f)
}

func (l *listens) traceFlags(f *pflag.FlagSet) {
	f.StringVar(&l.trace.Endpoint, "trace-endpoint", "", "send OpenTelemetry traces by OTLP/gRPC to this `address`: host:port, http://host:port or https://host:port; empty for none")
	f.Float64Var(&l.trace.Sample, "trace-sample", 0.01, "`share` of the requests that are traced whose caller does not decide that")
}

// tracer is nil without --trace-endpoint.
func (l *listens) tracer(ctx context.Context, process, node string, log *slog.Logger) (*telemetry.Tracer, error) {
	c := l.trace
	c.Process, c.Node, c.Version = process, node, version
	t, err := telemetry.NewTracer(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("--trace-endpoint: %w", err)
	}
	if t != nil {
		var told atomic.Int64 // a collector that is away is away for each batch
		otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) {
			now := time.Now().Unix()
			if last := told.Load(); now-last >= 60 && told.CompareAndSwap(last, now) {
				log.Warn("traces are not sent", "endpoint", c.Endpoint, "err", err)
			}
		}))
	}
	return t, nil
}

// closing ends a tracer; what cannot be sent is lost.
func closing(t *telemetry.Tracer, log *slog.Logger) {
	if err := t.Close(); err != nil {
		log.Warn("the last traces are not sent", "err", err)
	}
}

func (l *listens) validate() error {
	var errs []error
	if err := telemetry.CheckLocal(l.profiles); l.profiles != "" && err != nil {
		errs = append(errs, fmt.Errorf("--pprof: %w", err))
	}
	if err := l.trace.Validate(); err != nil {
		errs = append(errs, fmt.Errorf("--trace-endpoint, --trace-sample: %w", err))
	}
	return errors.Join(errs...)
}

// serve answers there until ctx ends.
func (l *listens) serve(ctx context.Context, process string, p telemetry.Probes, more ...prometheus.Collector) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return cacheworker.ServeMetrics(ctx, l.metrics, telemetry.NewRegistry(append(more, telemetry.Info(process, version))...), p)
	})
	g.Go(func() error { return cacheworker.ServeProfiles(ctx, l.profiles) })
	return g.Wait()
}
