//! The client of chapter 4 from outside, against servers that behave in all kinds of ways.

// A test fails by a panic, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Command, Output, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use harness::{
    Process, assert_failed, frame, is_other, pattern, program, read, run_command, run_with_input,
    send_fin, write,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt::RcvBuf, sockopt::TcpMaxSeg};

const EXE: &str = env!("CARGO_BIN_EXE_reactor-v04-client");
const MAX_PAYLOAD: usize = 65_527;

/// Starts a server that handles one client after another, one with each of the handlers.
fn serve<F: FnOnce(TcpStream) + Send + 'static>(handlers: Vec<F>) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let server = thread::spawn(move || {
        for handler in handlers {
            let (stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(harness::LIMIT)).unwrap();
            handler(stream);
        }
    });
    (addr, server)
}

/// Returns how many bytes the client reads from its standard input before it stops reading.
#[track_caller]
fn lines_taken(client: &mut Command) -> usize {
    let mut child = client.stdin(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    nix::fcntl::fcntl(&stdin, nix::fcntl::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
    let line = [&[b'x'; 999][..], b"\n"].concat();
    let (mut taken, mut last_progress) = (0, Instant::now());
    while last_progress.elapsed() < 3 * harness::QUIET && taken < 64 << 20 {
        match stdin.write(&line) {
            Ok(n) => (taken, last_progress) = (taken + n, Instant::now()),
            Err(err) => {
                assert_eq!(err.kind(), std::io::ErrorKind::WouldBlock);
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
    taken
}

/// Whether it has used no CPU time for a while.
fn is_asleep(process: &Process) -> bool {
    let before = process.cpu();
    thread::sleep(harness::QUIET);
    process.cpu() == before
}

/// Sends everything back until the client closes.
fn echo(mut stream: TcpStream) {
    let mut reader = stream.try_clone().unwrap();
    let _ = std::io::copy(&mut reader, &mut stream);
}

/// The chapter's client, or another one: see the harness.
fn client(addr: SocketAddr, args: &[&str]) -> Command {
    client_after("", addr, args)
}

/// [`client`], after the shell's `setup`.
fn client_after(setup: &str, addr: SocketAddr, args: &[&str]) -> Command {
    program(setup, EXE, &addr.to_string(), args)
}

/// Exit code 0, this standard output, and nothing on stderr. What another client has there is its own
/// business.
#[track_caller]
fn assert_prints(output: &Output, stdout: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(String::from_utf8_lossy(&output.stdout), stdout, "{stderr}");
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(stderr.is_empty() || is_other(), "{stderr}");
}

/// One line on stderr that ends with `reason`, and exit code 1. Another client has its own words and
/// exit code.
#[track_caller]
fn assert_fails(output: &Output, stdout: &str, reason: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(String::from_utf8_lossy(&output.stdout), stdout, "{stderr}");
    if is_other() {
        return assert_failed(output);
    }
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("error: ") && stderr.trim_end().ends_with(reason), "{stderr}");
    assert_eq!(output.status.code(), Some(1));
}

/// Waits for it to end with exit code 1 and `reason` on stderr. Another client has its own words and
/// exit code.
#[track_caller]
fn assert_ends(process: &mut Process, reason: &str) {
    let code = process.wait().code();
    if is_other() {
        return assert!(code.is_some_and(|code| code != 0), "expected: it fails; got: {code:?}");
    }
    assert_eq!(code, Some(1));
    process.wait_for_log(reason);
}

/// The two ends of a pipe.
fn pipe() -> (File, File) {
    // If a child kept a copy of the other end, the pipe would never end.
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    (reader.into(), writer.into())
}

/// A pipe with `bytes`, written by a thread of its own.
fn pipe_with(bytes: Vec<u8>) -> Stdio {
    let (reader, mut writer) = pipe();
    thread::spawn(move || writer.write_all(&bytes));
    reader.into()
}

/// A regular file that holds `bytes`.
fn file_with(bytes: &[u8]) -> File {
    let dir = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    let path = dir.join(format!("{:?}-stdin", thread::current().id()));
    std::fs::write(&path, bytes).unwrap();
    let file = File::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file
}

#[test]
fn sends_each_argument_and_prints_each_reply() {
    let (addr, _server) = serve(vec![echo]);
    let output = run_command(&mut client(addr, &["hello lars!", "", "and again"]));
    assert_prints(&output, "id=1 len=11 hello lars!\nid=1 len=0\nid=1 len=9 and again\n");
}

#[test]
fn the_id_may_be_any_32_bits() {
    for id in ["-1", "0", "2147483647", "-2147483648"] {
        let (addr, _server) = serve(vec![echo]);
        let output = run_command(&mut client(addr, &["--id", id, "x"]));
        assert_prints(&output, &format!("id={id} len=1 x\n"));
    }
    let (addr, _server) = serve(vec![echo]);
    let output = run_command(&mut client(addr, &["--id", "2147483648", "x"]));
    assert!(output.status.code() == Some(2) || is_other());
}

#[test]
fn unprintable_bytes_are_escaped() {
    let (addr, _server) = serve(vec![|stream: TcpStream| {
        read(&stream, 9);
        write(&stream, &frame(5, b"it's \"\xc3\xa9\" \\ \n\t\x1b\xff\xfe\x00"));
    }]);
    let output = run_command(&mut client(addr, &["x"]));
    assert_prints(&output, "id=5 len=18 it's \"\u{e9}\" \\\\ \\n\\t\\u{1b}\\xff\\xfe\\0\n");
}

#[test]
fn lines_come_from_a_pipe_or_a_file() {
    for text in ["a\n\nlast line without a line feed", "a\n\nlast line without a line feed\n"] {
        let (addr, _server) = serve(vec![echo, echo]);
        let expected = "id=1 len=1 a\nid=1 len=0\nid=1 len=29 last line without a line feed\n";
        let input = text.as_bytes();
        assert_prints(&run_with_input(&mut client(addr, &[]), pipe_with(input.to_vec())), expected);
        assert_prints(&run_with_input(&mut client(addr, &[]), file_with(input)), expected);
    }
}

#[test]
fn nothing_to_send_is_not_an_error() {
    let (addr, _server) = serve(vec![echo, echo]);
    assert_prints(&run_command(&mut client(addr, &[])), "");
    assert_prints(&run_command(&mut client_after("exec <&-; ", addr, &[])), "");
}

/// Far more than all buffers hold, from a file and a pipe, in messages of all sizes.
#[test]
fn pipelines_any_number_of_messages_in_bounded_memory() {
    let mut input = Vec::new();
    let mut expected = String::new();
    for n in (0..).map(|n| n * 37 % (MAX_PAYLOAD + 1)).take(1500) {
        let line = "x".repeat(n);
        input.extend(line.as_bytes());
        input.push(b'\n');
        expected += format!("id=1 len={n} {line}").trim_end();
        expected.push('\n');
    }
    assert!(input.len() > 30 << 20);
    for stdin in [Stdio::from(file_with(&input)), pipe_with(input.clone())] {
        let (addr, _server) = serve(vec![echo]);
        // Another client's runtime may need more for itself.
        let limit = if is_other() { "" } else { "ulimit -v 100000; " };
        let output = run_with_input(&mut client_after(limit, addr, &[]), stdin);
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stdout == expected.as_bytes());
    }
}

/// The server answers a thousand messages and then no more. The unanswered ones must stay below
/// 1 MiB and one message, or the client's memory would not be bounded.
#[test]
fn no_more_than_the_window_is_sent_without_a_reply() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let line = [b'x'; 1000];
    let stdin = pipe_with([&line[..], b"\n"].concat().repeat(8000));
    let _client = Process::start(client(addr, &[]).stdin(stdin).stdout(Stdio::null()));
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(harness::LIMIT)).unwrap();
    let message = frame(1, &line);
    for _ in 0..1000 {
        assert_eq!(read(&stream, message.len()), message);
        write(&stream, &message);
    }
    stream.set_read_timeout(Some(harness::QUIET)).unwrap();
    let mut unanswered = 0;
    let mut block = vec![0; 1 << 16];
    while let Ok(n @ 1..) = stream.read(&mut block) {
        unanswered += n;
    }
    let window = 1 << 20;
    assert!((window..window + message.len()).contains(&unanswered), "{unanswered} bytes");
}

/// The server replies to messages that it has not read. What is sent ahead must stay bounded, and
/// the client must detect the silence in the end.
#[test]
fn unsolicited_replies_do_not_open_the_window() {
    let (addr, server) = serve(vec![|stream: TcpStream| {
        // A few at a time, so that some messages are in flight.
        for _ in 0..200 {
            write(&stream, &frame(1, b"").repeat(100));
            harness::wait_until_taken(&stream);
        }
        // Never closes the connection.
        std::mem::forget(stream);
    }]);
    let line = [&[b'x'; 999][..], b"\n"].concat();
    let stdin = pipe_with(line.repeat(64_000));
    let mut process =
        Process::start(client(addr, &["--timeout", "5"]).stdin(stdin).stdout(Stdio::null()));
    // From here on the server is silent.
    server.join().unwrap();
    assert_ends(&mut process, "silent for 5s");
}

/// The client takes a pipe's worth, what it may send ahead and one read. Everything else stays in
/// the pipe until it can be sent, also while there is no connection.
#[test]
fn reads_no_more_lines_than_it_may_send() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let taken = lines_taken(&mut client(addr, &["--timeout", "60"]));
    assert!((1 << 20..2 << 20).contains(&taken), "{taken} bytes");

    drop(listener);
    let taken = lines_taken(&mut client(addr, &["--retry", "1000"]));
    assert!(taken <= 64 << 10, "{taken} bytes");
}

/// The server reads nothing and keeps sending empty frames. They count as replies to everything
/// that the client has queued, although none of it has left the client.
#[test]
fn reads_no_more_lines_than_it_can_send_whatever_the_server_replies() {
    let (addr, _server) = serve(vec![|mut stream: TcpStream| {
        while stream.write_all(&frame(1, b"").repeat(100)).is_ok() {
            // Few enough that the client does not only print them.
            thread::sleep(Duration::from_millis(1));
        }
    }]);
    let taken = lines_taken(client(addr, &["--timeout", "60"]).stdout(Stdio::null()));
    assert!(taken < 16 << 20, "{taken} bytes");
}

/// Small segments make the client's socket take little at a time, and no reply arrives before
/// everything has been sent.
#[test]
fn what_the_socket_does_not_take_is_sent_later() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    setsockopt(&listener, TcpMaxSeg, &536).unwrap();
    setsockopt(&listener, RcvBuf, &8192).unwrap();
    let addr = listener.local_addr().unwrap();
    let line = [b'x'; 60_000];
    let stdin = pipe_with([&line[..], b"\n"].concat().repeat(16));
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(harness::LIMIT)).unwrap();
        // A slow server: it reads nothing until nothing more fits.
        thread::sleep(harness::QUIET);
        let messages = read(&stream, 16 * frame(1, &line).len());
        write(&stream, &messages);
    });
    let output = run_with_input(&mut client(addr, &["--timeout", "30"]), stdin);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.stdout.iter().filter(|&&byte| byte == b'\n').count(), 16);
    server.join().unwrap();
}

#[test]
fn replies_may_arrive_joined_and_split() {
    let (addr, _server) = serve(vec![|stream: TcpStream| {
        let request = frame(1, &[b'x'; 100]);
        read(&stream, 3 * request.len());
        stream.set_nodelay(true).unwrap();
        for byte in frame(2, b"piece by piece") {
            write(&stream, &[byte]);
        }
        write(&stream, &[frame(3, b"stuck"), frame(4, b"together")].concat());
    }]);
    let text = "x".repeat(100);
    let output = run_command(&mut client(addr, &[&text, &text, &text]));
    assert_prints(&output, "id=2 len=14 piece by piece\nid=3 len=5 stuck\nid=4 len=8 together\n");
}

#[test]
fn the_longest_message_is_sent_and_a_longer_one_is_refused() {
    let (addr, _server) = serve(vec![echo]);
    let longest = "x".repeat(MAX_PAYLOAD);
    let output = run_command(&mut client(addr, &[&longest]));
    assert_prints(&output, &format!("id=1 len=65527 {longest}\n"));

    let output = run_command(&mut client(addr, &["fine", &format!("{longest}x")]));
    assert_fails(&output, "", "message 2 is 65528 bytes long, the limit is 65527");
}

#[test]
fn the_lines_before_one_that_is_too_long_are_answered() {
    let input = format!("one\n{}\nthree\n", "x".repeat(MAX_PAYLOAD + 1));
    let (addr, _server) = serve(vec![echo]);
    let output = run_with_input(&mut client(addr, &[]), pipe_with(input.into_bytes()));
    let reason = "line 2 of standard input is over the limit of 65527 bytes";
    assert_fails(&output, "id=1 len=3 one\n", reason);
}

/// The line feed after the longest line arrives by itself.
#[test]
fn the_longest_line_may_arrive_in_pieces() {
    let (addr, _server) = serve(vec![echo]);
    let (stdin, mut keyboard) = pipe();
    let mut process = Process::start(client(addr, &[]).stdin(stdin).stdout(Stdio::piped()));
    keyboard.write_all(&[b'x'; MAX_PAYLOAD]).unwrap();
    thread::sleep(harness::QUIET);
    keyboard.write_all(b"\n").unwrap();
    drop(keyboard);
    let mut stdout = String::new();
    process.child().stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
    assert_eq!(stdout, format!("id=1 len=65527 {}\n", "x".repeat(MAX_PAYLOAD)));
    assert_eq!(process.wait().code(), Some(0));
}

#[test]
fn an_endless_line_is_refused_before_it_fills_the_memory() {
    let (addr, _server) = serve(vec![echo]);
    let (stdin, mut keyboard) = pipe();
    let mut process = Process::start(client(addr, &[]).stdin(stdin).stdout(Stdio::null()));
    // Until the client closes the pipe, because the input itself never ends.
    while keyboard.write_all(&[b'x'; 4096]).is_ok() {}
    assert_ends(&mut process, "error: line 1 of standard input is over the limit of 65527 bytes");
}

#[test]
fn a_missing_server_is_one_clear_line() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    drop(listener);
    let output = run_command(&mut client(addr, &["x"]));
    assert_fails(
        &output,
        "",
        &format!("cannot connect to {addr}: Connection refused (os error 111)"),
    );
}

/// `localhost` may be ::1 first, where nothing listens.
#[test]
fn every_address_of_a_name_is_tried() {
    let (addr, _server) = serve(vec![echo]);
    let name = format!("localhost:{}", addr.port());
    let output = run_command(&mut program("", EXE, &name, &["x"]));
    assert_prints(&output, "id=1 len=1 x\n");
}

#[test]
fn a_lost_server_is_one_clear_line() {
    let (addr, _server) = serve::<fn(TcpStream)>(vec![
        |stream| {
            read(&stream, 18);
            write(&stream, &frame(1, b"a"));
        },
        |stream| {
            read(&stream, 18);
            write(&stream, &frame(1, b"half")[..10]);
        },
        |stream| {
            read(&stream, 18);
            write(&stream, &frame(1, b"a"));
            // The reply has arrived before the reset, so the reset does not destroy it.
            let mut rest = [0; 1];
            stream.set_nonblocking(true).unwrap();
            let _ = (&stream).read(&mut rest);
            harness::wait_until_taken(&stream);
            harness::reset(stream);
        },
    ]);
    let run = || run_command(&mut client(addr, &["a", "b"]));
    assert_fails(&run(), "id=1 len=1 a\n", "closed the connection; messages unanswered: 1");
    assert_fails(
        &run(),
        "",
        "closed the connection 10 bytes into a message; messages unanswered: 2",
    );
    let reason = "Connection reset by peer (os error 104); messages unanswered: 1";
    assert_fails(&run(), "id=1 len=1 a\n", reason);
}

#[test]
fn gives_up_on_a_silent_server() {
    let (addr, _server) = serve(vec![|mut stream: TcpStream| {
        write(&stream, &frame(9, b"then nothing"));
        let _ = stream.read_to_end(&mut Vec::new());
    }]);
    let output = run_command(&mut client(addr, &["--timeout", "0.3", "a", "b"]));
    assert_fails(&output, "id=9 len=12 then nothing\n", "silent for 300ms; messages unanswered: 1");
}

/// The timeout starts again with the last reply.
#[test]
fn gives_up_on_a_server_that_falls_silent_after_a_late_reply() {
    let (addr, _server) = serve(vec![|mut stream: TcpStream| {
        thread::sleep(harness::QUIET);
        write(&stream, &frame(9, b"late"));
        let _ = stream.read_to_end(&mut Vec::new());
    }]);
    let output = run_command(&mut client(addr, &["--timeout", "2", "a", "b"]));
    assert_fails(&output, "id=9 len=4 late\n", "silent for 2s; messages unanswered: 1");
}

#[test]
fn gives_up_on_a_server_that_does_not_accept() {
    // The backlog of one is full, so the kernel ignores the next client.
    let listener = nix_listener();
    let addr = listener.local_addr().unwrap();
    let _queue: Vec<_> = (0..2).map(|_| TcpStream::connect(addr).unwrap()).collect();
    let output = run_command(&mut client(addr, &["--timeout", "0.3", "x"]));
    assert_fails(&output, "", &format!("cannot connect to {addr}: timed out"));
}

fn nix_listener() -> TcpListener {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(1).unwrap()).unwrap();
    listener
}

#[test]
fn a_bad_frame_is_one_clear_line_after_earlier_replies() {
    for length in [-1, i32::MIN, MAX_PAYLOAD as i32 + 1, i32::MAX] {
        let (addr, _server) = serve(vec![move |stream: TcpStream| {
            read(&stream, 18);
            let bad = [1_i32.to_le_bytes(), length.to_le_bytes()].concat();
            write(&stream, &[frame(1, b"good"), bad].concat());
        }]);
        let output = run_command(&mut client(addr, &["--retry", "3", "a", "b"]));
        let reason = format!(
            "{addr} has sent a bad frame: message length {length} is not within 0 to 65527"
        );
        assert_fails(&output, "id=1 len=4 good\n", &reason);
    }
}

/// A reply is outstanding, and the server does not read any more.
#[test]
fn it_sleeps_while_it_waits() {
    let (addr, _server) = serve(vec![|mut stream: TcpStream| {
        stream.read_exact(&mut [0; 9]).unwrap();
        thread::sleep(harness::LIMIT);
    }]);
    let stdin = pipe_with(b"a message\n".repeat(1 << 20));
    let mut process = Process::start(client(addr, &[]).stdin(stdin).stdout(Stdio::null()));
    harness::wait_until("it has sent what it may", || is_asleep(&process));
    assert!(process.is_running());
}

#[test]
fn a_failing_standard_output_is_one_clear_line() {
    let (addr, _server) = serve(vec![echo, echo]);
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut process = Process::start(client(addr, &["x"]).stdin(Stdio::null()).stdout(full));
    assert_ends(&mut process, "error: cannot write to standard output: No space left on device");

    let (reader, writer) = pipe();
    drop(reader);
    let mut process = Process::start(client(addr, &["x"]).stdin(Stdio::null()).stdout(writer));
    assert_ends(&mut process, "error: cannot write to standard output: Broken pipe");
}

/// Another process has made the pipe non-blocking, and reads late.
#[test]
fn waits_for_a_full_standard_output_even_in_non_blocking_mode() {
    let (addr, _server) = serve(vec![echo]);
    let (mut reader, writer) = pipe();
    nix::fcntl::fcntl(&writer, nix::fcntl::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
    let stdin = pipe_with(b"a line\n".repeat(100_000));
    let stdout = writer.try_clone().unwrap();
    let mut process = Process::start(client(addr, &[]).stdin(stdin).stdout(stdout));
    harness::wait_until("the pipe is full", || {
        poll(&mut [PollFd::new(writer.as_fd(), PollFlags::POLLOUT)], PollTimeout::ZERO) == Ok(0)
    });
    drop(writer);
    harness::wait_until("it waits", || is_asleep(&process));
    let mut replies = Vec::new();
    reader.read_to_end(&mut replies).unwrap();
    assert!(replies == b"id=1 len=6 a line\n".repeat(100_000));
    assert_eq!(process.wait().code(), Some(0));
}

#[test]
fn reconnects_and_resends_unanswered_messages() {
    let (addr, _server) = serve::<fn(TcpStream)>(vec![
        |stream| {
            read(&stream, 27);
            write(&stream, &frame(1, b"a"));
        },
        |_| {},
        echo,
    ]);
    let output = run_command(&mut client(addr, &["--retry", "2", "a", "b", "c"]));
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "id=1 len=1 a\nid=1 len=1 b\nid=1 len=1 c\n"
    );
    let stderr = String::from_utf8_lossy(&output.stderr);
    if is_other() {
        return;
    }
    let pauses: Vec<_> = stderr.lines().map(|line| line.rsplit(' ').next().unwrap()).collect();
    assert_eq!(pauses, ["100ms", "200ms"], "{stderr}");
}

#[test]
fn gives_up_after_the_given_retries() {
    let (addr, _server) = serve::<fn(TcpStream)>(vec![drop, drop, drop]);
    let start = Instant::now();
    let output = run_command(&mut client(addr, &["--retry", "2", "x"]));
    // The pauses matter: without them, retries would make a server's trouble worse.
    assert!(start.elapsed() >= Duration::from_millis(100 + 200));
    if is_other() {
        return assert_failed(&output);
    }
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(stderr.matches("connecting again").count(), 2, "{stderr}");
    assert_eq!(stderr.matches("error: ").count(), 1, "{stderr}");
}

#[test]
fn on_a_terminal_it_sends_a_greeting_and_then_lines() {
    let (addr, server) = serve(vec![echo]);
    let (mut keyboard, terminal) = harness::open_terminal();
    let mut process = Process::start(client(addr, &[]).stdin(terminal).stdout(Stdio::piped()));
    let mut replies = BufReader::new(process.child().stdout.take().unwrap()).lines();
    let mut reply = || replies.next().unwrap().unwrap();
    assert_eq!(reply(), "id=1 len=11 hello lars!");
    keyboard.write_all(b"typed\n").unwrap();
    assert_eq!(reply(), "id=1 len=5 typed");
    let cpu = process.cpu();
    thread::sleep(harness::QUIET);
    assert!(process.cpu() - cpu < harness::QUIET / 10, "it spins while it waits for lines");
    keyboard.write_all(b"more\n\x04").unwrap();
    assert_eq!(reply(), "id=1 len=4 more");
    assert_eq!(process.wait().code(), Some(0));
    server.join().unwrap();
}

/// While the client waits for its user to type, the server owes no reply.
#[test]
fn the_timeout_counts_only_while_a_reply_is_outstanding() {
    let (addr, _server) = serve(vec![echo]);
    let (stdin, mut keyboard) = pipe();
    let mut command = client(addr, &["--timeout", "0.1"]);
    let mut process = Process::start(command.stdin(stdin).stdout(Stdio::piped()));
    let mut replies = BufReader::new(process.child().stdout.take().unwrap()).lines();
    for text in ["one", "two"] {
        keyboard.write_all(format!("{text}\n").as_bytes()).unwrap();
        assert_eq!(replies.next().unwrap().unwrap(), format!("id=1 len=3 {text}"));
        thread::sleep(harness::QUIET);
    }
    assert!(process.is_running());
    drop(keyboard);
    assert_eq!(process.wait().code(), Some(0));
}

/// While standard output is not read, the server's replies stay in the socket: it has sent them.
#[test]
fn the_timeout_does_not_count_while_standard_output_is_stuck() {
    let (addr, _server) = serve(vec![echo]);
    let input = pattern(4 << 20, 1).iter().map(|byte| b'a' + byte % 26).collect::<Vec<_>>();
    let input: Vec<u8> = input.chunks(1000).collect::<Vec<_>>().join(&b'\n');
    let mut command = client(addr, &["--timeout", "0.1"]);
    let stdin = pipe_with(input);
    let mut process = Process::start(command.stdin(stdin).stdout(Stdio::piped()));
    thread::sleep(harness::QUIET);
    let stdout = process.child().stdout.take().unwrap();
    assert_eq!(BufReader::new(stdout).lines().count(), (4_usize << 20).div_ceil(1000));
    assert_eq!(process.wait().code(), Some(0));
}

#[test]
fn prints_help_and_refuses_invalid_arguments() {
    harness::chapter_only!("it reads the chapter's --help and its arguments");
    let help = run_command(Command::new(EXE).arg("--help"));
    let help = String::from_utf8(help.stdout).unwrap();
    assert!(help.starts_with("Chapter 4, the client") && help.contains("\nTry it: "), "{help}");
    let (addr, _server) = serve(vec![echo]);
    let day = run_command(&mut client(addr, &["--timeout", "86400", "x"]));
    assert_prints(&day, "id=1 len=1 x\n");
    for args in [
        ["--timeout", "86401"],
        ["--timeout", "0"],
        ["--timeout", "-1"],
        ["--retry", "x"],
        ["--addr", "nonsense"],
    ] {
        assert_eq!(run_command(Command::new(EXE).args(args)).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn a_half_closed_server_still_answers() {
    let (addr, _server) = serve(vec![|stream: TcpStream| {
        let request = read(&stream, 9);
        write(&stream, &request);
        send_fin(&stream);
        let _ = (&stream).read_to_end(&mut Vec::new());
    }]);
    assert_prints(&run_command(&mut client(addr, &["x"])), "id=1 len=1 x\n");
}
