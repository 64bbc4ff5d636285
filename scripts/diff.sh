#!/usr/bin/env bash
# What changed from one chapter to another: the files of both, in colour, and what the second one
# brought into common.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

usage() {
    cat <<'END'
Usage: scripts/diff.sh FROM TO

Shows what changed between two chapters: v01, v02, v03, v04 or v04-client.
END
}

case ${1-} in
    -h | --help) usage && exit ;;
esac
if (($# != 2)); then
    usage >&2
    exit 2
fi
for chapter in "$@"; do
    if [[ ! -d reactor-$chapter/src ]]; then
        printf 'diff.sh: there is no chapter %s\n' "$chapter" >&2
        usage >&2
        exit 2
    fi
done

color=never
if [[ -t 1 && -z ${NO_COLOR-} ]]; then
    color=always
fi

show() {
    # It exits with 1 when there is a difference, as there should be.
    git --no-pager diff --no-index --no-ext-diff --color="$color" "reactor-$1/src" "reactor-$2/src" || (($? == 1))
    printf '\nNew in common:\n'
    # The line of the item below each comment that says so, without its punctuation.
    awk -v tag="(since $2)" '
        index($0, tag) && /^\/\/!/ { print FILENAME }
        index($0, tag) && /\/\/\// { found = 1 }
        found && /^ *pub / { sub(/^ */, ""); sub(/[({;=].*/, ""); print FILENAME ": " $0; found = 0 }
    ' common/src/*.rs
}

if [[ $color = always ]]; then
    pager=${PAGER:-cat}
    if [[ -z ${PAGER-} ]] && type -P less >/dev/null; then
        pager='less -RFX'
    fi
    show "$@" | $pager
else
    show "$@"
fi
