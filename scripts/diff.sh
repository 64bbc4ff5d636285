#!/usr/bin/env bash
# What changed from one chapter to a later one: the files of both, and what is new in common. In colour
# on a terminal.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

# shellcheck source=scripts/chapters.sh
source scripts/chapters.sh
mapfile -t CHAPTERS < <(chapters)

usage() {
    cat <<END
Usage: scripts/diff.sh FROM TO
       scripts/diff.sh --stat

Shows what changed from one chapter to a later one: ${CHAPTERS[*]}.
With --stat, shows how many lines each chapter changed, and how many it has.
END
}

# The place of a chapter in the list.
place_of() {
    local n
    for n in "${!CHAPTERS[@]}"; do
        if [[ ${CHAPTERS[n]} == "$1" ]]; then
            echo "$n"
            return
        fi
    done
    printf 'diff.sh: there is no chapter %s\n' "$1" >&2
    exit 2
}

# One row for each step. Programs beside the server, in src/bin, do not count.
show_stat() {
    local before chapter changed lines
    printf '%-18s  %7s  %5s\n' step changed lines
    for chapter in "${CHAPTERS[@]}"; do
        before=$(predecessor "$chapter")
        [[ -n $before ]] || continue
        changed=$(diff -ruN -x bin "reactor-$before/src" "reactor-$chapter/src" |
            awk '/^[-+]/ && !/^(\+\+\+|---)/ { n++ } END { print n + 0 }') || true
        lines=$(find "reactor-$chapter/src" -name bin -prune -o -name '*.rs' -exec cat {} + | wc -l)
        printf '%-18s  %7d  %5d\n' "$before -> $chapter" "$changed" "$lines"
    done
}

case ${1-} in
    -h | --help) usage && exit ;;
esac
if [[ $# == 1 && $1 == --stat ]]; then
    show_stat
    exit
fi
if (($# != 2)); then
    usage >&2
    exit 2
fi
from=$(place_of "$1")
to=$(place_of "$2")
if ((from >= to)); then
    printf 'diff.sh: %s does not come after %s\n' "$2" "$1" >&2
    exit 2
fi

color=never
if [[ -t 1 && -z ${NO_COLOR-} ]]; then
    color=always
fi

# Exits with 1 when there is a difference, as there should be.
compare() {
    git --no-pager diff --no-index --no-ext-diff --color="$color" "$@" || (($? == 1))
}

show() {
    compare "reactor-$1/src" "reactor-$2/src"
    local chapter file
    for chapter in "${CHAPTERS[@]:from + 1:to - from}"; do
        for file in common/src/*.rs; do
            if grep -q "^//!.*(since $chapter)" "$file"; then
                compare /dev/null "$file"
            fi
        done
        # In files that were there before: the line of the item below each comment that says so.
        awk -v tag="(since $chapter)" '
            FNR == 1 { new = 0 }
            /^\/\/!/ && index($0, tag) { new = 1 }
            /\/\/\// && index($0, tag) && !new { found = 1 }
            found && !/^ *(\/\/\/|#\[)/ {
                sub(/^ */, ""); sub(/ *[({;=,].*/, "")
                print "new in " FILENAME ": " $0
                found = 0
            }
        ' common/src/*.rs
    done
}

pager=''
if [[ $color == always ]]; then
    pager=${PAGER-}
    if [[ -z $pager ]] && type -P less >/dev/null; then
        pager='less -RFX'
    fi
fi
# A pager that is quit early closes the pipe, which is no failure.
show "$@" | ${pager:-cat} || (($? == 141))
