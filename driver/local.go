package driver

import (
	"encoding/json"
	"fmt"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
)

// Parameters parses the strings that describe volumes where no CSI call brings them: package
// localpv.
type Parameters struct{ rules rules }

// NewParameters takes the directory below which file:// sources must be; "" allows none.
func NewParameters(fileRoot string) (Parameters, error) {
	r, err := newRules(fileRoot, nil)
	return Parameters{r}, err
}

// LocalVolume is the volume of a local PersistentVolume, from parameters as in a StorageClass
// and a Secret, and the parameters in their normal form, without what is always the same. Errors
// wrap object.ErrInvalid and have no value of a Secret in them.
func (p Parameters) LocalVolume(id string, parameters, secret map[string]string) (brokerwire.Volume, map[string]string, error) {
	for key, why := range map[string]string{
		keyLayout:    "a local volume always has data/ and domain/",
		keyPath:      "a local volume has a source of its own",
		keyBinding:   "a local volume is always bound to its node",
		keyEphemeral: "a local volume is not inline",
	} {
		if _, ok := parameters[key]; ok {
			return brokerwire.Volume{}, nil, fmt.Errorf("%s: cannot be given; %s: %w", key, why, object.ErrInvalid)
		}
	}
	q, err := p.rules.parse(id, parameters, secret)
	if err != nil {
		return brokerwire.Volume{}, nil, err
	}
	if q.CredentialsOf == brokerwire.CredentialsPod {
		return brokerwire.Volume{}, nil, fmt.Errorf("%s: pod cannot be given: a local volume gets no token of its pod: %w", keyCredentials, object.ErrInvalid)
	}
	if q.CredentialsOf == brokerwire.CredentialsSecret && secret != nil && q.Credentials.IsZero() {
		return brokerwire.Volume{}, nil, complete(q.Volume, true)
	}
	normal := q.context()
	attributes, err := json.Marshal(normal)
	if err != nil {
		return brokerwire.Volume{}, nil, fmt.Errorf("encode the volume's attributes: %w", err)
	}
	q.Attributes = string(attributes)
	delete(normal, keyLayout)
	delete(normal, keyBinding)
	return q.Volume, normal, nil
}
