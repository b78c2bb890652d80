package cacheworker

import (
	"context"
	"strings"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/source/s3"
)

// sessionKey is whose session it is: a volume's, as one service account.
type sessionKey struct{ volume, account, role, endpoint, region string }

// session is the one of a volume that reads as its pod, with the token that it has now. Requires s.mu.
func (s *sources) session(v brokerwire.Volume) (*s3.Session, error) {
	k := sessionKey{v.ID, v.ServiceAccount, v.RoleARN, v.STSEndpoint, v.Region}
	if had := s.sessions[k]; had != nil {
		had.SetToken(v.Credentials.SessionToken)
		return had, nil
	}
	at := v
	at.Endpoint = v.STSEndpoint
	name := "larder-" + strings.ReplaceAll(v.ServiceAccount, "/", ".")
	made, err := s3.NewSession(s3.SessionConfig{RoleARN: v.RoleARN, Name: name[:min(len(name), maxSessionName)],
		Endpoint: v.STSEndpoint, Region: v.Region, Transport: s.transport(at)})
	if err != nil {
		return nil, err
	}
	made.SetToken(v.Credentials.SessionToken)
	if s.sessions == nil {
		s.sessions = map[sessionKey]*s3.Session{}
	}
	s.sessions[k] = made
	return made, nil
}

const maxSessionName = 64 // as token services have it

// prove has the token service give a session to a volume that reads as its pod, before it is taken for the role:
// what is cached is shown to whoever may assume it. One that has no token yet is taken for nobody.
func (s *sources) prove(ctx context.Context, v brokerwire.Volume) error {
	if v.CredentialsOf != brokerwire.CredentialsPod || v.Credentials.IsZero() {
		return nil
	}
	s.mu.Lock()
	session, err := s.session(v)
	s.mu.Unlock()
	if err != nil || v.Proven {
		return err
	}
	return session.Prove(ctx)
}

// forget ends the sessions of a volume that is gone.
func (s *sources) forget(volume string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k := range s.sessions {
		if k.volume == volume {
			delete(s.sessions, k)
		}
	}
}

// proveAgain is for a volume that has a new token.
func (ms *mounts) proveAgain(ctx context.Context, id string) error {
	h := ms.get(id)
	if h == nil {
		return nil // reload says so
	}
	_, memfd, _ := h.Hold()
	st, err := brokerwire.ReadState(memfd)
	if err != nil {
		return err
	}
	return ms.w.sources.prove(ctx, st.Volume)
}
