package s3test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"

	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// Rights of a user other than root. The zero value may do nothing.
type Rights struct {
	List  bool   // LIST the bucket, every prefix of it
	Read  bool   // HEAD and GET
	Under string // only keys that begin with this; "" means all
}

// AddUser makes a second credential with its own rights to the bucket.
func (s *Server) AddUser(ctx context.Context, accessKey, secretKey string, rights Rights) error {
	cmd := exec.CommandContext(ctx, s.binary, "admin", "--region", s.Region, "--endpoint-url", s.DirectEndpoint,
		"create-user", "--access", accessKey, "--secret", secretKey, "--role", "user")
	cmd.Env = []string{"ADMIN_ACCESS_KEY_ID=" + s.AccessKey, "ADMIN_SECRET_ACCESS_KEY=" + s.SecretKey, "PATH=" + os.Getenv("PATH")}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("create user %s: %w: %s", accessKey, err, out)
	}
	return s.SetRights(ctx, accessKey, rights)
}

// SetRights replaces the rights of a user; they hold from the next request on.
func (s *Server) SetRights(ctx context.Context, accessKey string, rights Rights) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rights[accessKey] = rights
	policy, err := s.policy()
	if err != nil {
		return err
	}
	if policy == "" {
		_, err = s.direct.DeleteBucketPolicy(ctx, &s3.DeleteBucketPolicyInput{Bucket: &s.Bucket})
	} else {
		_, err = s.direct.PutBucketPolicy(ctx, &s3.PutBucketPolicyInput{Bucket: &s.Bucket, Policy: &policy})
	}
	if err != nil {
		return fmt.Errorf("set the policy of bucket %s: %w", s.Bucket, err)
	}
	return nil
}

type statement struct {
	Effect    string
	Principal map[string][]string
	Action    string
	Resource  string
}

// policy is the bucket's, in JSON; "" if nobody but root has a right. Requires s.mu held.
func (s *Server) policy() (string, error) {
	var all []statement
	for _, user := range slices.Sorted(maps.Keys(s.rights)) {
		r, who := s.rights[user], map[string][]string{"AWS": {user}}
		bucket := "arn:aws:s3:::" + s.Bucket
		if r.List {
			all = append(all, statement{"Allow", who, "s3:ListBucket", bucket})
		}
		if r.Read {
			all = append(all, statement{"Allow", who, "s3:GetObject", bucket + "/" + r.Under + "*"})
		}
	}
	if len(all) == 0 {
		return "", nil
	}
	text, err := json.Marshal(map[string]any{"Version": "2012-10-17", "Statement": all})
	return string(text), err
}
