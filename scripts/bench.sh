#!/usr/bin/env bash
# Measures the chapters beside their peers, in release builds; takes the arguments of the bench
# program, which `scripts/bench.sh --help` lists. A whole run takes a quarter of an hour, one with
# --quick a minute.
set -euo pipefail
# Paths in the arguments are relative to where the user is, so this script stays there.
root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/..
# shellcheck source=scripts/chapters.sh
mapfile -t servers < <(cd "$root" && source scripts/chapters.sh && servers)
cargo build --quiet --release --locked --manifest-path "$root/Cargo.toml" -p bench \
    "${servers[@]/#/--package=reactor-}"
# Not from target/ by name: the user may have configured another place.
exec cargo run --quiet --release --locked --manifest-path "$root/Cargo.toml" -p bench --bin bench -- "$@"
