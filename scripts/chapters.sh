# shellcheck shell=bash
# The list of chapters, for other scripts to source from the root of the workspace. A chapter is a folder
# reactor-*; its name is the part after the hyphen.

# All chapters in order, one per line: v01, v02, ..., v04-client, ...
chapters() {
    local folder
    for folder in reactor-*/; do
        folder=${folder%/}
        printf '%s\n' "${folder#reactor-}"
    done | LC_ALL=C sort
}

# The servers only, which are the main line: v01, v02, ... without v04-client.
servers() { chapters | grep -v -; }

# predecessor CHAPTER: the chapter to compare it with, or nothing. For v04-client and v13, which is chapter 4
# written in another way, that is v04; for any other server, the server before it.
predecessor() {
    case $1 in
        v13) printf 'v04\n' ;;
        *-*) printf '%s\n' "${1%%-*}" ;;
        *) servers | awk -v chapter="$1" '$0 == chapter { printf "%s", before } { before = $0 "\n" }' ;;
    esac
}
