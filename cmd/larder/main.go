// Command larder is all of Larder: one subcommand per process.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// version is set by the linker: -X main.version=…
var version = "dev"

func main() {
	ctx, stop := signals()
	err := root().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "larder:", err)
		os.Exit(exitCode(err))
	}
}

// errHurry is the cause of a context that a second signal ended.
var errHurry = errors.New("second signal")

type hurryKey struct{}

// signals gives a context that ends with the first SIGTERM or SIGINT. A second one ends the
// context that [hurry] returns: what is still stopping then stops waiting.
func signals() (context.Context, func()) {
	hurried, hurryUp := context.WithCancelCause(context.Background())
	ctx, cancel := context.WithCancel(context.WithValue(context.Background(), hurryKey{}, hurried))
	ch := make(chan os.Signal, 2)
	signal.Notify(ch, syscall.SIGTERM, syscall.SIGINT)
	done := make(chan struct{})
	go func() {
		for _, end := range []func(){cancel, func() { hurryUp(errHurry) }} {
			select {
			case <-ch:
				end()
			case <-done:
				return
			}
		}
	}()
	return ctx, func() { signal.Stop(ch); close(done); cancel(); hurryUp(nil) }
}

// hurry ends when a second signal came.
func hurry(ctx context.Context) context.Context {
	if h, ok := ctx.Value(hurryKey{}).(context.Context); ok {
		return h
	}
	return context.Background()
}
