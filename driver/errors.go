package driver

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/master/client"
)

// What only this package decides.
var (
	errPrecondition = errors.New("failed precondition")
	errUnknown      = errors.New("unknown volume")
	errInProgress   = errors.New("an operation on it is in progress")
	errNoParent     = errors.New("no such directory") // nothing can be mounted below it
	errRange        = errors.New("out of range")
)

// errorCodes is the whole mapping to CSI, the first match wins; what it does not list is a bug of ours: Internal.
var errorCodes = []struct {
	err  error
	code codes.Code
}{
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{context.Canceled, codes.Canceled},
	{errPrecondition, codes.FailedPrecondition},
	{errNoParent, codes.FailedPrecondition},
	{errUnknown, codes.NotFound},
	{errInProgress, codes.Aborted},
	{errRange, codes.OutOfRange},
	{object.ErrInvalid, codes.InvalidArgument},
	{object.ErrNotFound, codes.NotFound},
	{object.ErrDenied, codes.PermissionDenied},
	{object.ErrUnavailable, codes.Unavailable},
	{object.ErrBusy, codes.Unavailable},
	{brokerwire.ErrExists, codes.AlreadyExists},
	{client.ErrInvalid, codes.InvalidArgument},
	{client.ErrNotFound, codes.NotFound},
	{client.ErrExists, codes.AlreadyExists},
	{client.ErrExhausted, codes.ResourceExhausted},
	{client.ErrBadToken, codes.Aborted}, // as the CSI specification has it
	{client.ErrUnavailable, codes.Unavailable},
}

// toStatus makes the answer of a failed call. Statuses of grpc's own (Unimplemented) stay.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := err.(interface{ GRPCStatus() *status.Status }); ok {
		return err
	}
	for _, c := range errorCodes {
		if errors.Is(err, c.err) {
			return status.Error(c.code, text(err))
		}
	}
	return status.Error(codes.Internal, err.Error())
}

// text leaves out sentinels that say no more than the code does.
func text(err error) string {
	s := err.Error()
	for _, said := range []error{errPrecondition, errUnknown, errRange, errNoParent, object.ErrInvalid, object.ErrUnavailable} {
		s = strings.TrimSuffix(s, ": "+said.Error())
	}
	return s
}

// inFlight refuses a second operation on the same volume or path while one is under way.
type inFlight struct {
	mu   sync.Mutex // guards keys; held for moments
	keys map[string]struct{}
}

// lock takes all keys or none. The caller calls unlock once.
func (f *inFlight) lock(keys ...string) (unlock func(), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, k := range keys {
		if _, taken := f.keys[k]; taken {
			return nil, fmt.Errorf("%s: %w; try again", k, errInProgress)
		}
	}
	if f.keys == nil {
		f.keys = map[string]struct{}{}
	}
	for _, k := range keys {
		f.keys[k] = struct{}{}
	}
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, k := range keys {
			delete(f.keys, k)
		}
	}, nil
}
