#!/usr/bin/env bash
# The end-to-end tests: `make e2e`, `make e2e-up`, `make e2e-down`. See README.md.
#
#   run.sh up          build what is needed, start the cluster, install Larder
#   run.sh test        up, the tests (arguments are theirs), down
#   run.sh down        end the cluster
#
# With KUBECONFIG, test runs against that cluster, where Larder is installed, and starts none.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=build/e2e
cluster=$out/cluster

# What is built needs, and what a node runs.
packages() {
	local missing=()
	for need in "$@"; do
		case $need in
		venv) python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv) ;;
		*.pc) pkg-config --exists "${need%.pc}" 2>/dev/null || missing+=(libseccomp-dev) ;;
		*) command -v "${need%%:*}" >/dev/null || missing+=("${need##*:}") ;;
		esac
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	apt-get install -y -q --no-install-recommends "${missing[@]}" ||
		{ apt-get update -q && apt-get install -y -q --no-install-recommends "${missing[@]}"; }
}

tools() {
	mkdir -p $out
	CGO_ENABLED=0 go build -C sanity/e2e -o "../../$out/" ./cluster ./probe
	CGO_ENABLED=0 go test -C sanity/e2e -c -o "../../$out/test" .
}

# The image of the commit before this one, and its manifests, for the test of upgrades. A clone
# may have one commit only: then there is none.
previous() {
	local tree=$out/previous commit
	rm -rf "$tree" $out/previous-overlay $out/previous.tar
	commit=$(git rev-parse -q --verify 'HEAD~1^{commit}') || return 0
	mkdir "$tree" && git archive "$commit" | tar -x -C "$tree"
	if [ -d "$tree/sanity/e2e/overlay" ]; then
		CGO_ENABLED=0 go build -C "$tree" -trimpath -ldflags "-s -w -X main.version=previous" -o image-larder ./cmd/larder
		go run -C deploy ./image -binary "../$tree/image-larder" -arch "$(go env GOARCH)" -version previous \
			-name localhost/larder:previous -o ../$out/previous.tar
		mkdir -p $out/previous-overlay
		cat >$out/previous-overlay/kustomization.yaml <<-E
			resources: [../previous/sanity/e2e/overlay]
			images: [{name: localhost/larder, newTag: previous}]
		E
	fi
}

up() {
	packages gcc:gcc pkg-config libseccomp.pc ip:iproute2 iptables busybox:busybox-static nsenter:util-linux
	make -s image
	tools
	previous
	$cluster up 2
	$cluster load build/larder-image.tar $(ls $out/previous.tar 2>/dev/null)
	eval "$($cluster env)"
	kubectl apply -k sanity/e2e/overlay >/dev/null
	for what in statefulset/larder-master daemonset/larder-node daemonset/larder-worker deployment/larder-controller; do
		kubectl -n larder-system rollout status $what --timeout=120s | tail -n 1
	done
}

down() { [ ! -x $cluster ] || $cluster down; }

case ${1-} in
up)
	up
	cat <<-E

		Kubernetes runs, two nodes, with Larder in it. To use it:

		    eval "\$($cluster env)"                     # KUBECONFIG, and kubectl in PATH
		    kubectl get pods -A -o wide
		    $cluster exec n1 sh                        # inside a node
		    $cluster load ARCHIVE…                     # images for your pods; localhost/larder-e2e:1 has a shell
		    make e2e-down
	E
	;;
down) down ;;
test)
	shift
	if [ -n "${KUBECONFIG-}" ]; then
		tools
		exec $out/test -kubeconfig "$KUBECONFIG" "$@"
	fi
	down
	trap down EXIT
	packages javac:openjdk-17-jdk-headless venv
	go vet -C sanity/e2e ./...
	up
	$out/test -cluster $cluster -kubeconfig "$KUBECONFIG" "$@"
	;;
*)
	sed -n 2,9p "$0" >&2
	exit 2
	;;
esac
