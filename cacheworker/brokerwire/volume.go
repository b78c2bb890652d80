package brokerwire

import (
	"fmt"
	"log/slog"
	"time"
)

// Volume is what a mount serves: the parsed parameters of a StorageClass or an inline
// volume (package driver parses them, nobody else) and the credential it reads with. It
// travels from the node service through the broker to the worker, and lives in the mount's
// memfd; it is never written to a disk or a log.
type Volume struct {
	ID        string        `json:"id"`     // the CSI volume id
	Source    string        `json:"source"` // s3://bucket/prefix or file:///path, normalised, without a slash at the end
	Endpoint  string        `json:"endpoint,omitempty"`
	Region    string        `json:"region,omitempty"`
	PathStyle bool          `json:"pathStyle,omitempty"`
	Layout    Layout        `json:"layout"`
	Freshness time.Duration `json:"freshness"` // how old metadata may be at open; 0 asks the store each time
	Complete  Complete      `json:"complete"`
	UID       uint32        `json:"uid"`
	GID       uint32        `json:"gid"`
	FileMode  uint32        `json:"fileMode"` // permission bits
	DirMode   uint32        `json:"dirMode"`
	Inline    bool          `json:"inline,omitempty"` // attributes written by a user (DESIGN §5.10)

	// Whose volume it is, as far as the orchestrator says. A volume that a pod names itself has no claim.
	Namespace string `json:"namespace,omitempty"`
	Claim     string `json:"claim,omitempty"`

	// Attributes is the volume_context without what the orchestrator adds, as JSON: a master
	// that has lost its memory learns it from the workers.
	Attributes string `json:"attributes,omitempty"`

	Credentials Credentials `json:"-"` // so that nothing that encodes a volume tells them; see sealed
}

// Format prints a volume without its credentials, which fmt would show to a verb that does
// not fit.
func (v Volume) Format(f fmt.State, verb rune) {
	type plain Volume
	v.Credentials = Credentials{}
	fmt.Fprintf(f, fmt.FormatString(f, verb), plain(v))
}

// Layout says what a publish shows at its target.
type Layout string

const (
	LayoutFull Layout = "full" // data/ and domain/
	LayoutData Layout = "data" // the dataset itself
)

// Complete says when a file that was read in part is filled up.
type Complete string

const (
	CompleteAuto   Complete = "auto"   // read a second time, or a good share of it
	CompleteNever  Complete = "never"  // only by reading
	CompleteAlways Complete = "always" // when it is first opened
)

// Credentials are those of an S3 Secret. The zero value is anonymous, or, where
// [Volume.Inline] is false, the worker's ambient ones.
type Credentials struct {
	AccessKeyID     string `json:"accessKeyID,omitempty"`
	SecretAccessKey string `json:"secretAccessKey,omitempty"`
	SessionToken    string `json:"sessionToken,omitempty"`
}

// IsZero reports whether no credential was given.
func (c Credentials) IsZero() bool { return c == Credentials{} }

// String and LogValue keep secrets out of everything that prints.
func (c Credentials) String() string       { return "credentials" }
func (c Credentials) GoString() string     { return "credentials" }
func (c Credentials) LogValue() slog.Value { return slog.StringValue(c.String()) }

// MarshalText does so for encoders.
func (c Credentials) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// sealed is the form of credentials that does encode: in a message, and in a mount's state.
type sealed Credentials

// seal returns nil for none.
func seal(v *Volume) *sealed {
	if v == nil || v.Credentials.IsZero() {
		return nil
	}
	s := sealed(v.Credentials)
	return &s
}

// Format covers %+v, %#v and %x too.
func (c Credentials) Format(f fmt.State, _ rune) { fmt.Fprint(f, c.String()) }
