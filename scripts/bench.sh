#!/usr/bin/env bash
# Measures chapters 3 and 4 beside their peers, in release builds; takes the arguments of the bench
# program, which `scripts/bench.sh --help` lists. A whole run takes about seven minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --quiet --release --locked -p bench -p reactor-v03 -p reactor-v04
exec "${CARGO_TARGET_DIR:-target}/release/bench" "$@"
