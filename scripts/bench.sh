#!/usr/bin/env bash
# Benchmarks the chapters and the servers they are compared with, in release builds. `--help` lists
# the arguments. A full run takes a quarter of an hour, one with --quick a minute.
set -euo pipefail
# Paths in the arguments are relative to the user's directory, so this script stays there.
root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/..
# shellcheck source=scripts/chapters.sh
mapfile -t servers < <(cd "$root" && source scripts/chapters.sh && servers)
cargo build --quiet --release --locked --manifest-path "$root/Cargo.toml" -p bench \
    "${servers[@]/#/--package=reactor-}"
# Through cargo, because the user may have configured another target directory.
exec cargo run --quiet --release --locked --manifest-path "$root/Cargo.toml" -p bench --bin bench -- "$@"
