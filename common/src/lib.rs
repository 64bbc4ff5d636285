//! What stays the same once a chapter has brought it in.
//!
//! | module          | since | what it holds                                                       |
//! |-----------------|-------|---------------------------------------------------------------------|
//! | [`cli`]         | v01   | arguments and exit codes: what is around a chapter                  |
//! | [`log`]         | v01   | the log that never stalls a server                                  |
//! | [`net`]         | v01   | listening, accepting and what its errors mean, closing without loss |
//! | [`buf_pool`]    | v02   | `BufPool`: blocks of memory in size classes, with a cap             |
//! | [`io_buf`]      | v02   | `IoBuf`: one block with a head and a length                         |
//! | [`reactor_buf`] | v02   | `InputBuf` and `OutputBuf`: between a socket and a block            |
//! | [`event_loop`]  | v03   | `EventLoop`: the Reactor itself                                     |
//! | [`closing`]     | v03   | `close_gracefully`: the one way in which a healthy connection ends  |
//! | [`signal`]      | v03   | Ctrl-C, SIGTERM and SIGHUP as one more fd of the loop               |
//! | [`lines`]       | v04   | the lines of standard input, for a program on the event loop        |
//! | [`message`]     | v04   | the TLV frame: header, encode, decode                               |

#![warn(missing_docs)]

#[cfg(not(target_os = "linux"))]
compile_error!(
    "this course is about epoll, which only Linux has: \
     build it in WSL2, in a Linux container or in a virtual machine"
);

#[cfg(target_os = "linux")]
pub mod buf_pool;
#[cfg(target_os = "linux")]
pub mod cli;
#[cfg(target_os = "linux")]
pub mod closing;
#[cfg(target_os = "linux")]
pub mod event_loop;
#[cfg(target_os = "linux")]
pub mod io_buf;
#[cfg(target_os = "linux")]
pub mod lines;
#[cfg(target_os = "linux")]
pub mod log;
#[cfg(target_os = "linux")]
pub mod message;
#[cfg(target_os = "linux")]
pub mod net;
#[cfg(target_os = "linux")]
pub mod reactor_buf;
#[cfg(target_os = "linux")]
pub mod signal;
