#!/usr/bin/env bash
# Builds the chapters, runs their tests, and then tries each one from outside, as a learner would:
# with every netcat that is installed, with the course's clients, with Ctrl-C and with mistakes.
#
# Each check has a subshell, a directory and a server on a free port of its own. Anything slow runs in
# the background under `wait`: there bash runs a trap at once, but during a foreground command only
# when that has ended.
set -euo pipefail

usage() {
    cat <<END
Usage: scripts/test_all.sh [CHAPTER]...

Builds and tests the given chapters (of ${CHAPTERS[*]}), or all of them.
A chapter's client is tested along with it.

       REACTOR_CMD='./mine --addr {addr}' scripts/test_all.sh CHAPTER...

Runs the black-box tests of the given chapters against another server, in any language.
{addr} in its command is replaced by the HOST:PORT to listen on. Tests that read the chapter's log
or its messages are skipped and listed. The command must be one that \`exec\` can run, without a wrapper
process: the tests send signals to it and look at its memory and fds.
END
}

# Time limits for a step, in seconds: far more than it needs, so that only a hang reaches them.
readonly LIMIT=20
readonly CARGO_LIMIT=3600
# How long to watch when nothing should happen, in seconds.
readonly QUIET=1

# A complete message of chapter 4, in printf notation: id 1, length 3, payload. For v02 and v03 these are
# bytes like any others.
readonly FRAME='\x01\x00\x00\x00\x03\x00\x00\x00hi\n'
readonly CALLER=$PWD
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
readonly ROOT=$PWD
# shellcheck source=scripts/chapters.sh
source scripts/chapters.sh
mapfile -t CHAPTERS < <(servers)

# RUST_LOG changes what the checks read on stderr, LC_ALL what the tools print.
unset RUST_LOG
export LC_ALL=C

red='' green='' plain=''
if [[ -t 1 && -z ${NO_COLOR+set} ]]; then
    red=$'\e[31m' green=$'\e[32m' plain=$'\e[0m'
fi

scratch=''                                 # a directory, removed at the end
netcats=()                                 # the commands to test with ...
declare -A flavour                         # ... and the kind of each: openbsd, traditional or ncat
client_options=()                          # of the chapter's own client
declare -A binary                          # the path of each program, by the name of its package
row_chapter=() row_check=() row_result=()  # the table at the end

die() {
    printf 'test_all.sh: %s\n' "$*" >&2
    exit 1
}

# ---- Waiting, and stopping background jobs -------------------------------------------------------

# within SECONDS COMMAND...: retries the command until it succeeds, for at least that long.
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS <= end)) || return 1
        sleep 0.02
    done
}

# background SECONDS COMMAND...: starts the command with a time limit; its pid is $!.
# `timeout` gives it its own process group and passes signals on to the whole group.
background() {
    # Without a redirection bash gives a background command /dev/null to read.
    timeout -k 2 "$@" <&0 &
}

# limited SECONDS COMMAND...: runs the command with a time limit; the exit code is 124 at the limit.
limited() {
    background "$@"
    wait $!
}

nothing_runs() { [[ -z $(jobs -rp) ]]; }

# stop_jobs SECONDS: ends the jobs of this shell, and no other process; kills them after that time.
stop_jobs() {
    local pids
    # A second signal must not interrupt this.
    trap '' HUP INT PIPE TERM
    mapfile -t pids < <(jobs -rp)
    ((${#pids[@]} == 0)) || kill "${pids[@]}" || true
    if ! within "$1" nothing_runs; then
        mapfile -t pids < <(jobs -rp)
        kill -KILL "${pids[@]}" || true
    fi
    wait || true
} 2>/dev/null

clean_up() {
    # The subshell of a check needs some time to stop its own jobs.
    stop_jobs 10
    [[ -z $scratch ]] || rm -rf "$scratch"
}

# ---- Requirements --------------------------------------------------------------------------------

# flavour_of PATH: detects the kind of netcat by its help. Others (busybox, GNU) are not used.
flavour_of() {
    local help
    help=$(timeout 5 "$1" -h 2>&1 </dev/null) || true
    case $help in
        *Ncat*) echo ncat ;;
        *'GNU netcat'* | *BusyBox*) echo unknown ;;
        *'Shutdown the network socket after EOF'*) echo openbsd ;;
        *'connect to somewhere:'*) echo traditional ;;
        *) echo unknown ;;
    esac
}

find_netcats() {
    local name path kind
    local -A seen=()
    for name in nc.openbsd nc.traditional ncat netcat nc; do
        path=$(readlink -f "$(type -P "$name")") || continue
        [[ -z ${seen[$path]-} ]] || continue
        seen[$path]=yes
        kind=$(flavour_of "$path")
        if [[ $kind != unknown ]]; then
            netcats+=("$name")
            flavour[$name]=$kind
        fi
    done
}

# In the foreground, because apt-get should not be killed halfway.
install_netcat() {
    type -P apt-get >/dev/null || return 1
    echo 'no netcat found'
    "$ROOT/scripts/install.sh" netcat-openbsd
} >&2 </dev/null

need_cargo() {
    type -P cargo >/dev/null || die 'cargo not found: install Rust, see https://rustup.rs'
}

need_netcat() {
    find_netcats
    if ((${#netcats[@]} == 0)) && install_netcat; then
        find_netcats
    fi
    ((${#netcats[@]} > 0)) || die 'no netcat found: install netcat-openbsd (Debian),' \
        'nmap-ncat (Fedora), openbsd-netcat (Arch) or netcat-openbsd (Alpine)'
}

# ---- Results -------------------------------------------------------------------------------------

# Prints the start of a row, which `record` completes.
begin() { printf '%-7s  %s ... ' "$1" "$2"; }

record() { # CHAPTER NAME pass|FAIL
    row_chapter+=("$1") row_check+=("$2") row_result+=("$3")
    if [[ $3 == pass ]]; then
        printf '%spass%s\n' "$green" "$plain"
    else
        printf '%sFAIL%s\n' "$red" "$plain"
    fi
}

indented() { sed 's/^/    /'; }

# check CHAPTER NAME COMMAND...: passes if the command ends with code 0.
check() {
    local chapter=$1 name=$2 dir=$scratch/check report=$scratch/report log
    shift 2
    begin "$chapter" "$name"
    mkdir "$dir"
    (
        trap 'stop_jobs 3' EXIT
        # `exit` alone is not enough: a signal during the trap above would end that trap early.
        trap 'stop_jobs 3; exit 143' TERM
        cd "$dir"
        "$@"
    ) </dev/null >"$report" 2>&1 &
    if wait $!; then
        record "$chapter" "$name" pass
    else
        record "$chapter" "$name" FAIL
        indented <"$report"
        for log in err server.log; do
            if [[ -s $dir/$log ]]; then
                printf '    the end of %s:\n' "$log"
                tail -n 8 "$dir/$log" | indented | indented
            fi
        done
    fi
    rm -rf "$dir"
}

# Prints the table, and exits with 1 if any check has failed.
summary() {
    local i width=0 failed=0 colour
    for i in "${!row_check[@]}"; do
        ((width >= ${#row_check[i]})) || width=${#row_check[i]}
        [[ ${row_result[i]} == pass ]] || failed=$((failed + 1))
    done
    printf '\n%-7s  %-*s  %s\n' chapter "$width" check result
    for i in "${!row_check[@]}"; do
        colour=$green
        [[ ${row_result[i]} == pass ]] || colour=$red
        printf '%-7s  %-*s  %s\n' "${row_chapter[i]}" "$width" "${row_check[i]}" \
            "$colour${row_result[i]}$plain"
    done
    printf '\n%d passed, %d failed\n' "$((${#row_check[@]} - failed))" "$failed"
    ((failed == 0)) || exit 1
}

# ---- Helpers for checks --------------------------------------------------------------------------

fail() {
    printf '%s\n' "$@"
    exit 1
}

# The beginning of a file, made printable.
excerpt() {
    printf '%d bytes\n' "$(wc -c <"$1")"
    head -c 200 "$1" | tr -c ' -~\n' '?' | head -n 8 | indented
}

# expect_same EXPECTED ACTUAL: compares two files.
expect_same() {
    cmp -s "$1" "$2" || fail "expected: $(excerpt "$1")" "got: $(excerpt "$2")" "$(cmp "$1" "$2" 2>&1)"
}

# expect_lines FILE REGEX...: the file has one line per regex, in this order.
expect_lines() {
    local file=$1 lines i=0 regex
    shift
    mapfile -t lines <"$file"
    for regex in "$@"; do
        [[ ${lines[i]-} =~ $regex ]] || fail "expected in line $((i + 1)): $regex" "got: $(excerpt "$file")"
        i=$((i + 1))
    done
    ((${#lines[@]} == $#)) || fail "expected: $# lines" "got: $(excerpt "$file")"
}

# run COMMAND...: saves the output in the files out and err, and the exit code in $code.
run() {
    code=0
    limited "$LIMIT" "$@" >out 2>err || code=$?
}

expect_code() {
    ((code == $1)) || fail "expected: exit code $1" "got: exit code $code"
}

# start_server CHAPTER [PORT [OPTION...]]: sets $server to its pid and $port to the port in its log.
start_server() {
    "${binary[reactor-$1]}" --addr "127.0.0.1:${2-0}" "${@:3}" </dev/null >server.out 2>server.log &
    server=$!
    within "$LIMIT" server_has_begun || true
    [[ -n $port ]] || fail "expected: 'listening on 127.0.0.1:PORT' on stderr of reactor-$1"
}

# True once the server listens or has ended: there is nothing more to wait for.
server_has_begun() {
    port=$(sed -n 's/.* listening on 127\.0\.0\.1:\([0-9][0-9]*\)$/\1/p' server.log)
    [[ -n $port ]] || has_ended "$server"
}

has_ended() { ! kill -0 "$1" 2>/dev/null; }

# stop_server SIGNAL: sends the signal, waits until the server ends, and saves its exit code in $code.
stop_server() {
    kill -s "$1" "$server"
    within "$LIMIT" has_ended "$server" || fail "expected: SIG$1 ends the server" 'got: it is still running'
    code=0
    wait "$server" || code=$?
}

# use_netcat NAME plain|close|stay|udp: sets $nc to the command with its options.
# At the end of its input, `plain` leaves this netcat to its default; `close` half-closes the connection
# and waits for the server to close; `stay` keeps it open until the server closes. `udp` sends what it reads
# at a time as one datagram.
use_netcat() {
    nc=("$1")
    case ${flavour[$1]}-$2 in
        openbsd-close) nc+=(-N) ;;
        # With any limit on the time afterwards, it half-closes.
        traditional-close) nc+=(-q "$LIMIT") ;;
        ncat-stay) nc+=(--no-shutdown) ;;
        *-udp) nc+=(-u) ;;
    esac
}

# talk: sends the file `sent` with $nc, and saves what comes back in the file `received`.
talk() {
    local result=0
    limited "$LIMIT" "${nc[@]}" 127.0.0.1 "$port" <sent >received || result=$?
    talk_result "$result"
}

talk_result() {
    case $1 in
        0) ;;
        124) fail "expected: ${nc[*]} ends within $LIMIT s" "received: $(excerpt received)" ;;
        *) fail "expected: ${nc[*]} ends with code 0" "got: code $1" "received: $(excerpt received)" ;;
    esac
}

# hold: connects a client with $nc that does not close, for longer than anything else may take. It sends
# what is written to fd 3, and saves what comes back in the file `held`; its pid is $held.
hold() {
    mkfifo held.in
    # Opened for reading and writing, a fifo does not wait for the other end.
    exec 3<>held.in
    background $((3 * LIMIT)) "${nc[@]}" 127.0.0.1 "$port" <held.in >held
    held=$!
}

# say TEXT: sends the text, with printf escapes, from the client of `hold`, and waits for the echo.
say() {
    printf '%b' "$1" | tee -a said >&3
    within "$LIMIT" cmp -s said held || expect_same said held
}

# ---- Every program -------------------------------------------------------------------------------

check_help() { # PACKAGE
    local number=${1#reactor-v}
    number=${number%%-*}
    run "${binary[$1]}" --help
    expect_code 0
    head -n 2 out >first_lines
    expect_lines first_lines "^Chapter $((10#$number))[:,] " '^Try it: '
    grep -q -e "--addr" out || fail 'expected: --addr in the help' "got: $(cat out)"
}

check_version() { # PACKAGE
    run "${binary[$1]}" --version
    expect_code 0
    expect_lines out "^$1 [0-9]+\.[0-9]+\.[0-9]+"
}

check_not_an_address() { # PACKAGE
    run "${binary[$1]}" --addr nonsense
    expect_code 2
    grep -q nonsense err || fail 'expected: the invalid address on stderr' "got: $(excerpt err)"
}

program_checks() { # CHAPTER PACKAGE
    check "$1" "$2 --help" check_help "$2"
    check "$1" "$2 --version" check_version "$2"
    check "$1" "$2 --addr nonsense: exit code 2" check_not_an_address "$2"
}

# ---- Every server --------------------------------------------------------------------------------

check_busy_port() { # CHAPTER
    start_server "$1"
    run "${binary[reactor-$1]}" --addr "127.0.0.1:$port"
    expect_code 1
    expect_lines err "127\.0\.0\.1:$port"
}

# With a client connected, because the kernel remembers the connection after the server has ended.
check_signal() { # CHAPTER SIGNAL CODE
    start_server "$1"
    use_netcat "${netcats[0]}" stay
    hold
    if [[ $1 == v01 ]]; then
        within "$LIMIT" test -s held || fail 'expected: a greeting' 'got: nothing'
    else
        say "$FRAME"
    fi
    stop_server "$2"
    expect_code "$3"
    # On the same port: this fails if the port is not free.
    start_server "$1" "$port"
}

server_checks() { # CHAPTER
    program_checks "$1" "reactor-$1"
    check "$1" 'a busy port: exit code 1' check_busy_port "$1"
    case $1 in
        # SIGINT cannot be tested: bash starts background commands with SIGINT ignored.
        v01 | v02) check "$1" 'SIGTERM ends it, and frees the port at once' check_signal "$1" TERM 143 ;;
        *)
            check "$1" 'SIGTERM: exit code 0, and frees the port at once' check_signal "$1" TERM 0
            check "$1" 'SIGINT: exit code 0, and frees the port at once' check_signal "$1" INT 0
            ;;
    esac
}

# ---- Chapter 1 -----------------------------------------------------------------------------------

check_greeting() { # NETCAT [TEXT TO SEND]
    start_server v01
    use_netcat "$1" plain
    printf '%s' "${2-}" >sent
    talk
    printf 'hello Lars\n' >expected
    expect_same expected received
}

check_bounded_wait() { # NETCAT
    start_server v01
    use_netcat "$1" stay
    hold
    printf 'hello Lars\n' >expected
    within "$LIMIT" cmp -s expected held || expect_same expected held
    : >sent
    talk
    expect_same expected received
}

chapter_v01() {
    local name
    server_checks v01
    for name in "${netcats[@]}"; do
        check v01 "$name: hello Lars" check_greeting "$name"
        check v01 "echo hi | $name: hello Lars" check_greeting "$name" $'hi\n'
        check v01 "$name: a client that stays does not block the next one" check_bounded_wait "$name"
    done
}

# ---- Chapters 2 and 3 ----------------------------------------------------------------------------

check_echo_text() { # CHAPTER NETCAT
    start_server "$1"
    use_netcat "$2" close
    printf 'hello\nlars!' >sent
    talk
    expect_same sent received
}

check_echo_bytes() { # CHAPTER NETCAT
    start_server "$1"
    use_netcat "$2" close
    head -c 1000000 /dev/urandom >sent
    talk
    expect_same sent received
}

check_second_waits() { # CHAPTER NETCAT
    local second result=0
    start_server "$1"
    use_netcat "$2" close
    hold
    say $'the first\n'
    printf 'the second\n' >sent
    background "$LIMIT" "${nc[@]}" 127.0.0.1 "$port" <sent >received
    second=$!
    if within "$QUIET" test -s received; then
        fail 'expected: nothing for the second client yet' "got: $(excerpt received)"
    fi
    say $'the first again\n'
    kill "$held"
    wait "$second" || result=$?
    talk_result "$result"
    expect_same sent received
}

check_second_is_served() { # CHAPTER NETCAT
    start_server "$1"
    use_netcat "$2" close
    hold
    say $'the first\n'
    printf 'the second\n' >sent
    talk
    expect_same sent received
    say $'the first again\n'
}

chapter_v02() {
    local name
    server_checks v02
    for name in "${netcats[@]}"; do
        check v02 "$name: echo of text" check_echo_text v02 "$name"
        check v02 "$name: echo of 1 MB" check_echo_bytes v02 "$name"
        check v02 "$name: the second client waits" check_second_waits v02 "$name"
    done
}

chapter_v03() {
    local name
    server_checks v03
    for name in "${netcats[@]}"; do
        check v03 "$name: echo of text" check_echo_text v03 "$name"
        check v03 "$name: echo of 1 MB" check_echo_bytes v03 "$name"
        check v03 "$name: the second client is served" check_second_is_served v03 "$name"
    done
    check v03 'REACTOR_CMD: tests another program' check_another_program
    check v03 'grade.sh: passes the chapter, and no other program' check_grade
    # A container may forbid it.
    if strace -o /dev/null true 2>/dev/null; then
        check v03 'replay.sh: a page of a run' check_replay
        check v03 'grade.sh --record: a page of a case' check_record
    fi
}

# ---- Chapter 4 -----------------------------------------------------------------------------------

client() { run "${binary[reactor-v04-client]}" --addr "127.0.0.1:$port" "$@"; }

# expect_replies LINE...: on standard output, and nothing on stderr.
expect_replies() {
    expect_code 0
    printf '%s\n' "$@" >expected
    expect_same expected out
    : >expected
    expect_same expected err
}

check_message() { # CHAPTER
    start_server "$1"
    client 'hello lars!'
    expect_replies 'id=1 len=11 hello lars!'
}

check_messages() { # CHAPTER
    start_server "$1"
    client one 'two words' three
    expect_replies 'id=1 len=3 one' 'id=1 len=9 two words' 'id=1 len=5 three'
}

check_negative_id() { # CHAPTER
    start_server "$1"
    client --id -7 hi
    expect_replies 'id=-7 len=2 hi'
}

check_lines() { # CHAPTER
    start_server "$1"
    printf 'a line\nanother\n' >lines
    client <lines
    expect_replies 'id=1 len=6 a line' 'id=1 len=7 another'
}

check_many_lines() { # CHAPTER
    start_server "$1"
    seq 10000 >lines
    client <lines
    awk '{ printf "id=1 len=%d %s\n", length($0), $0 }' lines >expected
    expect_code 0
    expect_same expected out
}

check_no_server() { # CHAPTER CLIENT
    start_server "$1"
    stop_server TERM
    run "${binary[$2]}" --addr "127.0.0.1:$port" "${client_options[@]}"
    expect_code 1
    expect_lines err "127\.0\.0\.1:$port"
    [[ ! -s out ]] || fail 'expected: nothing on standard output' "got: $(excerpt out)"
}

# Bytes 4 to 7 are the length: "text" in little-endian is 1954047348.
check_raw_text() { # CHAPTER NETCAT
    start_server "$1"
    # The server must close first.
    use_netcat "$2" stay
    printf 'raw text\n' >sent
    talk
    : >expected
    expect_same expected received
    within "$LIMIT" grep -q WARN server.log || fail 'expected: a warning in the log of the server'
    grep WARN server.log >warnings
    expect_lines warnings '127\.0\.0\.1:[0-9]+.*[^0-9]1954047348([^0-9]|$)'
    client 'hello lars!'
    expect_replies 'id=1 len=11 hello lars!'
}

chapter_v04() {
    local name
    server_checks v04
    program_checks v04 reactor-v04-client
    message_checks v04
    check v04 'client: --id -7' check_negative_id v04
    check v04 'client: no server: exit code 1' check_no_server v04 reactor-v04-client
}

# With the client of chapter 4.
message_checks() { # CHAPTER
    local name
    check "$1" 'client: one message' check_message "$1"
    check "$1" 'client: several messages' check_messages "$1"
    check "$1" 'client: lines of standard input' check_lines "$1"
    check "$1" 'client: 10,000 lines' check_many_lines "$1"
    for name in "${netcats[@]}"; do
        check "$1" "$name: raw text is refused" check_raw_text "$1" "$name"
    done
}

# ---- Chapter 5 -----------------------------------------------------------------------------------

check_full() { # CHAPTER NETCAT
    start_server "$1" 0 --max-conns 1
    use_netcat "$2" stay
    hold
    say "$FRAME"
    client 'hello lars!'
    expect_replies 'id=-1 len=14 server is full'
    # The client that has the place is still served.
    say "$FRAME"
    # Its end frees the place.
    kill "$held"
    within "$LIMIT" is_served || fail 'expected: a free place' "got: $(excerpt out)" "$(excerpt err)"
}

is_served() {
    client 'hello lars!'
    ((code == 0)) && grep -qxF 'id=1 len=11 hello lars!' out
}

check_wait() { # CHAPTER NETCAT
    local second
    start_server "$1" 0 --max-conns 1 --when-full wait
    use_netcat "$2" stay
    hold
    say "$FRAME"
    background "$LIMIT" "${binary[reactor-v04-client]}" --addr "127.0.0.1:$port" hello >out 2>err
    second=$!
    sleep "$QUIET"
    [[ ! -s out ]] || fail 'expected: nothing for the second client yet' "got: $(excerpt out)"
    kill "$held"
    code=0
    wait "$second" || code=$?
    expect_replies 'id=1 len=5 hello'
}

check_idle() { # CHAPTER NETCAT
    start_server "$1" 0 --idle-timeout "$QUIET"
    # The server must close first.
    use_netcat "$2" stay
    printf '%b' "$FRAME" >sent
    talk
    expect_same sent received
    within "$LIMIT" grep -q ' idle connections closed: 1$' server.log ||
        fail 'expected: the server logs that it has closed a connection'
}

check_half_message() { # CHAPTER NETCAT
    start_server "$1" 0 --frame-timeout "$QUIET"
    use_netcat "$2" stay
    # The server must close first.
    printf '%b' "$FRAME${FRAME:0:20}" >sent
    printf '%b' "$FRAME" >expected
    talk
    expect_same expected received
    grep WARN server.log >warnings
    expect_lines warnings ": closed: message incomplete after ${QUIET}s"
}

limit_checks() { # CHAPTER
    local name
    for name in "${netcats[@]}"; do
        check "$1" "$name: a full server says so to the next client" check_full "$1" "$name"
        check "$1" "$name: --when-full wait: the next client waits" check_wait "$1" "$name"
        check "$1" "$name: --idle-timeout closes an idle connection" check_idle "$1" "$name"
        check "$1" "$name: --frame-timeout ends half a message" check_half_message "$1" "$name"
    done
}

chapter_v05() {
    server_checks v05
    message_checks v05
    limit_checks v05
}

# ---- Chapter 6 -----------------------------------------------------------------------------------

# The messages with this id are printed, not answered; without a reply the client gives up.
check_printed() { # CHAPTER
    start_server "$1"
    client --id 2 --timeout "$QUIET" 'hello lars!' $'two\nlines'
    expect_code 1
    within "$LIMIT" test -s server.out || fail 'expected: the messages on standard output of the server'
    expect_lines server.out '^id=2 len=11 hello lars!$' '^id=2 len=9 two\\nlines$'
}

check_skipped() { # CHAPTER
    start_server "$1"
    client --id 77 --timeout "$QUIET" one two three
    expect_code 1
    within "$LIMIT" grep -q 'messages skipped: 3$' server.log || fail 'expected: 3 messages skipped'
    grep WARN server.log >warnings
    expect_lines warnings 'no callback for message id 77'
}

# The client of the chapter, not of chapter 4.
check_own_client() { # CHAPTER LINE... of its output; options of the server in $options
    start_server "$1" 0 "${options[@]}"
    run "${binary[reactor-$1-client]}" --addr "127.0.0.1:$port" "${client_options[@]}"
    expect_replies "${@:2}"
    within "$LIMIT" test -s server.out || fail 'expected: a message on standard output of the server'
    expect_lines server.out '^id=2 len=11 hello lars!$'
}

router_checks() { # CHAPTER LINE... of the output of its client
    local options=()
    program_checks "$1" "reactor-$1-client"
    check "$1" "its client: a message and back, then printed" check_own_client "$@"
    check "$1" 'its client: no server: exit code 1' check_no_server "$1" "reactor-$1-client"
    check "$1" 'client: --id 2 is printed by the server' check_printed "$1"
    check "$1" 'client: --id 77 is skipped' check_skipped "$1"
}

chapter_v06() {
    server_checks v06
    message_checks v06
    limit_checks v06
    router_checks v06 'id=1 len=11 hello lars!'
}

# ---- Chapter 7 -----------------------------------------------------------------------------------

hook_checks() { # CHAPTER
    local options
    router_checks "$1" 'id=1 len=11 hello lars!' goodbye
    options=(--welcome 'good day')
    check "$1" 'its client: --welcome greets it' check_own_client "$1" \
        'id=101 len=8 good day' 'id=1 len=11 hello lars!' goodbye
}

chapter_v07() {
    server_checks v07
    message_checks v07
    limit_checks v07
    hook_checks v07
}

# ---- Chapter 8 -----------------------------------------------------------------------------------

# The log says which worker has got which client.
check_threads() { # CHAPTER
    RUST_LOG=debug start_server "$1" 0 --threads 2
    client one
    client two
    client three
    expect_code 0
    grep -o 'handing over to .*' server.log >workers
    expect_lines workers worker-0 worker-1 worker-0
}

chapter_v08() {
    server_checks v08
    message_checks v08
    limit_checks v08
    hook_checks v08
    check v08 '--threads 2: two workers' check_threads v08
}

# ---- Chapter 9 -----------------------------------------------------------------------------------

# With the file of the C++ course, on whose port no check listens.
check_print_config() { # CHAPTER
    printf '[reactor]\nip = 127.0.0.1\nport = 7777\nmaxConn = 1024\nthreadNum = 5\n\n' >serv.conf
    run "${binary[reactor-$1]}" --config serv.conf --threads 2 --print-config
    expect_replies 'ip = 127.0.0.1 (file)' 'port = 7777 (file)' 'maxConn = 1024 (file)' \
        'threadNum = 2 (argument)' 'whenFull = refuse (default)' 'idleTimeout = off (default)' \
        'frameTimeout = 30 (default)' 'welcome = (default)'
}

check_reload() { # CHAPTER
    printf '[reactor]\n' >serv.conf
    start_server "$1" 0 --config serv.conf
    printf 'welcome = good day\n' >>serv.conf
    kill -s HUP "$server"
    within "$LIMIT" grep -q ' settings changed: welcome = good day (file)$' server.log ||
        fail 'expected: the log says that the welcome has changed'
    run "${binary[reactor-$1-client]}" --addr "127.0.0.1:$port"
    expect_replies 'id=101 len=8 good day' 'id=1 len=11 hello lars!' goodbye
}

chapter_v09() {
    server_checks v09
    message_checks v09
    limit_checks v09
    hook_checks v09
    check v09 '--threads 2: two workers' check_threads v09
    check v09 '--print-config: each setting and its source' check_print_config v09
    check v09 'SIGHUP: reads the file again' check_reload v09
}

# ---- Chapter 10 ----------------------------------------------------------------------------------

# A datagram that is not one message is dropped.
check_datagrams() { # CHAPTER NETCAT
    start_server "$1"
    use_netcat "$2" udp
    hold
    say "$FRAME"
    printf 'raw text\n' >&3
    within "$LIMIT" grep -q ' datagrams dropped: 1; replies dropped: 0$' server.log ||
        fail 'expected: the server logs that it has dropped a datagram'
    say "$FRAME"
}

udp_checks() { # CHAPTER
    local name options=() client_options=(--udp)
    for name in "${netcats[@]}"; do
        check "$1" "$name: a datagram is echoed" check_datagrams "$1" "$name"
    done
    check "$1" 'its client: --udp: a message and back, then printed' check_own_client "$1" \
        'id=1 len=11 hello lars!' goodbye
    client_options+=(--timeout 0.1)
    check "$1" 'its client: --udp: no server: exit code 1' check_no_server "$1" "reactor-$1-client"
}

chapter_v10() {
    # Each further try is a warning.
    local client_options=(--retry 0)
    server_checks v10
    message_checks v10
    limit_checks v10
    hook_checks v10
    check v10 '--threads 2: two workers' check_threads v10
    check v10 '--print-config: each setting and its source' check_print_config v10
    check v10 'SIGHUP: reads the file again' check_reload v10
    udp_checks v10
}

# ---- Chapter 11 ----------------------------------------------------------------------------------

# published TEXT...: the texts as messages with id 3.
published() {
    local text
    for text; do
        # Bytes 4 to 7 are the length.
        printf '\x03\0\0\0\'"x$(printf %02x ${#text})"'\0\0\0%s' "$text"
    done
}

# What one client publishes reaches another one, which has sent something else.
check_published() { # CHAPTER NETCAT [WHAT COMES BEFORE THE TEXT]
    local before=${3-}
    start_server "$1" 0 --threads 2
    use_netcat "$2" stay
    hold
    say "$FRAME"
    client --id 3 'hello lars!' again
    expect_replies "id=3 len=$((${#before} + 11)) ${before}hello lars!" "id=3 len=$((${#before} + 5)) ${before}again"
    published "${before}hello lars!" "${before}again" >>said
    within "$LIMIT" cmp -s said held || expect_same said held
    # One write is one datagram.
    printf '\x03\0\0\0\x04\0\0\0news' >"/dev/udp/127.0.0.1/$port"
    published "${before}news" >>said
    within "$LIMIT" cmp -s said held || expect_same said held
}

check_published_lines() { # CHAPTER [WHAT COMES BEFORE THE TEXT]
    start_server "$1"
    seq 10000 >lines
    client --id 3 <lines
    awk -v before="${2-}" '{ $0 = before $0; printf "id=3 len=%d %s\n", length($0), $0 }' lines >expected
    expect_code 0
    expect_same expected out
}

chapter_v11() {
    # Each further try is a warning.
    local name options=() client_options=(--retry 0)
    server_checks v11
    message_checks v11
    limit_checks v11
    hook_checks v11
    check v11 '--threads 2: two workers' check_threads v11
    check v11 '--print-config: each setting and its source' check_print_config v11
    check v11 'SIGHUP: reads the file again' check_reload v11
    udp_checks v11
    for name in "${netcats[@]}"; do
        check v11 "$name: --id 3 is published" check_published v11 "$name"
    done
    check v11 'client: --id 3: 10,000 lines' check_published_lines v11
}

# ---- Chapter 12 ----------------------------------------------------------------------------------

# A connection has a nickname, and each one its own.
check_nickname() { # CHAPTER
    start_server "$1"
    client --id 4 lars 'Lars B.'
    expect_replies 'id=4 len=4 lars' 'id=4 len=7 Lars B.'
    client --id 5 '' ''
    expect_replies 'id=5 len=11 anonymous 1' 'id=5 len=11 anonymous 2'
}

check_bad_nickname() { # CHAPTER
    start_server "$1"
    client --id 4 $'two\nlines'
    expect_replies 'id=-4 len=36 a nickname has no control characters'
}

chapter_v12() {
    # Each further try is a warning.
    local name options=() client_options=(--retry 0)
    server_checks v12
    message_checks v12
    limit_checks v12
    hook_checks v12
    check v12 '--threads 2: two workers' check_threads v12
    check v12 '--print-config: each setting and its source' check_print_config v12
    check v12 'SIGHUP: reads the file again' check_reload v12
    udp_checks v12
    for name in "${netcats[@]}"; do
        check v12 "$name: --id 3 is published with a name" check_published v12 "$name" 'anonymous: '
    done
    check v12 'client: --id 3: 10,000 lines' check_published_lines v12 'anonymous: '
    check v12 'client: --id 4 sets a nickname, --id 5 asks for it' check_nickname v12
    check v12 'client: --id 4: two lines are no nickname' check_bad_nickname v12
}

# ---- Chapter 13 ----------------------------------------------------------------------------------

# Chapter 4 again, with the options and the client of chapter 4.
chapter_v13() {
    server_checks v13
    message_checks v13
    check v13 'client: --id -7' check_negative_id v13
    check v13 'client: no server: exit code 1' check_no_server v13 reactor-v04-client
}

# ---- Many clients -------------------------------------------------------------------------------

check_crowd() {
    code=0
    limited "$CARGO_LIMIT" "$ROOT/scripts/crowd.sh" 200 v03 >out 2>err || code=$?
    expect_code 0
    grep -q '^echoed  *200 of 200,' out || fail 'expected: 200 of 200 are served' "got: $(excerpt out)"
}

# As scripts/soak.sh, but with the programs that are built already.
check_soak() {
    local chapter programs=()
    for chapter in "${CHAPTERS[@]:2}"; do
        programs+=("${binary[reactor-$chapter]}")
    done
    limited "$CARGO_LIMIT" "${binary[soak]}" "${programs[@]}" --seconds 10 --stops 10
}

# ---- cargo ---------------------------------------------------------------------------------------

# cargo_row NAME SUBCOMMAND ARGUMENT...: stdout goes to the file cargo, and stderr to the terminal.
cargo_row() {
    local name=$1 result=0
    shift
    printf '%s ...\n' "$name"
    limited "$CARGO_LIMIT" cargo "$@" --locked </dev/null >"$scratch/cargo" || result=$?
    begin all "$name"
    if ((result == 0)); then
        record all "$name" pass
    else
        record all "$name" FAIL
    fi
    return "$result"
}

build() { # PACKAGE OPTIONS
    # cargo reports the paths of the programs: the user may have configured another target directory.
    if ! cargo_row "cargo build" build --message-format=json-render-diagnostics "$@"; then
        summary
    fi
    local path
    while read -r path; do
        binary[${path##*/}]=$path
    done < <(sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' "$scratch/cargo")
}

cargo_tests() { # PACKAGE OPTIONS
    # Most tests spend most of their time waiting, so there may be more of them than processors.
    local -x RUST_TEST_THREADS=${RUST_TEST_THREADS:-$(($(nproc) < 4 ? 4 : $(nproc)))}
    cargo_row "cargo test $*" test "$@" || tail -n 60 "$scratch/cargo" | indented
    awk '/^test result:/ { passed += $4; failed += $6 }
        END { printf "         %d tests passed, %d failed\n", passed, failed }' "$scratch/cargo"
}

# ---- Another program -----------------------------------------------------------------------------

# The black-box tests, without those that need the chapter itself: see tests/harness/src/lib.rs.
other_program() {
    local chapter options
    # The command may be relative.
    cd "$CALLER"
    for chapter in "${CHAPTERS[@]}"; do
        [[ -n ${chosen[$chapter]-} ]] || continue
        options=(--manifest-path "$ROOT/Cargo.toml" -p "reactor-$chapter" --test "$chapter")
        cargo_row "cargo test --no-run --test $chapter" test --no-run "${options[@]}" || summary
        if ! cargo_row "tests/$chapter.rs: $REACTOR_CMD" test "${options[@]}" 2>"$scratch/err"; then
            sed -n '/^failures:/,$p' "$scratch/cargo" | indented
            # Or the reason why no test has run.
            grep -v '^skipped: ' "$scratch/err" | indented || true
        fi
        grep '^skipped: ' "$scratch/err" | indented || true
        awk '/^skipped: / { skipped++ } /^test result:/ { passed += $4; failed += $6 }
            END { printf "         %d tests passed, %d failed, %d skipped\n",
                passed - skipped, failed, skipped }' "$scratch/err" "$scratch/cargo"
    done
    summary
}

# A test that reads the chapter's log is skipped, although this program has the same log.
check_another_program() {
    printf '#!/bin/sh\ntouch used\nexec "%s" "$@"\n' "${binary[reactor-v03]}" >mine
    chmod +x mine
    code=0
    REACTOR_CMD='./mine --addr {addr}' limited "$CARGO_LIMIT" \
        cargo test --manifest-path "$ROOT/Cargo.toml" --locked "${packages[@]}" --test v03 -- \
        --exact echoes_any_number_of_bytes every_server::shows_every_step_on_request \
        >out 2>err || code=$?
    expect_code 0
    [[ -e used ]] || fail 'expected: the command in REACTOR_CMD is run'
    grep -q '^skipped: every_server::shows_every_step_on_request: ' err ||
        fail 'expected: the name of the skipped test' "got: $(excerpt err)"
}

# The chapter's own binary passes a case, and a program that is no server fails it.
check_grade() {
    grade v03 second-client "${binary[reactor-v03]}" --addr '{addr}'
    expect_code 0
    grep -q '^1 of 1 cases passed$' out || fail 'expected: the case passes' "got: $(excerpt out)"
    grade v03 second-client false '{addr}'
    expect_code 1
    grep -q '^3.2 .* FAIL$' out || fail 'expected: the case fails' "got: $(excerpt out)"
}

check_replay() {
    "$ROOT/scripts/replay.sh" --output page.html reactor-v03 --addr 127.0.0.1:0 >out 2>server.log &
    server=$!
    within "$CARGO_LIMIT" server_has_begun || true
    [[ -n $port ]] || fail 'expected: the server listens' "got: $(excerpt server.log)"
    expect_same <(echo hello) <(echo hello | nc -N 127.0.0.1 "$port")
    # The program that runs strace, which runs the server.
    kill "$(pgrep -P "$(pgrep -P "$server" strace)")"
    wait "$server"
    grep -Eq '^[0-9]+ steps in page.html$' out || fail 'expected: the number of steps' "got: $(excerpt out)"
    expect_page 'conn_rd_callback'
}

# expect_page TEXT: page.html replays a run in which this occurs.
expect_page() {
    local text
    for text in '<reactor-replay' 'out of the kernel' "$1"; do
        grep -q "$text" page.html || fail "expected: $text in page.html"
    done
}

check_record() {
    limited "$CARGO_LIMIT" "$ROOT/scripts/grade.sh" v03 --case echo --record page.html -- \
        "${binary[reactor-v03]}" --addr '{addr}' >out
    expect_page 'A run of .*reactor-v03'
}

grade() { # CHAPTER CASE COMMAND...
    code=0
    limited "$CARGO_LIMIT" "$ROOT/scripts/grade.sh" "$1" --case "$2" -- "${@:3}" >out 2>err || code=$?
}

# The starter of a chapter builds, and fails the chapter's first case; the chapter's own binary passes the last
# one.
check_starter() { # CHAPTER
    local cases
    "$ROOT/scripts/grade.sh" --start "$1" mine
    CARGO_TARGET_DIR=$scratch/starter limited "$CARGO_LIMIT" cargo build --offline --manifest-path mine/Cargo.toml
    mapfile -t cases < <("$ROOT/scripts/grade.sh" "$1" --list | cut -d ' ' -f 1)
    grade "$1" "${cases[0]}" "$scratch/starter/debug/mine" --addr '{addr}'
    expect_code 1
    grep -q 'not yet implemented' out || fail 'expected: the first todo!()' "got: $(excerpt out)"
    grade "$1" "${cases[-1]}" "${binary[reactor-$1]}" --addr '{addr}'
    expect_code 0
}

# ---- main ----------------------------------------------------------------------------------------

# packages_of CHAPTER: its server and its client, if it has one.
packages_of() { chapters | sed -n "/^$1\(-.*\)\{0,1\}\$/s/^/reactor-/p"; }

main() {
    local chapter package packages=() build_only=()
    local -A chosen=()
    for chapter in "$@"; do
        case $chapter in
            -h | --help)
                usage
                exit 0
                ;;
            *)
                if [[ " ${CHAPTERS[*]} " != *" $chapter "* ]]; then
                    printf 'test_all.sh: no such chapter: %s\n' "$chapter" >&2
                    usage >&2
                    exit 2
                fi
                chosen[$chapter]=yes
                ;;
        esac
    done

    if [[ -n ${REACTOR_CMD-} && ($# -eq 0 || $REACTOR_CMD != *'{addr}'*) ]]; then
        printf 'test_all.sh: REACTOR_CMD must contain {addr}, and needs the name of a chapter\n' >&2
        usage >&2
        exit 2
    fi

    trap clean_up EXIT
    trap 'clean_up; exit 129' HUP
    trap 'clean_up; exit 130' INT
    trap 'clean_up; exit 141' PIPE
    trap 'clean_up; exit 143' TERM
    scratch=$(mktemp -d)
    need_cargo
    if [[ -n ${REACTOR_CMD-} ]]; then
        other_program
        return
    fi
    need_netcat

    if (($# == 0)); then
        packages=(--workspace)
        for chapter in "${CHAPTERS[@]}"; do
            chosen[$chapter]=yes
        done
    else
        packages=(-p common)
        for chapter in "${!chosen[@]}"; do
            for package in $(packages_of "$chapter"); do
                packages+=(-p "$package")
            done
        done
        # Later chapters are tested with it.
        build_only=(-p reactor-v04-client)
    fi

    printf 'netcats: %s\n' "${netcats[*]}"
    build "${packages[@]}" "${build_only[@]}"
    cargo_tests "${packages[@]}"
    for chapter in "${CHAPTERS[@]}"; do
        [[ -n ${chosen[$chapter]-} ]] || continue
        "chapter_$chapter"
        for package in $(packages_of "$chapter"); do
            check "$chapter" "grade.sh --start: the starter of $package fails" check_starter "${package#reactor-}"
        done
    done
    if (($# == 0)); then
        # An optimised build takes long, so only for the chapter whose page shows it.
        check v03 'crowd: 200 clients at the same time' check_crowd
        check all 'soak: ten seconds of churn' check_soak
    fi
    summary
}

main "$@"
