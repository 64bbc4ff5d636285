//! What `StopSignals` promises. Alone in its file, as signals concern a whole process.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::time::Duration;

use anyhow::anyhow;
use common::event_loop::{EventLoop, IoCallback, Token};
use common::signal::StopSignals;
use nix::sys::signal::{SigSet, Signal, raise};

/// Under nohup it stays ignored.
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
    let in_vain: IoCallback<()> = |_, _, _| Err(anyhow!("waited in vain"));
    let timer = event_loop.run_after(limit, Token::default(), in_vain)?;
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
        let err = result.expect_err("nothing has come yet");
        assert_eq!(err.to_string(), "waited in vain");

        // To this thread: in any other one of the test runner it would be deadly.
        raise(signal).unwrap();
        run_with_limit(&mut event_loop, Duration::from_secs(20)).unwrap();

        // One that is still pending when its default effect comes back would be deadly too.
        for signal in signals() {
            raise(signal).unwrap();
        }
        stop_signals.restore_default(&mut event_loop).unwrap();
        // A closed terminal may send another one.
        assert_blocked(&signals()[2..]);
        let result = run_with_limit(&mut event_loop, Duration::ZERO);
        let err = result.expect_err("all have been taken");
        assert_eq!(err.to_string(), "waited in vain");
    }
}
