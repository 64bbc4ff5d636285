//! What `StopSignals` promises. Alone in its file, as signals concern a whole process.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::io::{self, ErrorKind};
use std::time::Duration;

use common::event_loop::{EventLoop, IoCallback, Token};
use common::signal::StopSignals;
use nix::sys::signal::{SigSet, Signal, raise};

const SIGNALS: [Signal; 2] = [Signal::SIGINT, Signal::SIGTERM];

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
    assert_eq!(SIGNALS.map(|signal| mask.contains(signal)), [expected; 2]);
}

#[test]
fn a_signal_stops_the_loop_and_the_next_one_has_its_default_effect_again() {
    let mut event_loop = EventLoop::new().unwrap();
    for signal in SIGNALS {
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
        for signal in SIGNALS {
            raise(signal).unwrap();
        }
        stop_signals.restore_default(&mut event_loop).unwrap();
        assert_blocked(false);
        let result = run_with_limit(&mut event_loop, Duration::ZERO);
        let err = result.expect_err("all have been taken");
        assert_eq!(err.kind(), ErrorKind::TimedOut);
    }
}
