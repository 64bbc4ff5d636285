//! The tables show the right figures.

// A test fails by a panic.
#![allow(clippy::unwrap_used)]

use bench::report::{Accept, Calls, Idle, Load, Machine, Report};

fn load(server: &str, scenario: &str, round: usize, cpu_ns: f64, p99_us: f64) -> Load {
    let (server, scenario) = (server.to_owned(), scenario.to_owned());
    let (p50_us, p999_us) = (p99_us / 2.0, p99_us * 2.0);
    Load {
        server,
        scenario,
        round,
        rate: 1_000_000.0,
        cpu_ns,
        p50_us,
        p99_us,
        p999_us,
        beside: 2.5e9,
    }
}

fn report() -> Report {
    let unknown = String::new;
    let accept = |round, rate| Accept { server: "a".to_owned(), round, rate, cpu_ns: 12_345.0 };
    Report {
        machine: Machine {
            processor: unknown(),
            processors: 2,
            kernel: unknown(),
            congestion_control: unknown(),
            rustc: unknown(),
            commit: unknown(),
        },
        rounds: 3,
        seconds: 1.0,
        servers: ["floor", "a", "b"].map(str::to_owned).to_vec(),
        scenarios: ["1x8x65535", "9x1x64", "9x1x64+1x8x65535", "udp:9x1x64"]
            .map(str::to_owned)
            .to_vec(),
        loads: vec![
            // The machine is slower in every round, but the ratio stays the same.
            load("floor", "1x8x65535", 0, 1000.0, 10.0),
            load("floor", "1x8x65535", 1, 2000.0, 10.0),
            load("floor", "1x8x65535", 2, 4000.0, 10.0),
            load("a", "1x8x65535", 0, 1500.0, 10.0),
            load("a", "1x8x65535", 1, 3000.0, 10.0),
            load("a", "1x8x65535", 2, 6000.0, 12_345.0),
            load("a", "9x1x64", 0, 1.0, 100.0),
            load("a", "9x1x64+1x8x65535", 0, 1.0, 1_234.0),
            load("floor", "udp:9x1x64", 0, 1000.0, 10.0),
            load("b", "udp:9x1x64", 0, 1100.0, 10.0),
        ],
        accepts: vec![accept(0, 3.0), accept(1, 1.0), accept(2, 20_000.0)],
        idle: vec![Idle {
            server: "a".to_owned(),
            connections: 10,
            start: 1 << 20,
            connected: (1 << 20) + 1000,
            echoed: (1 << 20) + 1010,
            burst: 1 << 21,
        }],
        calls: vec![Calls {
            server: "a".to_owned(),
            scenario: "50x1x64".to_owned(),
            per_reply: [("read".to_owned(), 1.0), ("epoll_wait".to_owned(), 0.02)].into(),
        }],
    }
}

#[track_caller]
fn assert_table(name: &str, expected: &[&str]) {
    let table = report().table(name).unwrap();
    assert_eq!(table.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn ratios_are_within_a_round_and_medians_over_them() {
    assert_table(
        "cpu",
        &[
            "| server | 1×8×65535 |",
            "| ------ | --------: |",
            "| floor  |  2,000 ns |",
            "| a      |      1.50 |",
        ],
    );
}

/// Over UDP and over TCP are in different tables.
#[test]
fn datagrams_have_ratios_of_their_own() {
    assert_table(
        "udp",
        &[
            "| server |   9×1×64 |",
            "| ------ | -------: |",
            "| floor  | 1,000 ns |",
            "| b      |     1.10 |",
        ],
    );
}

#[test]
fn latency_is_the_median_of_each_quantile() {
    assert_table(
        "latency",
        &[
            "| server |   1×8×65535 |",
            "| ------ | ----------: |",
            "| floor  | 5 / 10 / 20 |",
            "| a      | 5 / 10 / 20 |",
        ],
    );
}

#[test]
fn fairness_compares_with_and_without() {
    assert_table(
        "fairness",
        &[
            "| server | 9×1×64 |   9×1×64 + 1×8×65535 |",
            "| ------ | -----: | -------------------: |",
            "| a      | 100 µs | 1,234 µs, 2,500 MB/s |",
        ],
    );
}

#[test]
fn streams_are_in_bytes() {
    let table = report().table("stream").unwrap();
    assert!(table.contains("| a      | 65,535 MB/s |"), "{table}");
}

#[test]
fn the_other_tables_have_a_row_for_each_server_measured() {
    assert_table(
        "accept",
        &[
            "| server | clients/s | processor time each |",
            "| ------ | --------: | ------------------: |",
            "| a      |         3 |             12.3 µs |",
        ],
    );
    assert_table(
        "idle",
        &[
            "| server | at startup | each of 10 connections | after an echo | after all at once |",
            "| ------ | ---------: | ---------------------: | ------------: | ----------------: |",
            "| a      |    1.0 MiB |                  100 B |         101 B |         104,858 B |",
        ],
    );
    assert_table(
        "calls",
        &[
            "| server | connections | epoll_wait | read |  all |",
            "| ------ | ----------: | ---------: | ---: | ---: |",
            "| a      |          50 |       0.02 | 1.00 | 1.02 |",
        ],
    );
}

#[test]
fn a_stored_report_can_be_read_again() {
    let json = report().to_json().unwrap();
    assert_eq!(Report::from_json(&json).unwrap().to_json().unwrap(), json);
    assert!(Report::from_json("{}").is_err());
    assert!(report().table("nothing").is_none());
}
