package main

import (
	"fmt"
	"os"
	"path/filepath"
)

const containerdSocket = "/run/containerd/containerd.sock"

// writeConfigs writes the files that containerd, CNI, the kubelet and CoreDNS read.
func (n *node) writeConfigs() error {
	files := map[string]string{
		"/etc/cni/net.d/10-larder.conflist": n.cniConfig(),
		n.file("containerd.toml"):           n.containerdConfig(),
		n.file("kubelet.yaml"):              n.kubeletConfig(),
		n.file("Corefile"):                  n.corefile(),
		"/etc/resolv.conf":                  "nameserver " + dnsIP + "\n",
	}
	for name, text := range files {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.RemoveAll(name); err != nil { // it may be a link into what we have covered
			return err
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return os.MkdirAll(filepath.Dir(containerdSocket), 0o755)
}

func (n *node) file(name string) string { return filepath.Join(n.dir, name) }

func (n *node) cniConfig() string {
	return fmt.Sprintf(`{"cniVersion":"1.0.0","name":"larder","plugins":[{"type":"ptp","ipMasq":false,"ipam":{"type":"host-local",
"dataDir":"/run/cni-ipam","ranges":[[{"subnet":"10.244.%d.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}}]}
`, n.index)
}

func (n *node) containerdConfig() string {
	return fmt.Sprintf(`version = 3
root = %q
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.erofs",
  "io.containerd.differ.v1.erofs", "io.containerd.nri.v1.nri", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[grpc]
  address = %q
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "localhost/pause:1"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true # without CAP_SYS_RESOURCE, runc cannot lower a sandbox's oom_score_adj
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
        SystemdCgroup = false
        BinaryName = %q
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = [%q]
    conf_dir = "/etc/cni/net.d"
`, n.file("containerd"), containerdSocket, filepath.Join(n.bin(), "runc"), n.bin())
}

func (n *node) kubeletConfig() string {
	return fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /%s
containerRuntimeEndpoint: unix://%s
failSwapOn: false
resolvConf: ""
clusterDNS: [%s]
clusterDomain: cluster.local
readOnlyPort: 0
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: %s}}
authorization: {mode: Webhook}
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: "100Mi", nodefs.available: "1%%", nodefs.inodesFree: "1%%", imagefs.available: "1%%", imagefs.inodesFree: "1%%"}
syncFrequency: 10s
volumeStatsAggPeriod: 10s
nodeLeaseDurationSeconds: 20
`, cgroupName(n.name), containerdSocket, dnsIP, n.pki("ca.crt"))
}

func (n *node) corefile() string {
	return fmt.Sprintf(`.:53 {
    bind %s
    errors
    kubernetes cluster.local in-addr.arpa {
        kubeconfig %s
        ttl 5
    }
}
`, dnsIP, n.kubeconfig("dns"))
}

// arguments are those of the node's programs.
func (n *node) arguments(program string) []string {
	kubeconfigs := func(user string) []string {
		k := n.kubeconfig(user)
		return []string{"--kubeconfig=" + k, "--authentication-kubeconfig=" + k, "--authorization-kubeconfig=" + k,
			"--leader-elect=false", "--cert-dir=" + n.file(user)}
	}
	switch program {
	case "etcd":
		return []string{"--data-dir=" + n.file("etcd")}
	case "kube-apiserver":
		return []string{"--etcd-servers=http://127.0.0.1:2379", fmt.Sprintf("--secure-port=%d", apiPort), "--bind-address=0.0.0.0", "--requestheader-client-ca-file=" + n.pki("ca.crt"), "--requestheader-allowed-names=nobody",
			"--advertise-address=" + address(1), "--tls-cert-file=" + n.pki("apiserver.crt"), "--tls-private-key-file=" + n.pki("apiserver.key"),
			"--client-ca-file=" + n.pki("ca.crt"), "--kubelet-client-certificate=" + n.pki("kubelet-client.crt"),
			"--kubelet-client-key=" + n.pki("kubelet-client.key"), "--kubelet-preferred-address-types=InternalIP",
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--service-cluster-ip-range=" + serviceRange,
			"--allow-privileged=true", "--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file=" + n.pki("sa.pub"),
			"--service-account-signing-key-file=" + n.pki("sa.key"), "--cert-dir=" + n.file("apiserver")}
	case "kube-controller-manager":
		return append(kubeconfigs("kcm"), "--use-service-account-credentials=true", "--service-account-private-key-file="+n.pki("sa.key"),
			"--root-ca-file="+n.pki("ca.crt"), "--node-monitor-grace-period=24s")
	case "kube-scheduler":
		return kubeconfigs("scheduler")
	case "coredns":
		return []string{"-conf", n.file("Corefile")}
	case "containerd":
		return []string{"--config", n.file("containerd.toml")}
	case "kubelet":
		return []string{"--config=" + n.file("kubelet.yaml"), "--kubeconfig=" + n.kubeconfig(n.name), "--hostname-override=" + n.name,
			"--node-ip=" + address(n.index), "--root-dir=/var/lib/kubelet", "-v=2"}
	case "kube-proxy":
		// The conntrack settings are the machine's: 0 leaves them alone.
		return []string{"--kubeconfig=" + n.kubeconfig("proxy"), "--hostname-override=" + n.name, "--proxy-mode=iptables", "--cluster-cidr=" + podRange,
			"--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0"}
	}
	return nil
}
