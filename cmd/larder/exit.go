package main

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/larderfs/larder/master/client"
)

// exitCodes are what programs may rely on. Of several that fit the first one counts.
var exitCodes = []struct {
	code    int
	meaning string
	errs    []error
	calls   []codes.Code // of a process that was asked
}{
	{2, "the command line is wrong: an unknown command or flag, a value that cannot be", []error{errUsage, client.ErrInvalid}, []codes.Code{codes.InvalidArgument}},
	{3, "what was named is not there", []error{client.ErrNotFound, fs.ErrNotExist}, []codes.Code{codes.NotFound}},
	{4, "it is not allowed, or not as things are; the text says what to do first", []error{client.ErrRefused, client.ErrExists, client.ErrExhausted, fs.ErrPermission}, []codes.Code{codes.PermissionDenied, codes.FailedPrecondition, codes.AlreadyExists, codes.ResourceExhausted}},
	{5, "nobody answers now: try again", []error{client.ErrUnavailable}, []codes.Code{codes.Unavailable, codes.DeadlineExceeded}},
}

// exitFailed is the code of all other errors, exitOK of none.
const (
	exitOK     = 0
	exitFailed = 1
)

var errUsage = errors.New("usage")

// usageError is an error of the command line, in its own words.
type usageError struct{ error }

func (usageError) Is(target error) bool { return target == errUsage }

// callError is what a process answered, in its own words.
type callError struct {
	code codes.Code
	text string
}

func (e callError) Error() string              { return e.text }
func (e callError) GRPCStatus() *status.Status { return status.New(e.code, e.text) }

func exitCode(err error) int {
	if err == nil {
		return exitOK
	}
	answer := codes.OK
	if s, ok := status.FromError(err); ok {
		answer = s.Code()
	}
	for _, e := range exitCodes {
		for _, is := range e.errs {
			if errors.Is(err, is) {
				return e.code
			}
		}
		for _, c := range e.calls {
			if answer == c {
				return e.code
			}
		}
	}
	if strings.HasPrefix(err.Error(), "unknown command ") { // cobra has no other way to tell
		return 2
	}
	return exitFailed
}

// onlyGroups is the annotation of a command that does nothing itself.
const onlyGroups = "groups"

// tellUsage marks the errors of the command line, which cobra makes without a type, and has a group of commands tell of
// one that it has not.
func tellUsage(cmd *cobra.Command) {
	if cmd.HasParent() && cmd.HasSubCommands() && !cmd.Runnable() {
		cmd.Annotations = map[string]string{onlyGroups: ""}
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			return usageError{fmt.Errorf("unknown command %q for %q; `%[2]s --help` lists them", args[0], cmd.CommandPath())}
		}
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	if check := cmd.Args; check != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return usageError{err}
			}
			return nil
		}
	}
	for _, sub := range cmd.Commands() {
		tellUsage(sub)
	}
}
