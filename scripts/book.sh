#!/usr/bin/env bash
# Builds the book, and serves it on this machine. If mdBook is missing, builds it from source first, for
# this folder only. If the repository's origin is on the web, each page gets a link to edit it there.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

# shellcheck source=scripts/chapters.sh
source scripts/chapters.sh

readonly VERSION=0.5.2
readonly TOOLS=${CARGO_TARGET_DIR:-target}/tools

usage() {
    cat <<'END'
Usage: scripts/book.sh [--build | --archive | PORT]

Builds the book into docs/book and serves it at http://127.0.0.1:PORT until Ctrl-C. The default PORT
is 3000. With --build, builds the book and does not serve it. With --archive, also packs it into
docs/reactor-book.tar.gz, to be unpacked anywhere and read without a server: open its index.html.
END
}

# The address at which a file can be edited, if the origin is a known host.
edit_url() {
    local origin
    origin=$(git remote get-url origin 2>/dev/null) || return 0
    origin=${origin%.git}
    case $origin in
        ssh://git@*) origin=https://${origin#ssh://git@} ;;
        git@*:*) origin=${origin#git@} && origin=https://${origin/:/\/} ;;
    esac
    case $origin in
        https://github.com/* | https://gitlab.com/* | https://codeberg.org/*)
            printf '%s/edit/main/docs/{path}' "$origin"
            ;;
    esac
}

# Writes what each chapter changed, for its page to include.
write_diffs() {
    local chapter before
    mkdir -p docs/src/diffs
    rm -f docs/src/diffs/*
    for chapter in $(chapters); do
        before=$(predecessor "$chapter")
        if [[ -n $before ]]; then
            scripts/diff.sh "$before" "$chapter" >"docs/src/diffs/$chapter.diff"
        fi
    done
}

port=3000 archive=''
case $#:${1-} in
    1:-h | 1:--help) usage && exit ;;
    1:--build) port='' ;;
    1:--archive) port='' archive=docs/reactor-book.tar.gz ;;
    0:) ;;
    *)
        port=${1-}
        if (($# != 1)) || [[ ! $port =~ ^[1-9][0-9]{0,4}$ ]] || ((port > 65535)); then
            usage >&2
            exit 2
        fi
        ;;
esac

mdbook=$(command -v mdbook) || mdbook=''
if [[ -z $mdbook || $("$mdbook" --version) != "mdbook v$VERSION" ]]; then
    mdbook=$TOOLS/bin/mdbook
fi
if [[ ! -x $mdbook ]]; then
    printf 'building mdBook %s, which takes a minute; only the first time\n' "$VERSION" >&2
    # A debug build takes less than half the time, and builds this book in a second.
    cargo install --quiet --locked --debug --root "$TOOLS" --target-dir "$TOOLS/build" \
        --no-default-features --features search --version "$VERSION" mdbook
    mdbook=$TOOLS/bin/mdbook
fi

url=$(edit_url)
if [[ -n $url ]]; then
    export MDBOOK_OUTPUT__HTML__EDIT_URL_TEMPLATE=$url
fi
write_diffs
"$mdbook" build docs

if [[ -n $archive ]]; then
    tar -czf "$archive" --transform 's,^book,reactor-book,' -C docs book
    printf '%s\n' "$archive"
fi
if [[ -n $port ]]; then
    type -P python3 >/dev/null || scripts/install.sh python3
    exec python3 -m http.server --bind 127.0.0.1 --directory docs/book "$port"
fi
