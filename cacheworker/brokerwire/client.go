package brokerwire

import (
	"context"
	"fmt"
	"os"
	"sync"

	"github.com/larderfs/larder/cacheworker/object"
)

// Client is the node service's end. It connects when it is first used and again after the
// broker was restarted. Safe for concurrent use. Errors wrap the sentinels of package object
// and [ErrExists].
type Client struct {
	socket string

	mu   sync.Mutex // guards the fields below; held while connecting
	peer *Peer
	done chan struct{} // closed when peer has ended
}

// NewClient does not connect yet.
func NewClient(socket string) *Client { return &Client{socket: socket} }

// Mount mounts a volume at path; the same again refreshes its credentials.
func (c *Client) Mount(ctx context.Context, v Volume, path string) error {
	_, err := c.call(ctx, Message{Verb: MountVolume, Volume: &v, Path: path})
	return err
}

// Refresh gives a mounted volume new credentials.
func (c *Client) Refresh(ctx context.Context, v Volume) error {
	_, err := c.call(ctx, Message{Verb: RefreshVolume, Mount: v.ID, Volume: &v})
	return err
}

// RefreshMounts gives a mounted volume its tenant and the secrets of its mounts. Its own credentials stay.
func (c *Client) RefreshMounts(ctx context.Context, v Volume) error {
	_, err := c.call(ctx, Message{Verb: RefreshVolume, Mount: v.ID, Volume: &v, Keep: true})
	return err
}

// Bind shows a mounted volume ("" all of it, "data" its dataset) at target, which exists.
func (c *Client) Bind(ctx context.Context, volumeID, sub, target string, readOnly bool) error {
	_, err := c.call(ctx, Message{Verb: Bind, Mount: volumeID, Sub: sub, Target: target, ReadOnly: readOnly})
	return err
}

// Unmount removes what is mounted at path; nothing is no error.
func (c *Client) Unmount(ctx context.Context, path string) error {
	_, err := c.call(ctx, Message{Verb: Unmount, Path: path})
	return err
}

// Mounts lists the volumes that the broker holds.
func (c *Client) Mounts(ctx context.Context) ([]Mount, error) {
	_, held, err := c.Broker(ctx)
	return held, err
}

// Broker is its process, in its own PID namespace, and the volumes that it holds.
func (c *Client) Broker(ctx context.Context) (pid int, held []Mount, err error) {
	r, err := c.call(ctx, Message{Verb: Mounts})
	return r.PID, r.List, err
}

func (c *Client) call(ctx context.Context, m Message) (Message, error) {
	p, err := c.connect(ctx)
	if err != nil {
		return Message{}, err
	}
	r, files, err := p.Call(ctx, m)
	CloseFiles(files)
	return r, err
}

func (c *Client) connect(ctx context.Context) (*Peer, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.peer != nil {
		select {
		case <-c.done:
			c.peer = nil
		default:
			return c.peer, nil
		}
	}
	conn, err := Dial(ctx, c.socket)
	if err != nil {
		return nil, err
	}
	p := NewPeer(conn, func(context.Context, Message, []*os.File) (Message, []*os.File, error) {
		return Message{}, nil, fmt.Errorf("the node service answers no verb: %w", object.ErrInvalid)
	})
	done := make(chan struct{})
	go func() { // ends with the connection: Close, or the broker's death
		defer close(done)
		p.Run(context.Background())
	}()
	if _, _, err := p.Call(ctx, Message{Verb: Hello, Version: Version, Oldest: Oldest, Role: RoleNode}); err != nil {
		p.Close()
		return nil, err
	}
	c.peer, c.done = p, done
	return p, nil
}

// Close ends the connection and waits for it.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.peer == nil {
		return nil
	}
	c.peer.Close()
	<-c.done
	c.peer = nil
	return nil
}
