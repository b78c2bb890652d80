package sanity

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/larderfs/larder/sanity/leak"
	"github.com/larderfs/larder/sanity/s3test"
	"github.com/larderfs/larder/sanity/stack"
)

// larderBinary is built once for all tests.
var larderBinary string

func TestMain(m *testing.M) {
	if data := os.Getenv(loopsEnv); data != "" {
		runLoops(data)
	}
	if data := os.Getenv(holderEnv); data != "" {
		runHolder(data)
	}
	os.Exit(leak.Run(built{m}))
}

type built struct{ m *testing.M }

func (b built) Run() int {
	dir, err := os.MkdirTemp("", "larder-binary-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	larderBinary = filepath.Join(dir, "larder")
	if err := stack.Build(context.Background(), larderBinary); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return b.m.Run()
}

// up starts `larder up` for the length of a test. A test that fails shows the end of its log.
func up(t *testing.T, args ...string) *stack.Stack {
	t.Helper()
	s, err := stack.Start(t.Context(), stack.Config{Binary: larderBinary, Args: args})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		log, _ := os.ReadFile(s.Log())
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("%s", log[max(0, len(log)-4<<10):])
		}
	})
	return s
}

// bucket describes a volume over a prefix of the server's bucket.
func bucket(s *s3test.Server, name, prefix string, more ...string) stack.PublishInput {
	p := map[string]string{
		"source": strings.TrimSuffix("s3://"+s.Bucket+"/"+prefix, "/"), "endpoint": s.Endpoint, "region": s.Region, "pathStyle": "true",
	}
	for i := 0; i < len(more); i += 2 {
		p[more[i]] = more[i+1]
	}
	return stack.PublishInput{Name: name, Parameters: p, Secrets: secret(s.AccessKey, s.SecretKey)}
}

func secret(id, key string) map[string]string {
	return map[string]string{"AWS_ACCESS_KEY_ID": id, "AWS_SECRET_ACCESS_KEY": key}
}

// publish publishes for the length of the test and returns the pod's path.
func publish(t *testing.T, k *stack.Kubelet, in stack.PublishInput) (*stack.Volume, string) {
	t.Helper()
	v, err := k.Publish(t.Context(), in)
	if err != nil {
		t.Fatalf("publish %s: %v", in.Name, err)
	}
	return v, v.Targets[0]
}

// put fills the bucket; two objects for each key would be a mistake of the test.
func put(t *testing.T, s *s3test.Server, objects map[string][]byte) {
	t.Helper()
	var errs []error
	for key, data := range objects {
		_, err := s.Put(key, data)
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// pattern is n bytes that differ from chunk to chunk and from seed to seed.
func pattern(n int, seed uint64) []byte {
	b := make([]byte, n)
	x := seed*0x9e3779b97f4a7c15 + 1
	for i := range b {
		if i%8 == 0 {
			x ^= x << 13
			x ^= x >> 7
			x ^= x << 17
		}
		b[i] = byte(x >> (8 * (i % 8)))
	}
	return b
}
