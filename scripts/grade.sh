#!/usr/bin/env bash
# Grades a server of your own, in any language, by a chapter's cases (the command may be relative), or your
# solution of an exercise: scripts/grade.sh exercise v03-2
set -euo pipefail
root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
[[ ${1-} == exercise ]] || set -- grade "$@"
exec cargo run --quiet --locked --manifest-path "$root/Cargo.toml" --package xtask -- "$@"
