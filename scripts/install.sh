#!/usr/bin/env bash
# Installs Debian packages, unless they are installed already. Uses sudo if not run as root.
set -euo pipefail

usage='Usage: scripts/install.sh PACKAGE...'
case ${1-} in
    -h | --help) echo "$usage" && exit ;;
    '' | -*) echo "$usage" >&2 && exit 2 ;;
esac
missing=()
for package in "$@"; do
    if [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) != installed ]]; then
        missing+=("$package")
    fi
done
if ((${#missing[@]} > 0)); then
    root=()
    if ((EUID != 0)); then
        # Fails instead of asking for a password: there may be no terminal.
        root=(sudo -n)
    fi
    printf 'installing %s\n' "${missing[*]}" >&2
    "${root[@]}" apt-get -qq update || true
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
        "${missing[@]}" >/dev/null </dev/null
fi
