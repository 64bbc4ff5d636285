#!/usr/bin/env bash
# Keeps chapters 3 and 4 under churn for MINUTES (default 2): hundreds of clients that connect,
# talk, half-close, stall, reset and send garbage at random, every echoed byte verified. Then stops
# them 1,000 times (20 times if MINUTES is below 1) while clients keep sending, none of which may lose a
# reply. Ends with two lines of figures, and fails on any difference.
set -euo pipefail

usage="usage: scripts/soak.sh [MINUTES] [SEED]   (MINUTES may be a fraction; SEED repeats a run)"
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

cd "$(dirname "$0")/.."
cargo build --quiet --release --locked -p reactor-v03 -p reactor-v04 -p harness
target=${CARGO_TARGET_DIR:-target}/release
# The chapters, and no other program.
unset REACTOR_CMD
"$target/soak" "$target/reactor-v03" "$target/reactor-v04" --seconds "$seconds" --seed "$seed" \
    --stops "$stops"
