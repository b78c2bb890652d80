// Package brokerwire is what broker, worker and node service say to each other: one JSON
// message a datagram on a SOCK_SEQPACKET socket, with descriptors beside it.
//
// Both ends call and both answer; a reply repeats the request's id. What a peer sends is
// untrusted: a message is parsed into [Message] and checked by [Message.Validate] before
// anybody looks at it, and descriptors that nobody takes are closed.
package brokerwire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// The protocol has versions so that the processes of a node can be upgraded one after the other,
// and back: two peers speak the newest one that both know. Within a version fields and verbs may
// be added, if they can be done without: an unknown field is ignored, an unknown verb refused.
const (
	Version = 1 // the newest that this build speaks
	Oldest  = 1 // the oldest that it still speaks: what the release before spoke, at least
)

// agreed is the version to speak with a peer that knows those from oldest to newest.
func agreed(newest, oldest int) (int, error) {
	v := min(newest, Version)
	if v < oldest || v < Oldest || oldest <= 0 {
		return 0, fmt.Errorf("protocol versions %d to %d, here they are %d to %d: %w", oldest, newest, Oldest, Version, object.ErrInvalid)
	}
	return v, nil
}

const (
	maxMessage = 96 << 10 // bytes of one datagram, below the default socket buffer
	maxFDs     = 4
)

// Verb says what a message asks for. A reply has none.
type Verb string

const (
	// A peer's first message.
	Hello Verb = "hello" // Role, Version and Oldest, UUID and Stage (worker); the reply carries the Version that is spoken

	// Node service to broker.
	MountVolume   Verb = "mount"   // Volume, Path
	RefreshVolume Verb = "refresh" // Mount, Volume: new credentials; with Keep only those of mounts, and the tenant
	Bind          Verb = "bind"    // Mount, Sub, Target, ReadOnly
	Unmount       Verb = "unmount" // Path
	Mounts        Verb = "mounts"  // reply: List

	// Broker to worker.
	Adopt  Verb = "adopt"  // Mount, Fresh; fds: /dev/fuse, state memfd, INIT socket, [listener]: get ready to serve it
	Serve  Verb = "serve"  // Mount: it is adopted, and no other worker reads its requests any more
	Yield  Verb = "yield"  // end now: another worker is ready, or, for one that waits for its turn (Text), it cannot have it
	Listen Verb = "listen" // Mount; fds: the listening domain socket
	Reload Verb = "reload" // Mount: the volume in the memfd has changed
	Drop   Verb = "drop"   // Mount: it is gone

	// Worker to broker.
	Give       Verb = "give"       // Mount; fds: /dev/fuse, state memfd, live backing ids (see Backings), [listener]: after the broker's death
	Given      Verb = "given"      // all that this worker holds was given: what nobody holds is dead
	Register   Verb = "register"   // Mount, Node; fd: the file. reply: Backing
	Unregister Verb = "unregister" // Mount, Backing
	Replace    Verb = "replace"    // Mount; fd: a compacted state memfd
)

// Role says who speaks.
type Role string

const (
	RoleWorker Role = "worker"
	RoleNode   Role = "node"
)

// Stage is where a worker is in a hand-over of the cache directory.
type Stage string

const (
	Owner  Stage = ""       // it has the directory, and is the only one
	Giving Stage = "giving" // it has given it to another one, and serves until that one is ready
	Taking Stage = "taking" // it has got it, and waits until the other one has ended
)

// Message is one datagram. Which fields count depends on the verb.
type Message struct {
	ID       uint64  `json:"id"`
	Verb     Verb    `json:"verb,omitempty"`
	Version  int     `json:"version,omitempty"`
	Oldest   int     `json:"oldest,omitempty"`
	Role     Role    `json:"role,omitempty"`
	UUID     string  `json:"uuid,omitempty"`
	Stage    Stage   `json:"stage,omitempty"`
	Mount    string  `json:"mount,omitempty"` // volume id
	Path     string  `json:"path,omitempty"`
	Sub      string  `json:"sub,omitempty"`
	Target   string  `json:"target,omitempty"`
	ReadOnly bool    `json:"readOnly,omitempty"`
	Keep     bool    `json:"keep,omitempty"`
	Fresh    bool    `json:"fresh,omitempty"`
	Node     uint64  `json:"node,omitempty"`
	Backing  int32   `json:"backing,omitempty"`
	Volume   *Volume `json:"volume,omitempty"`
	List     []Mount `json:"list,omitempty"`
	Leaving  bool    `json:"leaving,omitempty"` // with List: the broker ends when no volume is in use, and no other will come
	PID      int     `json:"pid,omitempty"`     // with List: the broker's
	Code     Code    `json:"code,omitempty"`    // reply: what went wrong
	Text     string  `json:"text,omitempty"`    // reply: for people
}

// Mount is what the broker tells of a mount it holds. Volume has no credentials.
type Mount struct {
	VolumeID  string    `json:"volumeID"`
	Path      string    `json:"path"`
	Volume    Volume    `json:"volume"`
	Since     time.Time `json:"since"`
	Served    bool      `json:"served"`    // a worker answers it now
	Takeovers int       `json:"takeovers"` // workers it was given to after the first
	Socket    string    `json:"socket,omitempty"`

	Worker       string        `json:"worker,omitempty"`       // UUID of the one that answers it now
	WorkerPID    int32         `json:"workerPID,omitempty"`    // as the broker sees it; 0 where it cannot
	WorkerSince  time.Time     `json:"workerSince,omitzero"`   // since when that one does, or, while none does, since when not
	LongestStall time.Duration `json:"longestStall,omitempty"` // without a worker, before a take-over
	Without      []string      `json:"without,omitempty"`      // see State.Without
	Secrets      []string      `json:"secrets,omitempty"`      // names of those that it has
}

// Code is a sentinel error on the wire.
type Code string

// codes is the whole mapping in both directions; what it does not list is "internal".
var codes = []struct {
	code Code
	err  error
}{
	{"not-found", object.ErrNotFound},
	{"changed", object.ErrChanged},
	{"denied", object.ErrDenied},
	{"unavailable", object.ErrUnavailable},
	{"no-space", object.ErrNoSpace},
	{"busy", object.ErrBusy},
	{"invalid", object.ErrInvalid},
	{"exists", ErrExists},
}

// ErrExists means that something else is mounted there already.
var ErrExists = errors.New("already mounted differently")

const codeInternal Code = "internal"

// fail turns an error into a reply.
func fail(err error) Message {
	m := Message{Code: codeInternal, Text: err.Error()}
	for _, c := range codes {
		if errors.Is(err, c.err) {
			m.Code = c.code
			break
		}
	}
	if len(m.Text) > 4096 {
		m.Text = m.Text[:4096]
	}
	return m
}

// Err is the error of a reply; nil if it went well.
func (m Message) Err() error {
	if m.Code == "" {
		return nil
	}
	for _, c := range codes {
		if c.code == m.Code {
			if text, ok := strings.CutSuffix(m.Text, ": "+c.err.Error()); ok {
				return fmt.Errorf("%s: %w", text, c.err)
			}
			return &remoteError{m.Text, c.err}
		}
	}
	return &remoteError{m.Text, nil}
}

// remoteError keeps the text of the other side as it was and its sentinel for errors.Is.
type remoteError struct {
	text string
	is   error
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.is }

// Validate checks what the verbs have in common: lengths, absolute clean paths, no NUL.
func (m Message) Validate() error {
	for _, f := range []struct{ name, s string }{
		{"mount", m.Mount}, {"path", m.Path}, {"target", m.Target}, {"uuid", m.UUID}, {"sub", m.Sub},
	} {
		if len(f.s) > 4096 || strings.ContainsRune(f.s, 0) {
			return fmt.Errorf("%s is over-long or contains NUL: %w", f.name, object.ErrInvalid)
		}
	}
	for _, f := range []struct{ name, s string }{{"path", m.Path}, {"target", m.Target}} {
		if f.s != "" && !cleanAbs(f.s) {
			return fmt.Errorf("%s %q is not an absolute, clean path: %w", f.name, f.s, object.ErrInvalid)
		}
	}
	if m.Sub != "" && m.Sub != "data" {
		return fmt.Errorf("sub %q is not data: %w", m.Sub, object.ErrInvalid)
	}
	if strings.ContainsAny(m.UUID, "/.") || len(m.UUID) > 64 {
		return fmt.Errorf("uuid %q is not one: %w", m.UUID, object.ErrInvalid)
	}
	return nil
}

func cleanAbs(p string) bool {
	if !strings.HasPrefix(p, "/") || (len(p) > 1 && strings.HasSuffix(p, "/")) {
		return false
	}
	for seg := range strings.SplitSeq(p[1:], "/") {
		if (seg == "" && p != "/") || seg == "." || seg == ".." {
			return false
		}
	}
	return true
}

// Decode parses one datagram. Of a bad one it returns the id and the verb, as far as they can
// be read.
func Decode(b []byte) (Message, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	var e envelope
	if err := d.Decode(&e); err != nil {
		return address(b), fmt.Errorf("broker message: %v: %w", err, object.ErrInvalid)
	}
	if _, err := d.Token(); err != io.EOF {
		return address(b), fmt.Errorf("broker message: more than one value: %w", object.ErrInvalid)
	}
	m := e.Message
	if err := m.Validate(); err != nil {
		return address(b), err
	}
	if e.Credentials != nil {
		if m.Volume == nil {
			return address(b), fmt.Errorf("broker message: credentials of no volume: %w", object.ErrInvalid)
		}
		m.Volume.Credentials = Credentials(*e.Credentials)
	}
	if e.Secrets != "" {
		if m.Volume == nil || len(e.Secrets) > maxSecrets {
			return address(b), fmt.Errorf("broker message: secrets of no volume, or too many: %w", object.ErrInvalid)
		}
		m.Volume.Secrets = Secrets{e.Secrets}
	}
	return m, nil
}

// envelope is a message on the wire.
type envelope struct {
	Message
	Credentials *sealed `json:"credentials,omitempty"` // of Message.Volume
	Secrets     string  `json:"secrets,omitempty"`     // its too; see [Secrets]
}

func encode(m Message) ([]byte, error) {
	e := envelope{Message: m, Credentials: seal(m.Volume)}
	if m.Volume != nil {
		e.Secrets = m.Volume.Secrets.text
	}
	b, err := json.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("encode broker message: %w", err)
	}
	return b, nil
}

// address is what of a bad message can be read for the sake of an answer.
func address(b []byte) Message {
	var a struct {
		ID   uint64 `json:"id"`
		Verb Verb   `json:"verb"`
	}
	json.NewDecoder(bytes.NewReader(b)).Decode(&a)
	return Message{ID: a.ID, Verb: a.Verb}
}

func send(c *net.UnixConn, m Message, files []*os.File) error {
	b, err := encode(m)
	if err != nil {
		return err
	}
	if len(b) > maxMessage || len(files) > maxFDs {
		return fmt.Errorf("broker message of %d bytes, %d descriptors is too large: %w", len(b), len(files), object.ErrInvalid)
	}
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			if fds[i], err = number(f); err != nil {
				return fmt.Errorf("descriptor to send: %w", err)
			}
		}
		oob = unix.UnixRights(fds...)
	}
	_, _, err = c.WriteMsgUnix(b, oob, nil)
	runtime.KeepAlive(files)
	return err
}

// number is f.Fd without making a socket that others share blocking.
func number(f *os.File) (n int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	err = raw.Control(func(fd uintptr) { n = int(fd) })
	return n, err
}

// receive returns io.EOF when the peer has gone. A message that does not parse is an error
// with its id where that could be read, so that it can be answered.
func receive(c *net.UnixConn, buf, oob []byte) (Message, []*os.File, error) {
	n, oobn, flags, _, err := c.ReadMsgUnix(buf, oob)
	files, rerr := rights(oob[:oobn]) // an empty datagram ends the connection and may carry some too
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err == nil {
		err = rerr
	}
	var m Message
	if err == nil {
		m, err = Decode(buf[:n])
	}
	if err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		err = fmt.Errorf("broker message truncated: %w", object.ErrInvalid)
	}
	if err != nil {
		CloseFiles(files)
		return m, nil, err
	}
	return m, files, nil
}

func rights(oob []byte) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("descriptors: %v: %w", err, object.ErrInvalid)
	}
	var files []*os.File
	for _, msg := range msgs {
		fds, err := unix.ParseUnixRights(&msg)
		if err != nil {
			continue // credentials, say
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files, nil
}

// CloseFiles closes what is not nil.
func CloseFiles(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}
