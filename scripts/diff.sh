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

# is_new FILE CHAPTER...: whether one of these chapters has brought the file into common.
is_new() {
    local file=common/src/$1 chapter
    shift
    [[ -e $file ]] || return 1
    for chapter in "$@"; do
        ! grep -q "^//!.*(since $chapter)" "$file" || return 0
    done
    return 1
}

# sources FROM TO: the names of the files that either chapter has, below src.
sources() {
    (cd "reactor-$1/src" && find . -name '*.rs') >"$scratch"
    (cd "reactor-$2/src" && find . -name '*.rs') >>"$scratch"
    sed 's,^\./,,' "$scratch" | LC_ALL=C sort -u
}

# moved FROM TO CHAPTER...: those that have moved from FROM to common meanwhile.
moved() {
    local from=$1 to=$2 file
    shift 2
    for file in $(sources "$from" "$to"); do
        if [[ ! -e reactor-$to/src/$file ]] && is_new "$file" "$@"; then
            printf '%s\n' "$file"
        fi
    done
}

# Prints one row for each step. Programs other than the server, in src/bin, do not count, and neither do
# files that have moved to common.
show_stat() {
    local before chapter changed lines file exclude
    printf '%-18s  %7s  %5s\n' step changed lines
    for chapter in "${CHAPTERS[@]}"; do
        before=$(predecessor "$chapter")
        [[ -n $before ]] || continue
        exclude=(-x bin)
        for file in $(moved "$before" "$chapter" "$chapter"); do
            exclude+=(-x "$file")
        done
        changed=$(diff -ruN "${exclude[@]}" "reactor-$before/src" "reactor-$chapter/src" |
            awk '/^[-+]/ && !/^(\+\+\+|---)/ { n++ } END { print n + 0 }') || true
        lines=$(find "reactor-$chapter/src" -name bin -prune -o -name '*.rs' -exec cat {} + | wc -l)
        printf '%-18s  %7d  %5d\n' "$before -> $chapter" "$changed" "$lines"
    done
}

case ${1-} in
    -h | --help) usage && exit ;;
esac
scratch=$(mktemp)
trap 'rm -f "$scratch"' EXIT
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
    local chapter file before after new=("${CHAPTERS[@]:from + 1:to - from}")
    # If it continues that chapter, what others in between have brought is none of its own.
    [[ $1 != "$(predecessor "$2")" ]] || new=("$2")
    for file in $(sources "$1" "$2"); do
        before=reactor-$1/src/$file after=reactor-$2/src/$file
        [[ -e $before ]] || before=/dev/null
        if [[ ! -e $after ]]; then
            after=/dev/null
            # A file that has moved to common is compared with what became of it there.
            if is_new "$file" "${new[@]}"; then
                after=common/src/$file
            fi
        fi
        compare "$before" "$after"
    done
    for chapter in "${new[@]}"; do
        for file in common/src/*.rs; do
            if is_new "${file##*/}" "$chapter" && [[ ! -e reactor-$1/src/${file##*/} ]]; then
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
