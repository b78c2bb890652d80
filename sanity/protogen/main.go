// Command protogen writes x.pb.go and x_grpc.pb.go beside every x.proto below the current
// directory, which must be the module's root. The compiler is a library and the plugins are
// tools of go.mod, so the output depends on nothing that go.mod does not pin.
//
// With -check it writes nothing, names the files that are stale and exits 1.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/bufbuild/protocompile"
	"github.com/bufbuild/protocompile/linker"
	"github.com/bufbuild/protocompile/protoutil"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/pluginpb"
)

// plugins and the options each is given.
var plugins = []struct{ tool, options string }{
	{"protoc-gen-go", "paths=source_relative"},
	{"protoc-gen-go-grpc", "paths=source_relative"},
}

func main() {
	check := flag.Bool("check", false, "write nothing; exit 1 if a generated file is stale")
	flag.Parse()
	stale, err := generate(context.Background(), *check)
	for _, name := range stale {
		fmt.Fprintf(os.Stderr, "protogen: %s is stale: run make generate\n", name)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "protogen: %v\n", err)
	}
	if err != nil || len(stale) > 0 {
		os.Exit(1)
	}
}

// generate makes the files of all protos and writes those that differ, or returns their names if check is set.
func generate(ctx context.Context, check bool) (stale []string, err error) {
	protos, err := find(".")
	if err != nil {
		return nil, err
	}
	if len(protos) == 0 {
		return nil, errors.New("no .proto files here")
	}
	req, err := compile(ctx, protos)
	if err != nil {
		return nil, err
	}
	for _, p := range plugins {
		files, err := run(ctx, p.tool, p.options, req)
		if err != nil {
			return nil, err
		}
		for _, f := range files {
			have, err := os.ReadFile(f.GetName())
			switch {
			case err != nil && !errors.Is(err, fs.ErrNotExist):
				return nil, err
			case err == nil && bytes.Equal(have, []byte(f.GetContent())):
			case check:
				stale = append(stale, f.GetName())
			default:
				if err := os.WriteFile(f.GetName(), []byte(f.GetContent()), 0o644); err != nil {
					return nil, err
				}
			}
		}
	}
	return stale, nil
}

// find returns the protos below root, slash-separated and in order. Folders of other tools are passed over.
func find(root string) (protos []string, err error) {
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != root && (strings.HasPrefix(d.Name(), ".") || d.Name() == "build" || d.Name() == "testdata"):
			return fs.SkipDir
		case !d.IsDir() && filepath.Ext(path) == ".proto":
			protos = append(protos, filepath.ToSlash(path))
		}
		return nil
	})
	return protos, err
}

// compile makes the request that protoc would make: every file after what it imports, with comments.
func compile(ctx context.Context, protos []string) (*pluginpb.CodeGeneratorRequest, error) {
	c := protocompile.Compiler{
		Resolver:       protocompile.WithStandardImports(&protocompile.SourceResolver{}),
		SourceInfoMode: protocompile.SourceInfoStandard,
	}
	files, err := c.Compile(ctx, protos...)
	if err != nil {
		return nil, err
	}
	req := &pluginpb.CodeGeneratorRequest{FileToGenerate: protos}
	seen := map[string]bool{}
	for _, f := range files {
		req.ProtoFile = appendFile(req.ProtoFile, seen, f)
	}
	return req, nil
}

func appendFile(out []*descriptorpb.FileDescriptorProto, seen map[string]bool, f protoreflect.FileDescriptor) []*descriptorpb.FileDescriptorProto {
	if seen[f.Path()] {
		return out
	}
	seen[f.Path()] = true
	for i := range f.Imports().Len() {
		out = appendFile(out, seen, f.Imports().Get(i).FileDescriptor)
	}
	if res, ok := f.(linker.Result); ok {
		return append(out, res.FileDescriptorProto())
	}
	return append(out, protoutil.ProtoFromFileDescriptor(f))
}

// run gives req to a plugin of go.mod and returns what it would have written.
func run(ctx context.Context, tool, options string, req *pluginpb.CodeGeneratorRequest) ([]*pluginpb.CodeGeneratorResponse_File, error) {
	req = proto.CloneOf(req)
	req.Parameter = proto.String(options)
	in, err := proto.Marshal(req)
	if err != nil {
		return nil, err
	}
	var out, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "go", "tool", tool)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &out, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("run %s: %w\n%s", tool, err, stderr.Bytes())
	}
	var resp pluginpb.CodeGeneratorResponse
	if err := proto.Unmarshal(out.Bytes(), &resp); err != nil {
		return nil, fmt.Errorf("answer of %s: %w", tool, err)
	}
	if resp.Error != nil {
		return nil, fmt.Errorf("%s: %s", tool, resp.GetError())
	}
	return resp.GetFile(), nil
}
