#!/usr/bin/env bash
# Shows what changed from one chapter to a later one: the diff of their files, and what is new in common.
# In colour on a terminal.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

# shellcheck source=scripts/chapters.sh
source scripts/chapters.sh
mapfile -t CHAPTERS < <(chapters)

usage() {
    cat <<END
Usage: scripts/diff.sh FROM TO
       scripts/diff.sh --stat

Shows what changed from one chapter to a later one (${CHAPTERS[*]}).
With --stat, shows how many lines each chapter changed, and how many it has.
END
}

# Prints the index of a chapter in the list.
place_of() {
    local n
    for n in "${!CHAPTERS[@]}"; do
        if [[ ${CHAPTERS[n]} == "$1" ]]; then
            echo "$n"
            return
        fi
    done
    printf 'diff.sh: no such chapter: %s\n' "$1" >&2
    exit 2
}

# Prints one row for each step. Programs other than the server, in src/bin, do not count.
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
    printf 'diff.sh: %s is not later than %s\n' "$2" "$1" >&2
    exit 2
fi

color=never
if [[ -t 1 && -z ${NO_COLOR-} ]]; then
    color=always
fi

# git diff exits with 1 when there is a difference, which is expected.
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
        # In files that existed before: the first line of each item whose comment has the tag.
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
# Quitting the pager early closes the pipe, which is not an error.
show "$@" | ${pager:-cat} || (($? == 141))
