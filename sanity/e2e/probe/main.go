// Command probe is what runs in the tests' pods: it fills buckets with data that follows from
// names, and tells whether what it reads is that data. It needs no privilege and no libraries.
//
//	probe put ENDPOINT BUCKET DATASET FILES SIZE     credentials in AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY
//	probe upload ENDPOINT BUCKET KEY < FILE          likewise
//	probe verify DIR DATASET FILES SIZE              every byte, once
//	probe loop DIR DATASET FILES SIZE                again and again, every way; ends at the first mistake
//	probe socket DIR DATASET FILES SIZE              through the domain socket in DIR; prints the worker's UUID
//	probe connect SOCKET                             whether somebody serves there
//	probe write DIR                                  tries every kind of change; prints the errors
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Println("MISTAKE:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("which command?")
	}
	switch args[0] {
	case "put":
		if len(args) != 6 {
			return errors.New("put takes ENDPOINT BUCKET DATASET FILES SIZE")
		}
		d, err := parseDataset(args[3:])
		if err != nil {
			return err
		}
		return put(ctx, args[1], args[2], d)
	case "upload":
		if len(args) != 4 {
			return errors.New("upload takes ENDPOINT BUCKET KEY")
		}
		return upload(ctx, args[1], args[2], args[3])
	case "verify", "loop", "socket":
		if len(args) != 5 {
			return fmt.Errorf("%s takes DIR DATASET FILES SIZE", args[0])
		}
		d, err := parseDataset(args[2:])
		if err != nil {
			return err
		}
		return map[string]func(context.Context, string, dataset) error{"verify": verify, "loop": loop, "socket": socket}[args[0]](ctx, args[1], d)
	case "connect", "write":
		if len(args) != 2 {
			return fmt.Errorf("%s takes one path", args[0])
		}
		return map[string]func(context.Context, string) error{"connect": connect, "write": write}[args[0]](ctx, args[1])
	}
	return fmt.Errorf("no command %q", args[0])
}

func parseDataset(args []string) (dataset, error) {
	files, err := strconv.Atoi(args[1])
	if err != nil {
		return dataset{}, fmt.Errorf("FILES: %w", err)
	}
	size, err := strconv.ParseInt(args[2], 10, 64)
	return dataset{name: args[0], files: files, size: size}, err
}
