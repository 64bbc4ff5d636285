//! The limits on time: when the sweep checks them.

use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use common::buf_pool::BufPool;
use common::event_loop::{Callbacks, EventLoop, Token};
use common::limit::{Sweep, Timeouts};
use common::tcp_conn::TcpConn;

/// The loop's state: which timers have run.
type Order = Vec<u8>;

fn push<const N: u8>(order: &mut Order, _: &mut EventLoop<Order>, _: Token) -> anyhow::Result<()> {
    order.push(N);
    Ok(())
}

/// The loop's timers run in the order in which they are due, so another timer shows when the sweep's
/// was due.
#[test]
fn a_timeout_is_checked_after_a_quarter_of_it_and_not_much_later() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let mut event_loop = EventLoop::<Order>::new().unwrap();
    let (stream, callbacks) =
        (TcpStream::connect(addr).unwrap(), Callbacks { read: None, write: None });
    let pool = BufPool::new(1 << 20);
    let conn = TcpConn::new(&mut event_loop, stream, addr, &pool, callbacks).unwrap();
    let [idle_timeout, frame_timeout] = [6, 30].map(Duration::from_secs);
    let mut sweep = Sweep::new(Timeouts { idle_timeout, frame_timeout });
    let timer = |event_loop: &mut EventLoop<_>, millis, callback| {
        event_loop.run_after(Duration::from_millis(millis), Token::default(), callback).unwrap();
    };
    timer(&mut event_loop, 1400, push::<0>);
    timer(&mut event_loop, 1600, push::<2>);
    for _ in 0..3 {
        // Only the first call sets a timer.
        sweep.watch(&mut event_loop, &conn, push::<1>).unwrap();
    }
    let mut order = Vec::new();
    while order.last() != Some(&2) {
        event_loop.poll_once(&mut order, None).unwrap();
    }
    assert_eq!(order, [0, 1, 2]);
}
