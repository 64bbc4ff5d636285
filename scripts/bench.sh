#!/usr/bin/env bash
# Measures the chapters beside their peers, in release builds; takes the arguments of the bench
# program, which `scripts/bench.sh --help` lists. A whole run takes a quarter of an hour, one with
# --quick a minute.
set -euo pipefail
manifest=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../Cargo.toml
cargo build --quiet --release --locked --manifest-path "$manifest" -p bench \
    -p reactor-v01 -p reactor-v02 -p reactor-v03 -p reactor-v04
# Not from target/ by name: the user may have configured another place.
exec cargo run --quiet --release --locked --manifest-path "$manifest" -p bench --bin bench -- "$@"
