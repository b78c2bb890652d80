package master

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

// store is the etcd that the master uses: one in this process, or somebody else's.
type store struct {
	client *clientv3.Client
	etcd   *embed.Etcd // nil if external
	lock   *os.File
	logs   *zapCore
	died   chan error // what etcd died of; see onFatal
	dead   bool       // its goroutines do not end any more; set by wait
}

func openStore(ctx context.Context, cfg Config) (*store, error) {
	if len(cfg.EtcdEndpoints) > 0 {
		return openExternal(cfg)
	}
	return openEmbedded(ctx, cfg)
}

// openExternal does not wait for etcd: until it answers, calls are Unavailable.
func openExternal(cfg Config) (*store, error) {
	logs := &zapCore{log: cfg.Log}
	ec := clientv3.Config{
		Endpoints:            cfg.EtcdEndpoints,
		DialTimeout:          5 * time.Second,
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
		Logger:               zap.New(logs),
		DialOptions:          []grpc.DialOption{grpc.WithAuthority("etcd")},
	}
	if cfg.EtcdCAFile+cfg.EtcdCertFile != "" {
		tls, err := transport.TLSInfo{TrustedCAFile: cfg.EtcdCAFile, CertFile: cfg.EtcdCertFile, KeyFile: cfg.EtcdKeyFile}.ClientConfig()
		if err != nil {
			return nil, fmt.Errorf("etcd certificates: %w", err)
		}
		ec.TLS, ec.DialOptions = tls, nil
	}
	c, err := clientv3.New(ec)
	if err != nil {
		return nil, fmt.Errorf("etcd at %q: %w", cfg.EtcdEndpoints, err)
	}
	return &store{client: c, logs: logs}, nil
}

// openEmbedded starts a member, without any listener if it is the only one, and waits until it
// can write.
func openEmbedded(ctx context.Context, cfg Config) (s *store, err error) {
	s = &store{logs: &zapCore{log: cfg.Log}, died: make(chan error, 1)}
	s.logs.quiet.Store(true) // etcd warns about what we want: no listeners, an empty store
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return s, err
	}
	if s.lock, err = lockDir(ctx, cfg.Dir); err != nil {
		return s, err
	}
	ec := embeddedConfig(filepath.Join(cfg.Dir, "etcd"))
	if cfg.Member.set() {
		if err := cfg.Member.apply(ec); err != nil {
			return s, err
		}
	}
	ec.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(s.logs, zap.WithFatalHook(onFatal{s.died}), zap.WithPanicHook(onFatal{s.died})))
	if err := s.start(ctx, ec, cfg.Member.checkMembers); err != nil {
		return s, fmt.Errorf("%s: %w", ec.Dir, err)
	}
	s.etcd.Server.KV().Commit() // or its version monitor complains of a store without a term, once
	s.client = v3client.New(s.etcd.Server)
	if _, err := s.client.Get(ctx, "larder", clientv3.WithCountOnly()); err != nil {
		return s, err
	}
	s.logs.quiet.Store(false)
	return s, nil
}

// start starts etcd and waits until it is ready, if it is what check wants.
func (s *store) start(ctx context.Context, ec *embed.Config, check func(*embed.Etcd) error) error {
	type started struct {
		etcd *embed.Etcd
		err  error
	}
	c := make(chan started, 1)
	go func() { // never ends if etcd dies of what it finds, such as a damaged log
		defer func() {
			if p := recover(); p != nil { // a log that was cut to nothing is a nil dereference
				c <- started{err: fmt.Errorf("etcd: %v", p)}
			}
		}()
		etcd, err := embed.StartEtcd(ec)
		c <- started{etcd, err}
	}()
	select {
	case got := <-c:
		if s.etcd = got.etcd; got.err != nil {
			return got.err
		}
	case err := <-s.died:
		return err
	}
	if err := check(s.etcd); err != nil {
		return err
	}
	slow := time.NewTimer(5 * time.Second)
	defer slow.Stop()
	for {
		select {
		case <-s.etcd.Server.ReadyNotify():
			return nil
		case <-s.etcd.Server.StopNotify():
			return errors.New("etcd stopped while starting")
		case err := <-s.died:
			s.dead = true
			return err
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-slow.C:
			s.logs.log.Warn("the store is not ready yet: is a majority of the masters up?", "initialCluster", ec.InitialCluster)
		}
	}
}

// smallSegments makes etcd's log grow by 8 MiB, not 64 MB, at a time. etcd has no option for it.
var smallSegments = sync.OnceFunc(func() { wal.SegmentSizeBytes = 8 << 20 })

// embeddedConfig is for a single member: it elects itself, so its ticks are short, and
// keeps little history. fsync stays on.
func embeddedConfig(dir string) *embed.Config {
	smallSegments()
	c := embed.NewConfig()
	c.Name = "larder"
	c.Dir = dir
	c.InitialCluster = c.InitialClusterFromName(c.Name)
	c.ListenPeerUrls, c.ListenClientUrls, c.AdvertiseClientUrls = nil, nil, nil
	c.AuthToken = ""                 // nobody logs in
	c.TickMs, c.ElectionMs = 50, 250 // ready in 0.2 s, idle at 0.7 % of a core; 20, 100: 0.13 s and 1.5 %
	c.AutoCompactionMode, c.AutoCompactionRetention = embed.CompactorModeRevision, "1000"
	c.SnapshotCount, c.SnapshotCatchUpEntries = 2000, 100
	c.MaxSnapFiles, c.MaxWalFiles = 2, 2
	c.QuotaBackendBytes = 1 << 30
	c.MaxTxnOps = 4096 // a mount table is restored at once
	return c
}

// wait returns what the store died of, or nil when ctx ends.
func (s *store) wait(ctx context.Context) error {
	var stopped <-chan struct{}
	if s.etcd != nil {
		stopped = s.etcd.Server.StopNotify()
	}
	select {
	case err := <-s.died:
		s.dead = true
		return fmt.Errorf("store: %w", err)
	case <-stopped:
		return errors.New("store: etcd stopped")
	case <-ctx.Done():
		return nil
	}
}

func (s *store) embedded() bool { return s.etcd != nil }

// Close waits for what is being written.
func (s *store) Close() (err error) {
	s.logs.quiet.Store(true)
	if s.client != nil {
		if err = s.client.Close(); errors.Is(err, context.Canceled) {
			err = nil // an in-process client has no connection and says so thus
		}
	}
	if s.etcd != nil && !s.dead {
		s.etcd.Close()
	}
	if s.lock != nil {
		err = errors.Join(err, s.lock.Close())
	}
	return err
}

// lockDir waits a few seconds for a master that is being killed.
func lockDir(ctx context.Context, dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", dir, err), f.Close())
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("%s is in use by another master", dir), f.Close())
		}
	}
}

// onFatal stands for os.Exit and panic, which etcd calls when it cannot go on (a full disk, a
// damaged log): only main may exit. The goroutine stays where it is, with the locks it holds,
// so that nothing more is acknowledged, and Run returns.
type onFatal struct{ died chan<- error }

func (h onFatal) OnWrite(e *zapcore.CheckedEntry, fields []zapcore.Field) {
	select {
	case h.died <- fmt.Errorf("etcd: %s%s", e.Message, text(fields)):
	default:
	}
	select {}
}
