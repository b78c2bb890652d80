package main

import (
	"fmt"
	"net/url"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/embed"
)

// etcd serves one member from a directory until it is told to end. Nothing is synced: the cluster
// that it serves does not outlive the machine.
func etcd() *cobra.Command {
	var dir, client, peer string
	c := &cobra.Command{
		Use:          "etcd",
		Args:         cobra.NoArgs,
		SilenceUsage: true,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg := embed.NewConfig()
			clientURL, err := url.Parse(client)
			if err != nil {
				return fmt.Errorf("listen-client-urls: %w", err)
			}
			peerURL, err := url.Parse(peer)
			if err != nil {
				return fmt.Errorf("listen-peer-urls: %w", err)
			}
			cfg.Dir = dir
			cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{*clientURL}, []url.URL{*clientURL}
			cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{*peerURL}, []url.URL{*peerURL}
			cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
			cfg.UnsafeNoFsync = true
			cfg.LogLevel = "warn"
			e, err := embed.StartEtcd(cfg)
			if err != nil {
				return fmt.Errorf("start etcd in %s: %w", dir, err)
			}
			defer e.Close()
			return <-e.Err()
		},
	}
	c.Flags().StringVar(&dir, "data-dir", "", "directory of the member's data")
	c.Flags().StringVar(&client, "listen-client-urls", "http://127.0.0.1:2379", "where clients are served")
	c.Flags().StringVar(&peer, "listen-peer-urls", "http://127.0.0.1:2380", "where peers would be served")
	return c
}
