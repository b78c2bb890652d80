package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// Addresses: nodes are 10.231.0.N, their pods 10.244.N.0/24, Services 10.96.0.0/16; the machine
// itself is 10.231.0.254, so that programs on it reach the API server.
const (
	serviceIP    = "10.96.0.1"
	dnsIP        = "10.96.0.10" // on n1's loopback interface
	serviceRange = "10.96.0.0/16"
	podRange     = "10.244.0.0/16"
	hostAddress  = "10.231.0.254/24"
	hostLink     = "larder-e2e0"
	bridge       = "node0"
	apiPort      = 6443
	maxNodes     = 9
)

func address(node int) string { return fmt.Sprintf("10.231.0.%d", node) }

func ip(format string, args ...any) error {
	words := strings.Fields(fmt.Sprintf(format, args...))
	if out, err := exec.Command("ip", words...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(words, " "), err, out)
	}
	return nil
}

func each(fs ...func() error) error {
	for _, f := range fs {
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}

func ips(commands ...string) error {
	for _, c := range commands {
		if err := ip("%s", c); err != nil {
			return err
		}
	}
	return nil
}

// makeNetwork runs inside a node. A bridge holds its address, because dummy interfaces may be
// missing from the kernel; [cluster.join] connects the bridges.
func makeNetwork(node int) error {
	err := ips("link set lo up", "link add "+bridge+" type bridge",
		"addr add "+address(node)+"/24 dev "+bridge, "link set "+bridge+" up")
	if err != nil {
		return err
	}
	if node == 1 {
		err = ip("addr add %s/32 dev lo", dnsIP)
	} else {
		err = ip("route add %s/32 via %s", dnsIP, address(1))
	}
	if err != nil {
		return err
	}
	for other := 1; other <= maxNodes; other++ {
		if other != node {
			if err := ip("route add 10.244.%d.0/24 via %s", other, address(other)); err != nil {
				return err
			}
		}
	}
	return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644)
}

// join connects a started node: n1 to the machine, the others to n1.
func (c *cluster) join(name string) error {
	i, err := index(name)
	if err != nil {
		return err
	}
	pid, err := c.pid(name)
	if err != nil {
		return err
	}
	if i == 1 {
		if _, err := net.InterfaceByName(hostLink); err == nil {
			if err := ip("link del %s", hostLink); err != nil {
				return err
			}
		}
		if err := ips("link add "+hostLink+" type veth peer name host netns "+strconv.Itoa(pid),
			"addr add "+hostAddress+" dev "+hostLink, "link set "+hostLink+" up"); err != nil {
			return err
		}
		return c.inNetwork(name, "ip link set host master "+bridge+" up")
	}
	return each(
		func() error {
			return c.inNetwork("n1", fmt.Sprintf("ip link add v%d type veth peer name v1 netns %d", i, pid))
		},
		func() error { return c.inNetwork("n1", fmt.Sprintf("ip link set v%d master %s up", i, bridge)) },
		func() error { return c.inNetwork(name, "ip link set v1 master "+bridge+" up") },
	)
}

func (c *cluster) inNetwork(node, command string) error {
	pid, err := c.pid(node)
	if err != nil {
		return err
	}
	args := append([]string{"-t", strconv.Itoa(pid), "-n", "--"}, strings.Fields(command)...)
	if out, err := exec.Command("nsenter", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s in the network of %s: %w: %s", command, node, err, out)
	}
	return nil
}
