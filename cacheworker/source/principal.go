package source

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"

	"github.com/larderfs/larder/cacheworker/object"
)

// PrincipalOf is whose the credential (id, secret, token) is, on the node with that key. All
// three zero is the anonymous principal, which is somebody: what a store shows to everyone.
func PrincipalOf(nodeKey []byte, id, secret, token string) object.Principal {
	return mac(nodeKey, "credential", id, secret, token)
}

// Ambient is the principal of what the worker itself may read: by its own credential, or
// because the store is a folder of the machine.
func Ambient(nodeKey []byte) object.Principal {
	return mac(nodeKey, "ambient")
}

// Role is the principal of a role that a token service gave a session of: whoever may assume it.
func Role(nodeKey []byte, tokenService, role string) object.Principal {
	return mac(nodeKey, "role", tokenService, role)
}

// Unproven is the principal of a volume of which nobody knows yet whether it may assume its role. It has no grants.
func Unproven(nodeKey []byte, volume string) object.Principal {
	return mac(nodeKey, "unproven", volume)
}

// mac hashes each part with its length before it, so that no two lists of parts run together.
func mac(nodeKey []byte, parts ...string) object.Principal {
	h := hmac.New(sha256.New, nodeKey)
	for _, s := range parts {
		h.Write(binary.LittleEndian.AppendUint64(nil, uint64(len(s))))
		h.Write([]byte(s))
	}
	var p object.Principal
	copy(p[:], h.Sum(nil))
	return p
}
