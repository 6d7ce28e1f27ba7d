# The project's commands. `make` lists them.
SHELL      := /bin/bash
.SHELLFLAGS := -euo pipefail -c
export PATH := $(PATH):$(HOME)/.cargo/bin
# Enough cases to find what a change breaks, few enough to wait for; raise it for a long run.
export PROPTEST_CASES ?= 64

.PHONY: help setup setup-demo setup-bench build demo pauses bench-proxy bench-micro bench-feed crash-feed test test-drivers test-comparison histories format lint unit docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what is missing for the tests (Debian packages, PostgreSQL 13 to 18)
	@scripts/setup

setup-demo:
	@scripts/setup 18

setup-bench:
	@scripts/setup bench

build: setup-demo ## release build
	@echo "building… (release; the first time takes some minutes)"
	@cargo build --release --locked --quiet

demo: build ## a real PostgreSQL 15 under load moves to a real PostgreSQL 18, and back
	@target/release/understudy demo $(DEMO_ARGS)

pauses: build ## five quick demos; the pauses of cutover and rollback, with medians
	@scripts/pauses

bench-proxy: setup-demo ## direct, haproxy, PgBouncer and understudy side by side (BENCH_ARGS="rounds=1 seconds=2 parts=pgbench")
	@cargo bench --locked --quiet --profile dist --bench proxy -- $(BENCH_ARGS)

bench-micro: ## framing, classification, bookkeeping, comparison
	@cargo bench --locked --quiet --profile dist --bench micro -- $(BENCH_ARGS)

bench-feed: setup-bench ## copy, catch-up and live lag against pg_dump, pgcopydb and a native subscription (BENCH_ARGS="parts=catchup rounds=1")
	@cargo bench --locked --quiet --bench feed -- $(BENCH_ARGS)

crash-feed: setup ## kill feed, source and shadow at random moments, compare every row (ROUNDS=300 SEED=…)
	@UNDERSTUDY_ROUNDS=$(or $(ROUNDS),300) UNDERSTUDY_SEED=$(or $(SEED),random) \
		cargo test --locked --quiet --test feed_crash -- --nocapture

test: setup format lint unit docs ## what CI runs: format, lint, all tests, documentation
	@echo "== all passed"

format:
	@echo "== format"
	@cargo fmt --all --check

lint:
	@echo "== lint"
	@cargo clippy --locked --all-targets --quiet -- -D warnings

test-drivers: ## real drivers (Python, Node.js, Java, Rust, psql, pgbench) direct and through the proxy
	@scripts/setup drivers
	@cargo test --locked --quiet --test drivers -- --include-ignored --nocapture

test-comparison: setup-demo ## traps, injected differences, a source busy for SECONDS_BUSY=3 (600 for the long run) at 100 % sampling
	@UNDERSTUDY_SECONDS=$(or $(SECONDS_BUSY),3) cargo test --locked --quiet --test traffic_compare -- --include-ignored --nocapture

histories: ## the migrations of all permissively licensed projects in HISTORIES=<folder with events.csv>, played under load
	@UNDERSTUDY_HISTORIES="$(HISTORIES)" cargo test --locked --quiet --test schema_histories -- --nocapture

unit:
	@echo "== tests (PROPTEST_CASES=$(PROPTEST_CASES))"
	@cargo test --locked --quiet

docs:
	@echo "== documentation"
	@# the rooms' pages name their private parts on purpose
	@RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" cargo doc --locked --no-deps --quiet

clean: ## remove build results and downloads
	@cargo clean
	@rm -rf .deps
