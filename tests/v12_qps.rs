//! The QPS test of chapter 12 from outside: against the chapter, and against servers that behave in
//! all kinds of ways.

// A test fails by a panic, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{self, Command, Output, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{env, fs};

use harness::{Process, Server, Signal, assert_silent, frame, read, run_command, send_fin, write};

const EXE: &str = env!("CARGO_BIN_EXE_reactor-v12");
const QPS: &str = env!("CARGO_BIN_EXE_reactor-v12-qps");

/// How long a server stalls.
const STALL: Duration = Duration::from_millis(300);

/// Starts a server that handles one client.
fn serve(handler: impl FnOnce(TcpStream) + Send + 'static) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(harness::LIMIT)).unwrap();
        handler(stream);
    });
    (addr, server)
}

/// Reads one frame, or `None` at the end of the stream.
fn next_frame(mut stream: &TcpStream) -> Option<Vec<u8>> {
    let mut header = [0; 8];
    stream.read_exact(&mut header).ok()?;
    let length = i32::from_le_bytes(header[4..].try_into().unwrap());
    Some([&header, &read(stream, length.try_into().unwrap())[..]].concat())
}

/// Sends everything back.
fn echo(mut stream: &TcpStream) {
    io::copy(&mut stream.try_clone().unwrap(), &mut stream).unwrap();
}

fn qps(addr: SocketAddr, options: &str) -> Command {
    let mut command = Command::new(QPS);
    command.args(["--addr", &addr.to_string()]).args(options.split_whitespace());
    command.env_remove("RUST_LOG");
    command
}

/// The request of the only connection, as the C++ course's program encodes it.
fn request(id: u8) -> Vec<u8> {
    let content = b"\x0a\x0dHello Lars!!!";
    // 0 is the default, which is not encoded.
    let id = if id == 0 { vec![] } else { vec![0x10, id] };
    frame(1, &[content, &id[..]].concat())
}

/// The figures of a run that succeeds.
struct Figures {
    replies: f64,
    throughput: f64,
    p50: f64,
    p99: f64,
    max: f64,
}

/// A name for a file, which is removed when this is dropped.
struct TempFile(PathBuf);

impl TempFile {
    fn new(name: &str) -> Self {
        Self(env::temp_dir().join(format!("v12-qps-{}-{name}.json", process::id())))
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Runs it until something has happened.
#[track_caller]
fn run_until(happened: &Receiver<()>, command: &mut Command) -> Output {
    harness::run_until(command, || happened.recv_timeout(harness::LIMIT).unwrap())
}

/// Runs it to its end, and returns its figures.
#[track_caller]
fn measure(addr: SocketAddr, name: &str, options: &str) -> Figures {
    let file = TempFile::new(name);
    check(&file, &run_command(qps(addr, options).args(["--json", file.path()])))
}

/// Runs it until something has happened, and returns its figures.
#[track_caller]
fn measure_until(happened: &Receiver<()>, addr: SocketAddr, name: &str, options: &str) -> Figures {
    let file = TempFile::new(name);
    let mut command = qps(addr, &format!("{options} --duration 600"));
    check(&file, &run_until(happened, command.args(["--json", file.path()])))
}

/// Checks that what it prints is what it writes, and plausible.
#[track_caller]
fn check(file: &TempFile, output: &Output) -> Figures {
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(0));
    let json = fs::read_to_string(&file.0).unwrap();
    let number = |key: &str| -> f64 {
        let rest = json.split_once(&format!("\"{key}\": ")).unwrap().1;
        rest.split([',', '}']).next().unwrap().parse().unwrap()
    };
    let [replies, throughput] = ["replies", "throughput_per_s"].map(number);
    let [p50, p99, p99_9, max] = ["p50", "p99", "p99_9", "max"].map(number);
    let expected = format!(
        "{{\"replies\": {replies}, \"throughput_per_s\": {throughput:.1}, \"latency_us\": {{\"p50\": \
         {p50:.1}, \"p99\": {p99:.1}, \"p99_9\": {p99_9:.1}, \"max\": {max:.1}}}}}\n"
    );
    assert_eq!(json, expected);
    assert!(replies > 0.0 && throughput > 0.0, "{json}");
    assert!(0.0 < p50 && p50 <= p99 && p99 <= p99_9 && p99_9 <= max, "{json}");
    let lines = format!(
        "replies     {replies}\nthroughput  {throughput:.0} per second\n\
         latency     p50 {p50:.1} µs, p99 {p99:.1} µs, p99.9 {p99_9:.1} µs, max {max:.1} µs\n"
    );
    let stdout = String::from_utf8(output.stdout.clone()).unwrap();
    let without_throughput = |text: &str| -> Vec<String> {
        text.lines().filter(|line| !line.starts_with("throughput")).map(str::to_owned).collect()
    };
    // Its digits depend on the rounding.
    assert_eq!(without_throughput(&stdout), without_throughput(&lines));
    assert_eq!(stdout.lines().count(), 3, "{stdout}");
    Figures { replies, throughput, p50, p99, max }
}

/// It fails with this one line on standard error.
#[track_caller]
fn assert_fails(output: &Output, reason: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with("error: ") && stderr.contains(reason), "{stderr:?}: {reason:?}");
    assert_eq!(stderr.matches('\n').count(), 1, "{stderr:?}");
}

/// The welcome is no reply.
#[test]
fn a_closed_loop_counts_replies() {
    let server = Server::start_with(EXE, &["--welcome", "hello"]);
    let options = "--connections 7 --threads 3 --depth 5 --duration 0.5";
    let figures = measure(server.addr(), "closed", options);
    let per_second = figures.replies / 0.5;
    // The last replies come after the end.
    assert!(figures.throughput <= per_second + 1.0, "{per_second}");
}

/// Exactly those that are due before the end, whichever connection and thread sends them.
#[test]
fn an_open_loop_sends_what_is_due() {
    let server = Server::start_with(EXE, &["--welcome", "hello"]);
    let options = "--connections 7 --threads 3 --rate 1001 --duration 0.5 --depth 1";
    assert_eq!(measure(server.addr(), "open", options).replies, 501.0);
    let options = "--connections 5 --threads 9 --rate 3 --duration 0.1";
    assert_eq!(measure(server.addr(), "slow", options).replies, 1.0);
}

#[test]
fn it_keeps_as_many_requests_unanswered_as_it_is_told() {
    let (seen, all_seen) = mpsc::channel();
    let (addr, server) = serve(move |stream| {
        let requests = [0, 1, 2].map(request);
        assert_eq!(read(&stream, requests.concat().len()), requests.concat());
        assert_silent(&stream);
        write(&stream, &requests[0]);
        assert_eq!(next_frame(&stream), Some(request(3)));
        assert_silent(&stream);
        write(&stream, &[&requests[1][..], &requests[2], &request(3)].concat());
        seen.send(()).unwrap();
        echo(&stream);
    });
    measure_until(&all_seen, addr, "depth", "--connections 1 --depth 3");
    server.join().unwrap();
}

/// What is due above the high-water mark is sent later, and counts as late.
#[test]
fn an_open_loop_keeps_a_bounded_number_of_requests_unanswered() {
    let (addr, server) = serve(|stream| {
        let requests: Vec<_> = (0..4096).map(|_| next_frame(&stream).unwrap()).collect();
        assert_silent(&stream);
        requests.iter().for_each(|request| write(&stream, request));
        echo(&stream);
    });
    // Slow, so that a machine without time for it has two seconds more.
    let figures = measure(addr, "bounded", "--connections 1 --rate 4000 --duration 2.25");
    assert_eq!(figures.replies, 9000.0);
    // 4096 requests are answered after the pause, and the 600 after them are due in its first half.
    assert!(figures.p50 >= harness::QUIET.as_micros() as f64 / 2.0, "{}", figures.p50);
    server.join().unwrap();
}

/// Coordinated omission: a closed loop sends nothing while the server stalls, so one reply is slow. In
/// an open loop all that is due meanwhile is late.
#[test]
fn a_stall_shows_in_an_open_loop_although_a_closed_loop_hides_it() {
    let (seen, stalled) = mpsc::channel();
    let (addr, server) = serve(move |stream| {
        let request = next_frame(&stream).unwrap();
        assert_silent(&stream);
        write(&stream, &request);
        write(&stream, &next_frame(&stream).unwrap());
        seen.send(()).unwrap();
        echo(&stream);
    });
    let closed = measure_until(&stalled, addr, "hidden", "--connections 1");
    assert!(closed.max >= harness::QUIET.as_micros() as f64, "{}", closed.max);
    server.join().unwrap();

    let (addr, server) = serve(|stream| {
        // The last of these is due 300 ms after the first, and all of them wait for it.
        let requests: Vec<_> = (0..=300).map(|_| next_frame(&stream).unwrap()).collect();
        requests.iter().for_each(|request| write(&stream, request));
        echo(&stream);
    });
    let open = measure(addr, "shown", "--connections 1 --rate 1000 --duration 1.2");
    assert_eq!(open.replies, 1200.0);
    // Up to a millisecond is the timers'.
    assert!(open.max >= 298_000.0 && open.p99 >= 286_000.0, "{} {}", open.p99, open.max);
    server.join().unwrap();
}

#[test]
fn replies_may_arrive_in_pieces_and_after_the_end() {
    let (addr, server) = serve(|stream| {
        let request = next_frame(&stream).unwrap();
        thread::sleep(STALL);
        request.iter().for_each(|byte| write(&stream, &[*byte]));
        // A test that is late itself sends more.
        echo(&stream);
    });
    let figures = measure(addr, "late", "--connections 1 --duration 0.1");
    let most = figures.replies / STALL.as_secs_f64();
    assert!(figures.throughput <= most + 0.1, "{}", figures.throughput);
    server.join().unwrap();
}

#[test]
fn a_wrong_reply_is_one_clear_line() {
    let content = frame(1, b"\x0a\x0dHello Lars!!?\x10\x01");
    let twice = [request(1), request(2)].concat();
    let bad = [1_i32.to_le_bytes(), (-1_i32).to_le_bytes()].concat();
    for (reply, reason) in [
        (content, "wrong reply: EchoMessage { content: \"Hello Lars!!?\", id: 1 } to EchoMessage"),
        (
            request(2),
            "wrong reply: EchoMessage { content: \"Hello Lars!!!\", id: 2 } to EchoMessage",
        ),
        (frame(1, b"\xff\xff"), "wrong reply: failed to decode Protobuf message"),
        (frame(1, b"\x0a\x01\xff"), "wrong reply: failed to decode Protobuf message"),
        (frame(1, b""), "wrong reply: EchoMessage { content: \"\", id: 0 } to EchoMessage"),
        (twice, "a reply without a request"),
        (bad, "refused: message length -1 is not within 0 to 65527"),
    ] {
        let (addr, _server) = serve(move |stream| {
            write(&stream, &next_frame(&stream).unwrap());
            next_frame(&stream).unwrap();
            write(&stream, &reply);
            let _ = (&stream).read_to_end(&mut Vec::new());
        });
        let output = run_command(&mut qps(addr, "--connections 1 --duration 600"));
        assert_fails(&output, &format!("error: {addr}: {reason}"));
        assert_eq!(output.stdout, b"");
    }
}

#[test]
fn a_missing_reply_is_one_clear_line_after_the_figures() {
    for (options, n) in [
        ("--depth 9 --duration 600", 9),
        ("--rate 100 --duration 0.2", 19),
        ("--rate 50000 --duration 0.2", 9999),
    ] {
        let (seen, replied) = mpsc::channel();
        let (addr, _server) = serve(move |stream| {
            write(&stream, &next_frame(&stream).unwrap());
            // These are no replies.
            write(&stream, &frame(2, b"hello"));
            // In a closed loop, the tenth is sent after the reply.
            (0..9).for_each(|_| drop(next_frame(&stream).unwrap()));
            seen.send(()).unwrap();
            let _ = (&stream).read_to_end(&mut Vec::new());
        });
        let file = TempFile::new(&n.to_string());
        fs::write(&file.0, "old").unwrap();
        let mut command = qps(addr, &format!("{options} --connections 1 --json {}", file.path()));
        let is_closed = options.starts_with("--depth");
        let output =
            if is_closed { run_until(&replied, &mut command) } else { run_command(&mut command) };
        assert_fails(&output, &format!("error: {n} replies are missing a second after the end"));
        let stdout = String::from_utf8(output.stdout).unwrap();
        assert!(stdout.starts_with("replies     1\n"), "{stdout}");
        assert_eq!(fs::read_to_string(&file.0).unwrap(), "");
    }
}

#[test]
fn a_reply_that_comes_more_than_a_second_after_the_end_is_missing() {
    let (addr, _server) = serve(|stream| {
        let request = next_frame(&stream).unwrap();
        thread::sleep(10 * STALL);
        let _ = (&stream).write_all(&request);
        let _ = (&stream).read_to_end(&mut Vec::new());
    });
    let output = run_command(&mut qps(addr, "--connections 1 --duration 0.1"));
    assert_fails(&output, "error: 1 replies are missing a second after the end");
}

/// It is opened once: a FIFO has no reader after the first time.
#[test]
fn the_figures_may_go_into_a_fifo() {
    let (server, fifo) = (Server::start(EXE), TempFile::new("fifo"));
    assert!(Command::new("mkfifo").arg(fifo.path()).status().unwrap().success());
    let path = fifo.0.clone();
    let reader = thread::spawn(|| fs::read_to_string(path).unwrap());
    let options = format!("--duration 0.1 --json {}", fifo.path());
    let output = run_command(&mut qps(server.addr(), &options));
    assert_eq!(output.status.code(), Some(0));
    assert!(reader.join().unwrap().starts_with("{\"replies\": "));
}

#[test]
fn a_lost_connection_is_one_clear_line() {
    let (addr, _server) = serve(|stream| {
        write(&stream, &next_frame(&stream).unwrap());
        next_frame(&stream).unwrap();
    });
    let reason = format!("error: {addr}: the server has closed the connection");
    assert_fails(&run_command(&mut qps(addr, "--connections 1 --duration 600")), &reason);

    let (addr, _server) = serve(|stream| {
        write(&stream, &next_frame(&stream).unwrap());
        send_fin(&stream);
        let _ = (&stream).read_to_end(&mut Vec::new());
    });
    let reason = format!("error: {addr}: the server has closed the connection");
    assert_fails(&run_command(&mut qps(addr, "--connections 1 --rate 10 --duration 600")), &reason);

    let (addr, _server) = serve(|stream| write(&stream, &next_frame(&stream).unwrap()[..10]));
    let reason = format!("error: {addr}: closed inside a message, 10 bytes into it");
    assert_fails(&run_command(&mut qps(addr, "--connections 1 --duration 600")), &reason);

    let (addr, _server) = serve(|stream| {
        write(&stream, &next_frame(&stream).unwrap());
        next_frame(&stream).unwrap();
        harness::reset(stream);
    });
    let reason = format!("error: {addr}: Connection reset by peer (os error 104)");
    assert_fails(&run_command(&mut qps(addr, "--connections 1 --duration 600")), &reason);
}

#[test]
fn a_full_or_missing_server_is_one_clear_line() {
    let server = Server::start_with(EXE, &["--max-conns", "3"]);
    let reason = format!("error: {}: the server is full", server.addr());
    assert_fails(
        &run_command(&mut qps(server.addr(), "--connections 4 --threads 4 --duration 600")),
        &reason,
    );

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    drop(listener);
    let reason = format!("error: cannot connect to {addr}: Connection refused (os error 111)");
    assert_fails(&run_command(&mut qps(addr, "")), &reason);
    let output = run_command(&mut qps(addr, "--json /no/such/file"));
    assert_fails(&output, "error: cannot write /no/such/file: No such file or directory");
}

#[test]
fn a_signal_ends_it_early_with_the_figures_so_far() {
    let server = Server::start(EXE);
    for (signal, options) in [(Signal::SIGINT, ""), (Signal::SIGTERM, "--rate 1000")] {
        let mut command = qps(server.addr(), &format!("{options} --threads 2 --duration 600"));
        let mut process = Process::start(command.stdin(Stdio::null()).stdout(Stdio::piped()));
        // From then on, signals do not simply kill it.
        harness::wait_until("its threads run", || process.thread_names().len() == 3);
        process.signal(signal);
        assert_eq!(process.wait().code(), Some(0), "{}", process.log());
        let mut stdout = String::new();
        process.child().stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
        assert!(stdout.starts_with("replies     ") && stdout.lines().count() == 3, "{stdout}");
    }
}

#[test]
fn it_shows_its_progress_on_a_terminal() {
    let server = Server::start(EXE);
    let (screen, terminal) = harness::open_terminal();
    let mut command = qps(server.addr(), "--rate 100 --duration 600");
    let mut child = command.stdout(Stdio::null()).stderr(terminal).spawn().unwrap();
    // Or its end of the terminal would outlive the program.
    drop(command);
    let lines: Vec<_> = BufReader::new(screen).lines().take(2).map(Result::unwrap).collect();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(lines.iter().all(|line| line.ends_with(" replies per second")), "{lines:?}");
}

#[test]
fn prints_help_and_refuses_invalid_arguments() {
    let help = run_command(Command::new(QPS).arg("--help"));
    let help = String::from_utf8(help.stdout).unwrap();
    assert!(help.starts_with("Chapter 12, the QPS test") && help.contains("\nTry it: "), "{help}");
    for args in [
        ["--connections", "0"],
        ["--connections", "50001"],
        ["--threads", "0"],
        ["--threads", "1025"],
        ["--depth", "0"],
        ["--depth", "4097"],
        ["--rate", "0"],
        ["--rate", "10000001"],
        ["--rate", "1.5"],
        ["--duration", "0"],
        ["--duration", "86401"],
        ["--addr", "nonsense"],
        ["--nonsense", "1"],
    ] {
        assert_eq!(run_command(Command::new(QPS).args(args)).status.code(), Some(2), "{args:?}");
    }
}
