package cacheworker

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
)

// What names lead to is refused where the connection is made, so that no name can lead there later.
func TestWhoReachesWhichAddresses(t *testing.T) {
	here := httptest.NewServer(http.NotFoundHandler())
	defer here.Close()
	const metadata = "http://169.254.169.254/latest"
	s := &sources{}
	for _, c := range []struct {
		what    string
		v       brokerwire.Volume
		url     string
		refused bool
	}{
		{"a mount, its metadata service", brokerwire.Volume{Path: "/sales"}, metadata, true},
		{"a mount, the same by IPv6", brokerwire.Volume{Path: "/sales"}, "http://[fd00:ec2::254]/", true},
		{"a mount, the same in IPv6", brokerwire.Volume{Path: "/sales"}, "http://[::ffff:169.254.169.254]/", true},
		{"a mount, this machine", brokerwire.Volume{Path: "/sales"}, here.URL, false},
		{"inline, its metadata service", brokerwire.Volume{Inline: true}, metadata, true},
		{"inline, this machine", brokerwire.Volume{Inline: true}, here.URL, true},
		{"inline, this machine, where that is listed", brokerwire.Volume{Inline: true, Endpoint: here.URL}, here.URL, false},
	} {
		resp, err := s.transport(c.v).RoundTrip(httptest.NewRequest(http.MethodGet, c.url, nil).WithContext(t.Context()))
		if err == nil {
			resp.Body.Close()
		}
		if refused := errors.Is(err, object.ErrInvalid); refused != c.refused || err != nil && !refused {
			t.Errorf("%s: %v", c.what, err)
		}
	}
	for _, tr := range s.transports {
		tr.(*http.Transport).CloseIdleConnections()
	}
}
