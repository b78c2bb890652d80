// Package s3test runs a real S3 server (versitygw, posix backend) for tests, the demo and
// benchmarks: built from the nested module gateway, started on a free loopback port, and
// gone with the process that started it.
//
// What versitygw 1.8 does otherwise than S3, as far as we met it:
//
//   - Keys are paths. "a" and "a/b" cannot both be objects; "a//b" is stored as "a/b",
//     "a/../b" as "b"; segments of more than 255 bytes are refused.
//   - A folder made by hand is listed as a common prefix even when nothing is in it.
//   - A GET reads the etag by the path and then opens the path: a PUT between the two makes it
//     send the next version's bytes, and their Last-Modified, under the etag of this one.
//   - An overwriting PUT is visible in a LIST as ".name.sgwtmp.N" for a moment.
//   - A file put into its folder by hand has no ETag; an object changed by hand keeps its own.
//   - If-Unmodified-Since is compared with the file's nanoseconds, and must lie behind them:
//     what a store said in Last-Modified is refused.
//   - encoding-type=url is ignored, so keys with control characters are listed as others.
//   - A LIST behind "dir/…" does not show the common prefix "dir/" again; S3 does. Behind
//     "dir/\U0010FFFF" both go on with what follows the folder.
//   - Connections are closed after each answer unless it is started with --keep-alive, as here.
//
// Requests to [Server.Endpoint] pass a proxy in this process, which counts them, says whose
// they were, and lets a [Hook] hold, refuse or spoil them; [Server.DirectEndpoint] is the
// gateway itself, for throughput and for requests that nobody should count.
package s3test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// Config of a server. The zero value works.
type Config struct {
	Dir      string    // where objects are kept, made if absent; "" means a temporary directory, removed by Close
	CacheDir string    // where the built gateway is kept; "" means the user's cache directory
	Module   string    // the folder of the gateway's go.mod; "" means where this source file was compiled from
	Bucket   string    // made at the start; "" means "larder"
	Log      io.Writer // what the build and the gateway print; nil discards it
}

// Server is a running gateway with its proxy and one bucket.
type Server struct {
	Endpoint       string // counted and hooked
	DirectEndpoint string // neither
	Region         string
	Bucket         string
	AccessKey      string // of the root user, who owns the bucket
	SecretKey      string
	Dir            string // the posix backend's folder; Dir/Bucket/key is the object's file

	binary   string
	gateway  *process
	proxy    *proxy
	front    *httptest.Server
	direct   *s3.Client
	removals []string // folders that Close removes

	mu     sync.Mutex // guards rights; held while the bucket's policy is written
	rights map[string]Rights
}

// Start runs a server for the length of the test.
func Start(t testing.TB) *Server {
	t.Helper()
	s, err := Run(t.Context(), Config{Log: testLog{t}})
	if err != nil {
		t.Fatalf("start an S3 server: %v", err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close the S3 server: %v", err)
		}
	})
	return s
}

// Run starts a server; ctx bounds the start (the first one on a machine builds the
// gateway, which takes minutes), not the server's life. Call Close.
func Run(ctx context.Context, cfg Config) (_ *Server, err error) {
	if cfg.Bucket == "" {
		cfg.Bucket = "larder"
	}
	if cfg.Log == nil {
		cfg.Log = io.Discard
	}
	binary, err := build(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("build the gateway: %w", err)
	}
	s := &Server{
		Region: "us-east-1", Bucket: cfg.Bucket, Dir: cfg.Dir,
		AccessKey: "root" + random(8), SecretKey: random(20),
		binary: binary, rights: map[string]Rights{},
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if err := s.start(ctx, cfg.Log); err != nil {
		return nil, err
	}
	s.direct = s.client(s.DirectEndpoint, s.AccessKey, s.SecretKey)
	_, err = s.direct.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: &s.Bucket})
	if err != nil {
		return nil, fmt.Errorf("create bucket %s: %w", s.Bucket, err)
	}
	return s, nil
}

func (s *Server) start(ctx context.Context, log io.Writer) error {
	state, err := s.tempDir()
	if err != nil {
		return err
	}
	if s.Dir == "" {
		s.Dir = filepath.Join(state, "objects")
	}
	iam := filepath.Join(state, "iam")
	for _, dir := range []string{s.Dir, iam} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	env := []string{
		"ROOT_ACCESS_KEY_ID=" + s.AccessKey, "ROOT_SECRET_ACCESS_KEY=" + s.SecretKey,
		"PATH=" + os.Getenv("PATH"), "TMPDIR=" + os.TempDir(), // sanity/leak knows whose it is by that
	}
	posix := []string{"posix"}
	if !supportsXattr(s.Dir) {
		sidecar := filepath.Join(state, "sidecar")
		if err := os.Mkdir(sidecar, 0o755); err != nil {
			return err
		}
		posix = append(posix, "--sidecar", sidecar)
	}
	s.gateway, s.DirectEndpoint, err = startGateway(ctx, s.binary, env, log, func(addr string) []string {
		args := []string{"--quiet", "--keep-alive", "--health", healthPath, "--region", s.Region, "--iam-dir", iam, "--port", addr}
		return append(append(args, posix...), s.Dir)
	})
	if err != nil {
		return fmt.Errorf("start the gateway: %w", err)
	}
	s.proxy = newProxy(s.DirectEndpoint, s.Bucket)
	s.front = httptest.NewServer(s.proxy)
	s.Endpoint = s.front.URL
	return nil
}

func (s *Server) tempDir() (string, error) {
	dir, err := os.MkdirTemp("", "larder-s3test-")
	if err == nil {
		s.removals = append(s.removals, dir)
	}
	return dir, err
}

// Close kills the gateway and removes what Run made. It may be called twice.
func (s *Server) Close() error {
	if s.front != nil {
		s.front.CloseClientConnections() // a held request would keep Close waiting
		s.proxy.close()
		s.front.Close()
		s.front = nil
	}
	if s.gateway != nil {
		s.gateway.kill()
		s.gateway = nil
	}
	var errs []error
	for _, dir := range s.removals {
		errs = append(errs, os.RemoveAll(dir))
	}
	s.removals = nil
	return errors.Join(errs...)
}

// PID is the gateway's process id, for tests that stop or watch it.
func (s *Server) PID() int { return s.gateway.cmd.Process.Pid }

// Client is the root user's, through the counting proxy.
func (s *Server) Client() *s3.Client { return s.client(s.Endpoint, s.AccessKey, s.SecretKey) }

// DirectClient is the root user's, past the proxy.
func (s *Server) DirectClient() *s3.Client { return s.direct }

func (s *Server) client(endpoint, access, secret string) *s3.Client {
	return s3.New(s3.Options{
		BaseEndpoint: &endpoint, UsePathStyle: true, Region: s.Region,
		Credentials:                credentials.NewStaticCredentialsProvider(access, secret, ""),
		RequestChecksumCalculation: aws.RequestChecksumCalculationWhenRequired,
		ResponseChecksumValidation: aws.ResponseChecksumValidationWhenRequired,
		HTTPClient:                 &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true}},
	})
}

// Put stores an object past the proxy, as the root user, and returns its etag without quotes.
func (s *Server) Put(key string, data []byte) (etag string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := s.direct.PutObject(ctx, &s3.PutObjectInput{Bucket: &s.Bucket, Key: &key, Body: bytes.NewReader(data)})
	if err != nil {
		return "", fmt.Errorf("put %s: %w", key, err)
	}
	return string(bytes.Trim([]byte(aws.ToString(out.ETag)), `"`)), nil
}

// Delete removes an object past the proxy, as the root user.
func (s *Server) Delete(key string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_, err := s.direct.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &s.Bucket, Key: &key})
	if err != nil {
		return fmt.Errorf("delete %s: %w", key, err)
	}
	return nil
}

// Age makes every object d older. A source asks twice about an object written in the last
// seconds; a test that counts requests, and replaces nothing, wants older ones.
func (s *Server) Age(d time.Duration) error {
	return filepath.WalkDir(filepath.Join(s.Dir, s.Bucket), func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		at := info.ModTime().Add(-d)
		return os.Chtimes(path, at, at)
	})
}

func random(n int) string {
	b := make([]byte, n)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// testLog sends what a process prints to the test's log.
type testLog struct{ t testing.TB }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Logf("%s", bytes.TrimRight(p, "\n"))
	return len(p), nil
}
