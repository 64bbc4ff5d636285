//! The promises of `StopSignals`. Alone in its file, because signals affect the whole process.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::time::Duration;

use anyhow::anyhow;
use common::event_loop::{EventLoop, IoCallback, Token};
use common::signal::StopSignals;
use nix::sys::signal::{SigSet, Signal, raise};

/// Whether SIGHUP is ignored, as under nohup.
fn hup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:\t")).unwrap();
    u64::from_str_radix(ignored, 16).unwrap() % 2 == 1
}

fn signals() -> Vec<Signal> {
    let mut signals = vec![Signal::SIGINT, Signal::SIGTERM];
    if !hup_is_ignored() {
        signals.push(Signal::SIGHUP);
    }
    signals
}

fn run_with_limit(event_loop: &mut EventLoop<()>, limit: Duration) -> anyhow::Result<()> {
    let time_out: IoCallback<()> = |_, _, _| Err(anyhow!("timed out"));
    let timer = event_loop.run_after(limit, Token::default(), time_out)?;
    let result = event_loop.event_process(&mut ());
    event_loop.cancel_timer(timer);
    result
}

#[track_caller]
fn assert_blocked(expected: &[Signal]) {
    let mask = SigSet::thread_get_mask().unwrap();
    assert_eq!(SigSet::from_iter(expected.iter().copied()), mask);
}

#[test]
fn a_signal_stops_the_loop_and_the_next_one_has_its_default_effect_again() {
    let mut event_loop = EventLoop::new().unwrap();
    for signal in signals() {
        let stop_signals = StopSignals::register(&mut event_loop).unwrap();
        assert_blocked(&signals());
        let result = run_with_limit(&mut event_loop, Duration::ZERO);
        let err = result.expect_err("no signal has arrived yet");
        assert_eq!(err.to_string(), "timed out");

        // To this thread: to any other thread of the test runner it would be fatal.
        raise(signal).unwrap();
        run_with_limit(&mut event_loop, Duration::from_secs(20)).unwrap();

        // A signal that is still pending when its default effect is restored would be fatal too.
        for signal in signals() {
            raise(signal).unwrap();
        }
        stop_signals.restore_default(&mut event_loop).unwrap();
        // SIGHUP stays blocked: closing a terminal may send another one.
        assert_blocked(&signals()[2..]);
        let result = run_with_limit(&mut event_loop, Duration::ZERO);
        let err = result.expect_err("no signal is left");
        assert_eq!(err.to_string(), "timed out");
    }
}
