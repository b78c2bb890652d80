package driver

import (
	"errors"
	"fmt"
	"maps"

	"google.golang.org/grpc/codes"
)

// Parameter is one of a StorageClass, for the reference.
type Parameter struct {
	Name    string
	Default string // "" if there is none
	Meaning string
}

// meanings of parameters.
var meanings = map[string]string{
	keySource:      "`s3://bucket/prefix`, or `file:///path` below `--file-root`, which is not for inline volumes",
	keyPath:        "instead of source: a path of the namespace; the volume shows what is mounted there",
	keyEndpoint:    "S3 endpoint, `http[s]://host[:port]`; AWS without one. Inline: only one of `--inline-endpoint`",
	keyRegion:      "of the bucket; `us-east-1` without one",
	keyPathStyle:   "`host/bucket/key` instead of `bucket.host/key`; `true` with an `endpoint`",
	keyLayout:      "`full`: `data/` and `domain/`. `data`: the dataset at the mount point itself, and no socket",
	keyFreshness:   "how old names and versions may be when a file is opened: a Go duration; `0s` asks the store each time",
	keyComplete:    "when a file that was read in part is cached completely: `auto` (opened again, or more than half of it is there), `never`, `always`",
	keyBinding:     "`shared`: from every node. `node`: on one node, whose cache has room for the claim's size. Not inline",
	keyUID:         "owner of all files and folders",
	keyGID:         "their group; a pod's `fsGroup` stands for it",
	keyFileMode:    "permission bits of files, octal",
	keyDirMode:     "permission bits of folders, octal",
	keyCredentials: "whose credential it reads with: `secret` (needs one), `pod` (`roleArn`, assumed with the token of the pod's service account), `driver` (the worker's own; inline only where `--driver-credentials` allows it). Without it: the Secret where there is one, else, inline, nobody's, and of a StorageClass the worker's own",
	keyRoleARN:     "with `credentials: pod`: the role, `arn:aws:iam::ACCOUNT:role/NAME`",
	keySTSEndpoint: "with `credentials: pod`: the token service, `http[s]://host[:port]`; AWS's of the `region` without one. Inline: only one of `--sts-endpoint`",
}

// ParameterTable has all parameters, with what a volume gets that has a source only.
func ParameterTable() (all []Parameter, err error) {
	r, err := newRules("", nil)
	if err != nil {
		return nil, err
	}
	q, err := r.parse("", map[string]string{keySource: s3Scheme + "bucket"}, nil)
	if err != nil {
		return nil, err
	}
	left, defaults := maps.Clone(meanings), q.context()
	delete(defaults, keySource)
	var errs []error
	for _, name := range parameterNames {
		p := Parameter{name, defaults[name], left[name]}
		if delete(left, name); p.Meaning == "" {
			errs = append(errs, fmt.Errorf("parameter %s has no meaning", name))
		}
		all = append(all, p)
	}
	for name := range left {
		errs = append(errs, fmt.Errorf("%s has a meaning and is no parameter", name))
	}
	return all, errors.Join(errs...)
}

// SecretKeys are what is read of a Secret.
func SecretKeys() []string { return []string{secretID, secretKey, secretToken} }

// ErrorCode is what a call answers that fails with an error.
type ErrorCode struct {
	Err  error // nil stands for all that are not listed
	Code codes.Code
}

// ErrorCodes are all; the first that fits counts.
func ErrorCodes() (all []ErrorCode) {
	for _, c := range errorCodes {
		all = append(all, ErrorCode{c.err, c.code})
	}
	return append(all, ErrorCode{nil, codes.Internal})
}
