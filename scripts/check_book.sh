#!/usr/bin/env bash
# Checks every page of the book in headless Chromium, at the width of a desktop and of a phone, in the
# light and the dark theme: it must load without an error, have all its pictures inlined, contain nothing
# wider than the page, and its replays must step to their ends and back. Also checks that these faults are
# reported, on a page that has all of them.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

case ${1-} in
    '') ;;
    -h | --help) echo 'Usage: scripts/check_book.sh' && exit ;;
    *) echo 'Usage: scripts/check_book.sh' >&2 && exit 2 ;;
esac

type -P chromium >/dev/null || scripts/install.sh chromium
scripts/book.sh --build

scratch=$(mktemp -d)
server=''
cleanup() {
    [[ -z $server ]] || kill "$server" 2>/dev/null || true
    rm -rf "$scratch"
}
trap cleanup EXIT

cp -r docs/book "$scratch/site"
# The page that checks the others, and the one with all the faults.
cp scripts/check_book.html "$scratch/site/check.html"
faults='<img src="gone.svg"><p style="white-space: nowrap">'$(printf 'wide%.0s ' {1..200})
faults+='</p><script>throw new Error("fault")</script>'
# A replay without a recording, and one that ignores a key.
faults+='<reactor-replay id="empty"><script type="application/json">{}</script></reactor-replay>'
faults+='<reactor-replay id="stuck"><script type="application/json">{"title": "", "program": "", "start": {},'
faults+='"sources": [], "steps": [{"say": "It waits.", "actor": "A", "beat": 1, "set": {"kernel": []}}]}</script>'
faults+='</reactor-replay><script>addEventListener("keydown", event => {'
faults+='if (event.key === "ArrowLeft") event.stopPropagation(); }, true)</script></main>'
sed "s|</main>|$faults|" docs/book/v01.html > "$scratch/site/faults.html"
(cd "$scratch/site" && find . -name '*.html' ! -name check.html ! -name print.html ! -name 404.html \
    ! -name 'toc.html' -printf '%P\n' | sort) > "$scratch/site/pages.txt"

# On a free port, which the server prints.
: > "$scratch/log"
python3 -u -m http.server --bind 127.0.0.1 --directory "$scratch/site" 0 > "$scratch/log" 2>/dev/null &
server=$!
port=''
for ((i = 0; i < 200; i++)); do
    port=$(sed -n 's/.* port \([0-9]*\) .*/\1/p' "$scratch/log")
    [[ -z $port ]] || break
    sleep 0.05
done
[[ -n $port ]] || { echo 'check_book.sh: the server has not started' >&2; exit 1; }

flags=(--headless --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --hide-scrollbars "--user-data-dir=$scratch/profile"
    "--window-size=1400,1000" --virtual-time-budget=600000)
if ((EUID == 0)); then
    flags+=(--no-sandbox)
fi
timeout 300 chromium "${flags[@]}" --dump-dom "http://127.0.0.1:$port/check.html" \
    > "$scratch/report.html" 2> "$scratch/chromium.log"
# One line for each fault of a page, and a last line when all pages are checked.
sed -n '/<pre id="report">/,/<\/pre>/p' "$scratch/report.html" | sed 's/<[^>]*>//g; /^$/d' > "$scratch/report"

if ! grep -q '^checked ' "$scratch/report"; then
    echo 'check_book.sh: Chromium did not finish' >&2
    tail -n 5 "$scratch/chromium.log" "$scratch/report" >&2
    exit 1
fi
for fault in 'error: Uncaught Error: fault' 'error: .*gone.svg is not inlined' 'error: gone.svg is still an image' \
    'no picture' 'wider' 'error: This replay is not shown' 'no replay empty' \
    'error: replay stuck: step 1 differs on the way back'; do
    if (($(grep -c "^faults.html.*: $fault" "$scratch/report") != 4)); then
        printf 'check_book.sh: failed to report an intentional fault: %s\n' "$fault" >&2
        exit 1
    fi
done
if grep -v '^faults.html' "$scratch/report" | grep -v '^checked ' >&2; then
    exit 1
fi
grep '^checked ' "$scratch/report"
