//! The bench program runs, and stores what it has measured.

// A test fails by a panic.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::Command;

use bench::latency::Latency;
use bench::report::Report;
use bench::target::Server;

const PEERS: [&str; 4] = ["floor", "peer-mio", "peer-tokio", "peer-tokio-codec"];

fn bench() -> Command {
    Command::new(env!("CARGO_BIN_EXE_bench"))
}

#[test]
fn every_peer_can_be_measured() {
    let json = std::env::temp_dir().join(format!("bench-test-{}.json", std::process::id()));
    let output = bench()
        .args(["--servers", &PEERS.join(","), "--rounds", "2", "--seconds", "0.05"])
        .args([
            "--scenarios",
            "3x2x64,2x1x64+1x2x65535,udp:3x1x64",
            "--idle",
            "20",
            "--no-calls",
            "--json",
        ])
        .arg(&json)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let report = Report::from_json(&fs::read_to_string(&json).unwrap()).unwrap();
    fs::remove_file(&json).unwrap();
    // Only the floor serves UDP.
    assert_eq!(report.loads.len(), PEERS.len() * 2 * 2 + 2);
    assert_eq!((report.accepts.len(), report.idle.len()), (PEERS.len() * 2, PEERS.len()));
    assert!(report.loads.iter().all(|load| load.rate > 0.0 && load.cpu_ns > 0.0));
    assert!(report.accepts.iter().all(|accept| accept.rate > 0.0));
    // The printed tables are made from the stored figures.
    let printed = String::from_utf8(output.stdout).unwrap();
    for name in ["cpu", "rate", "latency", "fairness", "udp", "accept", "idle"] {
        assert!(printed.contains(&report.table(name).unwrap()), "{name} in {printed}");
    }
}

#[test]
fn both_loops_are_measured_for_every_server() {
    let packages = ["-p=bench", "-p=reactor-v07", "-p=reactor-v08", "-p=reactor-v12"];
    let profile = if cfg!(debug_assertions) { "dev" } else { "release" };
    let build = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--bins", "--profile", profile])
        .args(packages)
        .status();
    assert!(build.unwrap().success());
    let json = std::env::temp_dir().join(format!("bench-latency-{}.json", std::process::id()));
    let args = ["--rounds", "1", "--seconds", "0.02", "--latency"];
    let output = bench().args(args).arg(&json).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let latency = Latency::from_json(&fs::read_to_string(&json).unwrap()).unwrap();
    fs::remove_file(&json).unwrap();
    assert_eq!(latency.lines.len(), 8);
    for pair in latency.lines.chunks(2) {
        assert!(pair[0].server == pair[1].server && !pair[0].open && pair[1].open);
        // A busy machine may miss replies at the end, but not under every load.
        assert!(pair.iter().all(|line| !line.points.is_empty()), "{}", pair[0].server);
        assert!(
            pair.iter().flat_map(|line| &line.points).all(|it| it.rate > 0.0 && it.p99_us > 0.0)
        );
    }
}

#[test]
fn the_servers_are_the_chapters_between_the_floor_and_the_peers() {
    let names = Server::all().unwrap();
    assert_eq!(names[..3], ["floor", "reactor-v01", "reactor-v02"]);
    assert_eq!(names[names.len() - 3..], PEERS[1..]);
    assert!(names[1..names.len() - 3].is_sorted());
    assert!(!names.contains(&"reactor-v04-client".to_owned()));
}

#[test]
fn invalid_servers_and_scenarios_are_named() {
    let output = bench().args(["--servers", "no-such-server"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no-such-server"), "{output:?}");

    let output = bench().args(["--scenarios", "1x1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("CONNECTIONSxPIPELINExBYTES"));
}
