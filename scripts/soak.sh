#!/usr/bin/env bash
# Soak test for chapter 3 and later: for MINUTES (default 2), hundreds of clients connect, talk,
# half-close, stall, reset and send garbage at random. Every echoed byte is verified. Then each server
# is stopped 500 times (10 times if MINUTES is below 1) while clients keep sending, and none of them may
# lose a reply. Ends with a summary, and fails on any difference.
set -euo pipefail

usage="Usage: scripts/soak.sh [MINUTES] [SEED]   (MINUTES may be a fraction; SEED repeats a run)"
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    echo "$usage"
    exit 0
fi
if [[ $# -gt 2 || ! ${1:-2} =~ ^[0-9]*\.?[0-9]+$ || ! ${2:-0} =~ ^[0-9]+$ ]]; then
    echo "$usage" >&2
    exit 2
fi
seconds=$(awk -v minutes="${1:-2}" 'BEGIN { s = int(minutes * 60 + 0.5); print s < 1 ? 1 : s }')
seed=${2:-$(date +%s)}
stops=$((seconds < 60 ? 10 : 500))

cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
# shellcheck source=scripts/chapters.sh
source scripts/chapters.sh
packages=() programs=()
target=${CARGO_TARGET_DIR:-target}/release
for chapter in $(servers | awk '$0 >= "v03"'); do
    packages+=(-p "reactor-$chapter")
    programs+=("$target/reactor-$chapter")
done
cargo build --quiet --release --locked "${packages[@]}" -p harness
# REACTOR_CMD would replace the chapters with another program.
unset REACTOR_CMD
"$target/soak" "${programs[@]}" --seconds "$seconds" --seed "$seed" --stops "$stops"
