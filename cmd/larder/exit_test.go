package main

import (
	"errors"
	"fmt"
	"io"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/larderfs/larder/master/client"
)

func TestExitCodes(t *testing.T) {
	for _, c := range []struct {
		want int
		err  error
	}{
		{0, nil}, {1, errors.New("some")}, {1, status.Error(codes.Internal, "some")},
		{2, fmt.Errorf("mount: %w", client.ErrInvalid)}, {3, fmt.Errorf("volume: %w", client.ErrNotFound)}, {3, callError{codes.NotFound, "no such path"}},
		{4, fmt.Errorf("mount: %w", client.ErrRefused)}, {4, callError{codes.PermissionDenied, "only root may"}},
		{5, fmt.Errorf("ask: %w", client.ErrUnavailable)}, {5, fmt.Errorf("ask: %w", status.Error(codes.Unavailable, "away"))},
	} {
		if got := exitCode(c.err); got != c.want {
			t.Errorf("%v: %d, want %d", c.err, got, c.want)
		}
	}
	nobody := "unix://" + t.TempDir() + "/master.sock"
	for _, c := range []struct {
		want int
		args []string
	}{
		{0, []string{"version"}}, {0, []string{"load", "--help"}},
		{2, []string{"laod"}}, {2, []string{"load"}}, {2, []string{"load", "--nodez", "a"}}, {2, []string{"mount", "show"}}, {2, []string{"volume", "ls", "-o", "xml"}},
		{2, []string{"worker", "--log-level", "loud"}}, {2, []string{"mount", "ad"}},
		{5, []string{"volume", "ls", "--master", nobody}}, {5, []string{"fs", "ls", "--dir", t.TempDir()}},
	} {
		cmd := root()
		cmd.SetArgs(c.args)
		cmd.SetOut(io.Discard)
		cmd.SetErr(io.Discard)
		if err := cmd.ExecuteContext(t.Context()); exitCode(err) != c.want {
			t.Errorf("larder %v: %d, %v; want %d", c.args, exitCode(err), err, c.want)
		}
	}
}
