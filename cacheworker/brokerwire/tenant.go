package brokerwire

// CredentialsOf says whose credential a volume reads with. The zero value is the Secret's where there is
// one; without it, the worker's own, or, where [Volume.Inline] is true, nobody's.
type CredentialsOf string

const (
	CredentialsSecret CredentialsOf = "secret"
	// CredentialsPod: the role that the token service gives to the pod's token, which is the SessionToken, alone. So a
	// worker of a release that does not know this word has a broken credential, and none of its own to read with.
	CredentialsPod    CredentialsOf = "pod"
	CredentialsDriver CredentialsOf = "driver" // the worker's own: the node service has seen that it may
)

// Unproven reports whether the volume has a token of which nobody knows yet whether the role may be assumed with it.
func (v Volume) Unproven() bool {
	return v.CredentialsOf == CredentialsPod && !v.Credentials.IsZero() && !v.Proven
}

// Ambient reports whether the volume is read with the worker's own credential.
func (v Volume) Ambient() bool {
	switch v.CredentialsOf {
	case CredentialsDriver:
		return true
	case CredentialsSecret, CredentialsPod:
		return false
	}
	return v.Credentials.IsZero() && !v.Inline
}
