package kube

import _ "k8s.io/kubelet/pkg/apis/pluginregistration/v1" // until the node plugin registers itself
