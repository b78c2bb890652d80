package master

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/larderfs/larder/cacheworker/telemetry"
)

// Config is all that a master needs. Either Dir or EtcdEndpoints is required, and Listen.
type Config struct {
	Dir string // of the embedded etcd; made with mode 0700; owned by this process

	Member Member // of several masters that embed one etcd; zero for a single one

	EtcdEndpoints []string // an external etcd instead
	EtcdCAFile    string   // PEM files, for https endpoints
	EtcdCertFile  string
	EtcdKeyFile   string
	EtcdPrefix    string // of all keys; "" means "larder/"

	Listen     string      // gRPC: "unix:///path" or "host:port"
	ListenMode fs.FileMode // of a unix socket; 0 means 0600

	MetricsListen string               // HTTP /metrics, /healthz and /readyz, in the same forms; "" for none
	Metrics       *prometheus.Registry // where metrics are registered, without Go's and the process's; nil for an own one

	MountObjects bool // mounts are changed by [Master.ApplyMounts] alone, and by no call

	WorkerLease  time.Duration     // how long a worker is believed alive without a heartbeat; whole seconds; 0 means 30s
	WorkerForget time.Duration     // how long one without a heartbeat is remembered; whole seconds; 0 means 1h, or the lease if that is longer
	Version      string            // of the binary, for status
	Tracer       *telemetry.Tracer // nil traces nothing
	Log          *slog.Logger      // nil means none
}

// Validate names all mistakes at once.
func (c Config) Validate() error {
	var errs []error
	bad := func(cond bool, format string, args ...any) {
		if cond {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	embedded := len(c.EtcdEndpoints) == 0
	bad(embedded && c.Dir == "", "dir: set it, or the endpoints of an external etcd")
	bad(embedded && c.Dir != "" && !filepath.IsAbs(c.Dir), "dir %s: want an absolute path", c.Dir)
	bad(embedded && c.EtcdCAFile+c.EtcdCertFile+c.EtcdKeyFile != "", "etcd certificates: set with etcd endpoints only")
	bad((c.EtcdCertFile == "") != (c.EtcdKeyFile == ""), "etcd certificate and key: set both or none")
	for _, e := range c.EtcdEndpoints {
		bad(strings.TrimSpace(e) == "", "etcd endpoint %q: want https://host:port", e)
	}
	bad(c.EtcdPrefix != "" && !strings.HasSuffix(c.EtcdPrefix, "/"), "etcd prefix %q: want a / at the end", c.EtcdPrefix)
	bad(c.Listen == "", "listen: set unix:///path or host:port")
	for name, addr := range map[string]string{"listen": c.Listen, "metrics listen": c.MetricsListen} {
		if err := checkAddress(addr); addr != "" && err != nil {
			errs = append(errs, fmt.Errorf("%s %q: %w", name, addr, err))
		}
	}
	bad(c.WorkerLease != 0 && (c.WorkerLease < time.Second || c.WorkerLease%time.Second != 0), "worker lease %v: want whole seconds", c.WorkerLease)
	bad(c.WorkerForget != 0 && (c.WorkerForget < c.WorkerLease || c.WorkerForget%time.Second != 0),
		"worker forget %v: want whole seconds, no fewer than the lease's", c.WorkerForget)
	bad(!embedded && c.Member.set(), "initial cluster: set it or etcd endpoints, not both")
	if err := c.Member.validate(); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func checkAddress(addr string) error {
	if path, ok := strings.CutPrefix(addr, unixScheme); ok {
		if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
			return errors.New("want unix:///absolute/path")
		}
		return nil
	}
	_, _, err := net.SplitHostPort(addr)
	return err
}

// withDefaults fills in what was left zero.
func (c Config) withDefaults() Config {
	if c.EtcdPrefix == "" {
		c.EtcdPrefix = "larder/"
	}
	if c.ListenMode == 0 {
		c.ListenMode = 0o600
	}
	if c.Metrics == nil {
		c.Metrics = prometheus.NewRegistry()
	}
	if c.WorkerLease == 0 {
		c.WorkerLease = 30 * time.Second
	}
	if c.WorkerForget == 0 {
		c.WorkerForget = max(time.Hour, c.WorkerLease)
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}
