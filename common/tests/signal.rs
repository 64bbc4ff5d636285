//! What `StopSignals` promises. Alone in its file, as signals concern a whole process.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::io::{self, ErrorKind};
use std::time::Duration;

use common::event_loop::{EventLoop, IoCallback, Token};
use common::signal::StopSignals;
use nix::sys::signal::{SigSet, Signal, raise};

/// Without SIGHUP where it is ignored, as under nohup: it stays so.
fn signals() -> Vec<Signal> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:\t")).unwrap();
    let hup_is_ignored = u64::from_str_radix(ignored, 16).unwrap() % 2 == 1;
    let all = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
    all.into_iter().filter(|signal| *signal != Signal::SIGHUP || !hup_is_ignored).collect()
}

fn run_with_limit(event_loop: &mut EventLoop<()>, limit: Duration) -> io::Result<()> {
    let in_vain: IoCallback<()> = |_, _, _| Err(ErrorKind::TimedOut.into());
    let timer = event_loop.run_after(limit, Token::default(), in_vain)?;
    let result = event_loop.event_process(&mut ());
    event_loop.cancel_timer(timer);
    result
}

#[track_caller]
fn assert_blocked(expected: bool) {
    let mask = SigSet::thread_get_mask().unwrap();
    assert!(signals().into_iter().all(|signal| mask.contains(signal) == expected));
}

#[test]
fn a_signal_stops_the_loop_and_the_next_one_has_its_default_effect_again() {
    let mut event_loop = EventLoop::new().unwrap();
    for signal in signals() {
        assert_blocked(false);
        let stop_signals = StopSignals::register(&mut event_loop).unwrap();
        assert_blocked(true);
        let result = run_with_limit(&mut event_loop, Duration::ZERO);
        let err = result.expect_err("nothing has come yet");
        assert_eq!(err.kind(), ErrorKind::TimedOut);

        // To this thread: in any other one of the test runner it would be deadly.
        raise(signal).unwrap();
        run_with_limit(&mut event_loop, Duration::from_secs(20)).unwrap();

        // One that is still pending when its default effect comes back would be deadly too.
        for signal in signals() {
            raise(signal).unwrap();
        }
        stop_signals.restore_default(&mut event_loop).unwrap();
        assert_blocked(false);
        let result = run_with_limit(&mut event_loop, Duration::ZERO);
        let err = result.expect_err("all have been taken");
        assert_eq!(err.kind(), ErrorKind::TimedOut);
    }
}
