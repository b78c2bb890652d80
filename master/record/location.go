package record

import (
	"errors"
	"fmt"
	"net/url"
	"path"
	"strings"
)

// Location is a place in an under store: an object, and all that lies below its name.
type Location struct {
	URI      string // as it was written
	Scheme   string // s3 or file
	Bucket   string // of s3
	Endpoint string // URL of s3; "" for any
	Path     string // key, or absolute path; without a slash at the end
	Below    bool   // only what lies below Path
}

// ParseLocation reads s3://bucket[/key] or file:///path, in which %XX stands for a byte.
func ParseLocation(uri, endpoint string) (l Location, err error) {
	u, err := url.Parse(uri)
	if err != nil || len(uri) > maxPath || len(endpoint) > maxPath {
		return l, invalid([]error{errors.New("uri: want s3://bucket/key or file:///path")}) // not its text: it may hold a password
	}
	l = Location{URI: uri, Scheme: u.Scheme, Bucket: u.Host, Endpoint: endpoint, Below: strings.HasSuffix(u.Path, "/")}
	if l.Path = strings.Trim(u.Path, "/"); u.Scheme == "file" {
		l.Path = path.Clean(u.Path)
	}
	errs := []error{checkEndpoint(endpoint)}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		errs = append(errs, errors.New("uri: no user, query or fragment belongs in it; write ? as %3F and # as %23"))
	}
	switch {
	case u.Scheme == "s3" && l.Bucket == "":
		errs = append(errs, errors.New("uri: the bucket is missing: want s3://bucket/key"))
	case u.Scheme == "file" && (l.Bucket != "" || !path.IsAbs(l.Path)):
		errs = append(errs, errors.New("uri: want file:///path"))
	case u.Scheme == "file" && endpoint != "":
		errs = append(errs, errors.New("endpoint: is for s3 only"))
	case u.Scheme != "s3" && u.Scheme != "file":
		errs = append(errs, fmt.Errorf("uri: scheme %.40q is not known (s3, file)", u.Scheme))
	}
	return l, invalid(errs)
}

func checkEndpoint(endpoint string) error {
	u, err := url.Parse(endpoint)
	if endpoint != "" && (err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil) {
		return errors.New("endpoint: want http://host[:port] or https://host[:port]")
	}
	return nil
}
