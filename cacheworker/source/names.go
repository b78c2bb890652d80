package source

import (
	"fmt"
	"strings"

	"github.com/larderfs/larder/cacheworker/object"
)

// maxName is NAME_MAX: no path has a longer segment.
const maxName = 255

// ValidName reports whether a path can have s as one of its segments.
func ValidName(s string) bool {
	return s != "" && s != "." && s != ".." && len(s) <= maxName && !strings.ContainsAny(s, "/\x00")
}

// Split takes the name directly below prefix out of a key that begins with it; folder says
// that the key goes on behind the name. ok is false if no path can express the name. What
// follows the name is not looked at: a list of the folder does that.
func Split(prefix, key string) (name string, folder, ok bool) {
	rest, found := strings.CutPrefix(key, prefix)
	if !found {
		return "", false, false
	}
	name, _, folder = strings.Cut(rest, "/")
	return name, folder, ValidName(name)
}

// CheckKey returns an error that wraps object.ErrInvalid if key is not that of a file: names
// joined by "/".
func CheckKey(key string) error {
	for name := range strings.SplitSeq(key, "/") {
		if !ValidName(name) {
			return fmt.Errorf("%w: key %q: no path can express it", object.ErrInvalid, key)
		}
	}
	return nil
}

// CheckPrefix returns an error that wraps object.ErrInvalid if prefix is neither "" nor the
// key of a folder, which ends in "/".
func CheckPrefix(prefix string) error {
	if prefix == "" {
		return nil
	}
	key, ok := strings.CutSuffix(prefix, "/")
	if !ok {
		return fmt.Errorf(`%w: prefix %q: want "" or one that ends in "/"`, object.ErrInvalid, prefix)
	}
	return CheckKey(key)
}

// CheckRange returns an error that wraps object.ErrInvalid unless 0 < n <= obj.Size-off.
func CheckRange(obj object.Object, off, n int64) error {
	if off < 0 || n <= 0 || n > obj.Size-off {
		return fmt.Errorf("%w: %d bytes at %d of %v, which has %d", object.ErrInvalid, n, off, obj, obj.Size)
	}
	return nil
}
