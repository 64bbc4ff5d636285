#!/usr/bin/env bash
# Connects a crowd of clients to one chapter, all at the same time, and verifies that each of them is
# served. Shows how long that takes, and the server's threads and memory. Fails if a client is left out,
# as all but one are in chapter 2.
set -euo pipefail

usage="Usage: scripts/crowd.sh [CLIENTS] [CHAPTER]   (default: 5000 clients, v03)"
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    echo "$usage"
    exit 0
fi
clients=${1:-5000} chapter=${2:-v03}
# The kernel has some 28,000 ports for connections from one address to one server.
if [[ $# -gt 2 || ! $clients =~ ^[1-9][0-9]{0,4}$ || $clients -gt 25000 ]]; then
    echo "$usage" >&2
    echo "CLIENTS is a number from 1 to 25000" >&2
    exit 2
fi

cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
# shellcheck source=scripts/chapters.sh
source scripts/chapters.sh
# Chapter 1 says hello and closes, so it has no connections to keep.
if ! servers | awk '$0 >= "v02"' | grep -qxF -- "$chapter"; then
    echo "$usage" >&2
    echo "CHAPTER is one of: $(servers | awk '$0 >= "v02"' | xargs)" >&2
    exit 2
fi
cargo build --quiet --release --locked -p "reactor-$chapter" -p harness
# REACTOR_CMD would replace the chapter with another program.
unset REACTOR_CMD
target=${CARGO_TARGET_DIR:-target}/release
"$target/crowd" "$target/reactor-$chapter" "$clients"
