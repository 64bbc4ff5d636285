#!/usr/bin/env bash
# Runs a chapter's server, or one of your own, until Ctrl-C, and writes a page that replays what it did.
set -euo pipefail
root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
type -P strace >/dev/null || "$root/scripts/install.sh" strace
exec cargo run --quiet --locked --manifest-path "$root/Cargo.toml" --package xtask -- replay "$@"
