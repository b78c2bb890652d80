package wire

import (
	"context"
	"errors"
	"fmt"

	"github.com/larderfs/larder/cacheworker/object"
)

// Code is the outcome of a request. The numbers are part of the protocol and never change.
type Code uint16

const (
	CodeOK          Code = 0
	CodeInternal    Code = 1
	CodeNotFound    Code = 2
	CodeChanged     Code = 3
	CodeDenied      Code = 4
	CodeUnavailable Code = 5
	CodeInvalid     Code = 6
	CodeBusy        Code = 7
	CodeIncomplete  Code = 8
	CodeVersion     Code = 9
	CodeCanceled    Code = 10
)

// ErrVersion means that client and server have no version of the protocol in common.
var ErrVersion = errors.New("unsupported protocol version")

// codes is the whole mapping, for both directions; what it does not list is CodeInternal.
// A client takes the first row of a code, a server the first row of an error.
var codes = []struct {
	code Code
	err  error
}{
	{CodeNotFound, object.ErrNotFound},
	{CodeChanged, object.ErrChanged},
	{CodeDenied, object.ErrDenied},
	{CodeUnavailable, object.ErrUnavailable},
	{CodeInvalid, object.ErrInvalid},
	{CodeInvalid, ErrProtocol},
	{CodeBusy, object.ErrBusy},
	{CodeBusy, object.ErrNoSpace},
	{CodeUnavailable, object.ErrCorrupt},
	{CodeIncomplete, object.ErrIncomplete},
	{CodeVersion, ErrVersion},
	{CodeCanceled, context.Canceled},
	{CodeUnavailable, context.DeadlineExceeded},
}

// CodeOf is the code of an error.
func CodeOf(err error) Code {
	if err == nil {
		return CodeOK
	}
	for _, c := range codes {
		if errors.Is(err, c.err) {
			return c.code
		}
	}
	return CodeInternal
}

// Text is what travels of an error for people to read.
func Text(err error) string { return clip(err.Error(), maxText) }

// Error is the error of a code: it wraps the sentinel and reads as the server's text.
func Error(code Code, text []byte) error {
	if code == CodeOK {
		return nil
	}
	t := clip(string(text[:min(len(text), maxText)]), maxText)
	for _, c := range codes {
		if c.code == code {
			if t == "" {
				return c.err
			}
			return remote{t, c.err}
		}
	}
	if t == "" {
		t = fmt.Sprintf("code %d", code)
	}
	return remote{t, nil}
}

type remote struct {
	text string
	err  error
}

func (r remote) Error() string { return r.text }
func (r remote) Unwrap() error { return r.err }
