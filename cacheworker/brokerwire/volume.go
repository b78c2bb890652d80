package brokerwire

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
)

// Volume is what a mount serves: the parsed parameters of a StorageClass or an inline
// volume (package driver parses them, nobody else) and the credential it reads with. It
// travels from the node service through the broker to the worker, and lives in the mount's
// memfd; it is never written to a disk or a log.
type Volume struct {
	ID        string        `json:"id"`               // the CSI volume id
	Source    string        `json:"source"`           // s3://bucket/prefix or file:///path, normalised, without a slash at the end; "" with a Path
	Path      string        `json:"path,omitempty"`   // of the namespace, normalised: what is mounted there, instead of a source
	Tenant    string        `json:"tenant,omitempty"` // the Kubernetes namespace of its pods, where mounts ask for it; "" while it is not known
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

	CredentialsOf  CredentialsOf `json:"credentialsOf,omitempty"`
	RoleARN        string        `json:"roleARN,omitempty"`        // to assume as the pod
	STSEndpoint    string        `json:"stsEndpoint,omitempty"`    // of the token service; "" means AWS
	ServiceAccount string        `json:"serviceAccount,omitempty"` // namespace/name: whose token Credentials has; "" while no pod is known
	Proven         bool          `json:"proven,omitempty"`         // written by the broker: a worker was given a session of the role for this account

	Credentials Credentials `json:"-"` // so that nothing that encodes a volume tells them; see sealed
	Secrets     Secrets     `json:"-"` // those of the mounts that a Path shows
}

// Format prints a volume without its credentials, which fmt would show to a verb that does
// not fit.
func (v Volume) Format(f fmt.State, verb rune) {
	type plain Volume
	v.Credentials, v.Secrets = Credentials{}, Secrets{}
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

// Secrets are credentials by name: for a mount of the namespace what it says of its credential. They can
// be compared. The zero value has none.
type Secrets struct{ text string } // JSON

// NewSecrets takes a copy.
func NewSecrets(of map[string]Credentials) (Secrets, error) {
	if len(of) == 0 {
		return Secrets{}, nil
	}
	plain := map[string]sealed{}
	for name, c := range of {
		plain[name] = sealed(c)
	}
	b, err := json.Marshal(plain) // by name
	if err == nil && len(b) > maxSecrets {
		err = fmt.Errorf("%d bytes of them; at most %d: %w", len(b), maxSecrets, object.ErrInvalid)
	}
	if err != nil {
		return Secrets{}, fmt.Errorf("secrets of %d mounts: %w", len(of), err)
	}
	return Secrets{string(b)}, nil
}

const maxSecrets = 48 << 10 // bytes of JSON: a message holds twice that

// all returns none for what was not made by NewSecrets.
func (s Secrets) all() map[string]sealed {
	var all map[string]sealed
	if s.text == "" || json.Unmarshal([]byte(s.text), &all) != nil {
		return nil
	}
	return all
}

// Get returns one of them.
func (s Secrets) Get(name string) (Credentials, bool) {
	c, ok := s.all()[name]
	return Credentials(c), ok
}

// Names are those of all, sorted.
func (s Secrets) Names() []string { return slices.Sorted(maps.Keys(s.all())) }

// String and those below keep secrets out of everything that prints.
func (s Secrets) String() string               { return "secrets" }
func (s Secrets) GoString() string             { return "secrets" }
func (s Secrets) LogValue() slog.Value         { return slog.StringValue(s.String()) }
func (s Secrets) MarshalText() ([]byte, error) { return []byte(s.String()), nil }
func (s Secrets) Format(f fmt.State, _ rune)   { fmt.Fprint(f, s.String()) }
