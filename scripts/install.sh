#!/usr/bin/env bash
# Installs those of Debian's packages that are named and missing, as root or by sudo.
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
        # There may be no terminal to type a password in.
        root=(sudo -n)
    fi
    printf 'installing %s\n' "${missing[*]}" >&2
    "${root[@]}" apt-get -qq update || true
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
        "${missing[@]}" >/dev/null </dev/null
fi
