# Everything is built with Go alone; what mounts needs root and /dev/fuse.
SHELL   := bash
FUZZTIME ?= 5s
KILLS    ?= 1000
VERSION  ?= 0.1.0
IMAGE    ?= localhost/larder:$(VERSION)

.PHONY: build image demo chaos faults test test-race test-one-cpu fuzz sanity bench test-deploy e2e e2e-up e2e-down lint generate docs check help
.DEFAULT_GOAL := build

build: ## compile build/larder
	go build -o build/larder ./cmd/larder

# CGO_ENABLED=0 and no path in it: the same source is the same image, wherever it is built.
image: ## the container image as an OCI archive, build/larder-image.tar, named IMAGE
	CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$(VERSION)" -o build/image/larder ./cmd/larder
	cd deploy && go run ./image -binary ../build/image/larder -arch $$(go env GOARCH) -version $(VERSION) -name $(IMAGE) -o ../build/larder-image.tar

demo: ## read a dataset in S3 through a CSI volume, five ways, in one table (root)
	go build -o build/demo ./sanity/demo
	@build/demo

# Under 20 minutes on 2 cores. The race leg runs every test, csi-sanity and the long ones
# (kills, overwriting for a minute) too; the other two leave those out by -short and by -run:
# one CPU is for orders of events that two never show, and fuzzing starts from the seeds that
# the race leg has run already.
test: fusectl test-race test-one-cpu fuzz test-deploy ## all tests but e2e: race detector, one CPU, fuzzing, manifests (root)

test-race: fusectl
	go test -race -p 2 -timeout 15m ./...

test-one-cpu: fusectl
	GOMAXPROCS=1 go test -short -p 1 -timeout 10m ./cacheworker/... ./driver/... ./master/...

fuzz: ## run each fuzz test for FUZZTIME (5s)
	sanity/fuzz.sh $(FUZZTIME)

sanity: fusectl ## csi-sanity over the real driver with real mounts (root)
	go test -count=1 -v -timeout 10m ./sanity

bench: fusectl ## reads warm and cold, requests, memory, TPC-H, each beside its limit; BENCH=regexp selects rows (root)
	command -v fio >/dev/null || apt-get install -y -q fio || (apt-get update -q && apt-get install -y -q fio)
	go build -o build/bench ./sanity/bench
	@build/bench -run '$(BENCH)'

chaos: fusectl ## kill worker and broker under readers that check every byte, until KILLS=1000 count (root)
	go build -o build/chaos ./sanity/chaos
	@build/chaos -kills $(KILLS)

faults: fusectl ## 1000 faults of the store during reads that check every byte (root)
	go test -count=1 -v -timeout 10m ./cacheworker/fusefs -run TestStoreFaultsDuringReads -store-faults 1000

test-deploy: ## manifests, Helm chart, examples and image builder, without a cluster
	cd deploy && go vet ./... && go test -count=1 ./...

e2e: ## all of it in a real Kubernetes of two nodes, or in that of KUBECONFIG; ONLY=regexp selects tests (root)
	@sanity/e2e/run.sh test -only '$(ONLY)'

e2e-up: ## leave that Kubernetes running with Larder in it, and say how to use it (root)
	@sanity/e2e/run.sh up

e2e-down: ## end it (root)
	@sanity/e2e/run.sh down

lint: ## gofmt, vet, staticcheck, import direction, generated code, house rules
	go test -count=1 ./sanity/lint

generate: ## write the Go files of the .proto files, and the Helm chart from the kustomize base and deploy/monitoring
	go run ./sanity/protogen
	cd deploy/helm && go run .

docs: ## write cmd/larder/REFERENCE.md: flags, parameters, metrics, errnos and error codes, as the code has them
	go test -count=1 ./cmd/larder -run TestReferenceIsAsTheCodeIs -rewrite

check: lint test demo ## all that has to pass before a change lands

help: ## this list
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Tests abort connections through it where something hangs.
.PHONY: fusectl
fusectl:
	@mountpoint -q /sys/fs/fuse/connections || mount -t fusectl fusectl /sys/fs/fuse/connections
