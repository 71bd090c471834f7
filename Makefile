# `make demo` and `make test` set themselves up on a fresh machine: git, make, Python >= 3.11 and PyPI are enough.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
VENV ?= .venv
BIN := $(VENV)/bin
export LORALINE_VENV := $(VENV)
PYTEST := $(BIN)/python -m pytest
# Processes that run the tests, each whole files. Most tests wait for servers and engines, so two do on two cores.
WORKERS ?= 2

.PHONY: help setup setup-dev demo compose test test-fast check lint types imports proto check-proto proto-baseline check-lock check-docs check-monitoring lock sbom release bench endurance clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Install what the demo needs into .venv
	@tools/setup.sh run

setup-dev: ## Install what the tests need into .venv
	@tools/setup.sh run
	@tools/setup.sh dev

demo: setup ## Raw text to answers of the tuned model beside the base's: the whole line, for real, in minutes
	@$(BIN)/python -m loraline.allinone.demo

compose: ## Everything in containers: the stages, MinIO, Postgres, Prometheus, Grafana (docs/deploy-compose.md)
	@python3 deploy/compose/make_secrets.py
	@docker compose up -d --build --wait

# A test whose S3 server, Postgres or engine is missing fails instead of being skipped; set it to 0 where one has no wheel.
export LORALINE_REQUIRE_SERVERS ?= 1

test: setup-dev ## Every test that needs no GPU
	@$(PYTEST) -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-fast: setup-dev ## The tests that take seconds
	@$(PYTEST) -m "not slow and not packages" $(PYTEST_ARGS)

check: lint types imports check-proto check-docs check-lock ## Everything that reads the code without running it

lint: setup-dev ## ruff
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup-dev ## pyright
	@$(BIN)/pyright

imports: setup-dev ## Who may import whom
	@$(BIN)/lint-imports

proto: setup-dev ## Generate the stubs of the public contract
	@PATH="$(PWD)/$(BIN):$$PATH" tools/generate_stubs.sh

check-proto: setup-dev ## Lint the protos, refuse breaking changes, compare the committed stubs with a fresh run
	@$(BIN)/buf lint
	@$(BIN)/buf build -o - | $(BIN)/buf breaking - --against proto/baseline.binpb || { echo "The contract breaks callers. Add instead of changing; CONTRIBUTING.md tells how to accept a break."; exit 1; }
	@$(BIN)/buf format -d --exit-code >/dev/null || { echo "run: buf format -w"; exit 1; }
	@fresh=$$(mktemp -d); PATH="$(PWD)/$(BIN):$$PATH" tools/generate_stubs.sh "$$fresh" >/dev/null 2>&1; \
	  diff -r -x __pycache__ -x py.typed packages/api/src "$$fresh" >/dev/null || { echo "The stubs are not what proto/ says; run: make proto"; exit 1; }; \
	  rm -r "$$fresh"; echo "stubs match proto/"

proto-baseline: setup-dev ## Take the contract as it is for what later changes are compared with: at a release, or to accept a break
	@$(BIN)/buf build --exclude-source-info -o proto/baseline.binpb; echo "proto/baseline.binpb is the contract of today"

check-docs: setup-dev ## Compare generated pages with a fresh run
	@fresh=$$(mktemp); $(BIN)/python -m loraline.core.diagnostics.page "$$fresh"; \
	  diff -q docs/troubleshooting.md "$$fresh" >/dev/null || { echo "docs/troubleshooting.md is stale; run: $(BIN)/python -m loraline.core.diagnostics.page docs/troubleshooting.md"; exit 1; }; \
	  rm "$$fresh"; echo "docs/troubleshooting.md matches the diagnostics entries"
	@fresh=$$(mktemp -d); $(BIN)/python tools/monitoring/catalogue.py "$$fresh/metrics.md" >/dev/null; \
	  diff -q docs/metrics.md "$$fresh/metrics.md" >/dev/null || { echo "docs/metrics.md is stale; run: $(BIN)/python tools/monitoring/catalogue.py docs/metrics.md"; exit 1; }; \
	  $(BIN)/python -W ignore tools/monitoring/dashboards.py "$$fresh"; \
	  for made in "$$fresh"/*.json; do diff -q "$$made" "deploy/grafana/dashboards/$${made##*/}" >/dev/null || { echo "deploy/grafana/dashboards is stale; run: $(BIN)/python tools/monitoring/dashboards.py"; exit 1; }; done; \
	  rm -r "$$fresh"; echo "docs/metrics.md and deploy/grafana/dashboards match the code"

check-monitoring: setup-dev ## Real services, a real Prometheus, a load: every query of every panel and alert (minutes)
	@command -v prometheus >/dev/null || { echo "prometheus is not installed; it has no PyPI package. Debian: apt-get install prometheus"; exit 2; }
	@$(PYTEST) tests/monitoring/live_check.py $(PYTEST_ARGS)

check-lock: setup-dev ## Compare the pinned requirements with what the packages ask for
	@PATH="$(PWD)/$(BIN):$$PATH" tools/lock.sh --check

lock: setup-dev ## Write requirements/*.txt anew
	@PATH="$(PWD)/$(BIN):$$PATH" tools/lock.sh

sbom: setup-dev ## What Python packages each image holds, as CycloneDX, into dist/sbom
	@$(BIN)/python tools/sbom.py

release: setup-dev ## Wheels of all packages, checked in a clean environment, and bills of materials, into dist/
	@$(BIN)/python tools/release.py

bench: setup-dev ## Run one benchmark: make bench NAME=artifacts, or NAME=datagen-peers for benchmarks/datagen/peers.py
	@test -n "$(NAME)" || { echo "NAME is one of: $$(cd benchmarks; ls -d */ | grep -v results | tr -d /  | xargs) datagen-quality datagen-peers"; exit 2; }
	@name=$(NAME); case $$name in *-*) file=$${name%%-*}/$${name#*-}.py;; *) file=$$name/bench.py;; esac; \
	  $(BIN)/python benchmarks/$$file $(ARGS)

endurance: setup-dev ## Run one endurance test: make endurance NAME=jobs
	@test -n "$(NAME)" || { echo "NAME is one of: $$(cd benchmarks; ls -d */ | xargs -I{} sh -c 'test -f {}endurance.py && echo {}' | tr -d / | xargs)"; exit 2; }
	@$(BIN)/python benchmarks/$(NAME)/endurance.py $(ARGS)

clean: ## Remove .venv and caches (artifacts in ~/.loraline stay)
	@rm -rf $(VENV) .pytest_cache .ruff_cache
