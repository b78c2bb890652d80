package s3

import (
	"os"
	"testing"
	"time"

	"github.com/larderfs/larder/cacheworker/source"
	"github.com/larderfs/larder/cacheworker/source/sourcetest"
	"github.com/larderfs/larder/sanity/leak"
	"github.com/larderfs/larder/sanity/s3test"
)

func TestMain(m *testing.M) { os.Exit(leak.Run(m)) }

func open(t *testing.T, srv *s3test.Server, change func(*Config)) *Source {
	t.Helper()
	cfg := Config{
		Bucket: srv.Bucket, Endpoint: srv.Endpoint, Region: srv.Region, PathStyle: true,
		Credentials: Credentials{AccessKeyID: srv.AccessKey, SecretAccessKey: srv.SecretKey},
		NodeKey:     []byte("node"), Backoff: time.Millisecond,
		Guard: source.NewGuard(source.GuardConfig{Failures: 1000, RetriesPerS: 1000}),
	}
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func put(t *testing.T, srv *s3test.Server, key string, data []byte) {
	t.Helper()
	if _, err := srv.Put(key, data); err != nil {
		t.Fatal(err)
	}
}

func TestConformance(t *testing.T) {
	sourcetest.Test(t, func(t *testing.T) sourcetest.Store {
		srv := s3test.Start(t)
		return sourcetest.Store{
			Open: func(t *testing.T) source.Source { return open(t, srv, nil) },
			Denied: func(t *testing.T) source.Source {
				if err := srv.AddUser(t.Context(), "stranger", "stranger-secret", s3test.Rights{}); err != nil {
					t.Fatal(err)
				}
				return open(t, srv, func(c *Config) {
					c.Credentials = Credentials{AccessKeyID: "stranger", SecretAccessKey: "stranger-secret"}
				})
			},
			Put: func(t *testing.T, key string, data []byte) { put(t, srv, key, data) },
			Delete: func(t *testing.T, key string) {
				if err := srv.Delete(key); err != nil {
					t.Fatal(err)
				}
			},
		}
	})
}
