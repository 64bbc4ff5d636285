# shellcheck shell=bash
# The chapters, for the scripts that go through them; to be sourced, with the root of the workspace as
# the working directory. A chapter is a folder reactor-*, and goes by what is after the hyphen.

# All of them in their order, one a line: v01, v02, ..., v04-client, ...
chapters() {
    local folder
    for folder in reactor-*/; do
        folder=${folder%/}
        printf '%s\n' "${folder#reactor-}"
    done | LC_ALL=C sort
}

# Those that are a server, and so the main line: v01, v02, ... without v04-client.
servers() { chapters | grep -v -; }

# predecessor CHAPTER: the one that it is compared with, or nothing. That is v04 for v04-client, and the
# server before it for a server.
predecessor() {
    case $1 in
        *-*) printf '%s\n' "${1%%-*}" ;;
        *) servers | awk -v chapter="$1" '$0 == chapter { printf "%s", before } { before = $0 "\n" }' ;;
    esac
}
