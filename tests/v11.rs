//! Chapter 11 from outside: messages for all clients.

use harness::every_messenger::assert_serves;
use harness::every_reactor::Chapter;
use harness::frame;

const EXE: &str = env!("CARGO_BIN_EXE_reactor-v11");
const CLIENT: &str = env!("CARGO_BIN_EXE_reactor-v11-client");

/// Replies of up to 1 MiB wait for a client that never reads; the smaller blocks that they have
/// grown through stay in the pool. Half a message of 60,000 bytes has grown from 4 KiB to 64 KiB.
const CHAPTER: Chapter = Chapter {
    exe: EXE,
    message: |payload| frame(1, payload),
    stuck_kib: 2048,
    midway_kib: 64 + 16 + 4,
    idle: 300,
};

harness::every_server!(EXE, assert_serves);
harness::every_reactor!(CHAPTER);
harness::every_messenger!(CHAPTER);
harness::every_limiter!(CHAPTER);
harness::every_router!(CHAPTER, CLIENT, "--retry", "0", "--timeout", "30");
harness::every_hook!(CHAPTER, CLIENT, "--retry", "0", "--timeout", "30");
harness::every_pool!(CHAPTER);
harness::every_config!(CHAPTER);
harness::every_udp!(CHAPTER, CLIENT);
harness::every_publisher!(CHAPTER, b"");
