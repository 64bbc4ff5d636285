//! The code that the chapters share: it stays the same once a chapter has introduced it.
//!
//! | module          | since | contents                                                         |
//! |-----------------|-------|------------------------------------------------------------------|
//! | [`cli`]         | v01   | the command line: arguments, exit codes, standard output         |
//! | [`log`]         | v01   | the log, which never blocks a server                             |
//! | [`net`]         | v01   | listening, accepting, connecting, closing without losing a reply |
//! | [`buf_pool`]    | v02   | `BufPool`: reuses blocks of memory, up to a cap                  |
//! | [`io_buf`]      | v02   | `IoBuf`: one block, with the position and length of its data     |
//! | [`reactor_buf`] | v02   | `InputBuf` and `OutputBuf`: a connection's unread, unsent bytes  |
//! | [`event_loop`]  | v03   | `EventLoop`: the Reactor itself                                  |
//! | [`closing`]     | v03   | `close_gracefully`: how every healthy connection ends            |
//! | [`signal`]      | v03   | Ctrl-C, SIGTERM and SIGHUP as one more fd of the loop            |
//! | [`lines`]       | v04   | standard input, line by line, on the event loop                  |
//! | [`message`]     | v04   | the codec: encodes and decodes TLV frames                        |
//! | [`bell`]        | v05   | `Bell`: wakes a loop that sleeps                                 |
//! | [`limit`]       | v05   | limits on the number of clients, and on the time they take       |
//! | [`tcp_conn`]    | v05   | `TcpConn`: one connection that carries messages                  |
//! | [`router`]      | v06   | `MsgRouter`: finds the callback for each kind of message         |
//! | [`tcp_client`]  | v06   | `TcpClient`: the other end, with the same connection and router  |
//! | [`hooks`]       | v07   | `Hooks`: callbacks for the start and the end of each connection  |
//! | [`mailbox`]     | v08   | `Mailbox`: how other threads reach an event loop                 |
//! | `config`        | v09   | `Config`: the options, also from an INI file                     |
//! | [`udp`]         | v10   | `UdpServer`, `UdpClient`: messages without a connection          |
//! | [`task`]        | v11   | `Task`: a closure for the loop of another thread                 |
//! | [`executor`]    | v13   | `Runtime`: async tasks on the same event loop                    |

#![warn(missing_docs)]

#[cfg(not(target_os = "linux"))]
compile_error!(
    "this course is about epoll, which only Linux has: \
     build it in WSL2, in a Linux container or in a virtual machine"
);

#[cfg(target_os = "linux")]
pub mod bell;
#[cfg(target_os = "linux")]
pub mod buf_pool;
#[cfg(target_os = "linux")]
pub mod cli;
#[cfg(target_os = "linux")]
pub mod closing;
#[cfg(all(target_os = "linux", feature = "config"))]
pub mod config;
#[cfg(target_os = "linux")]
pub mod event_loop;
#[cfg(target_os = "linux")]
pub mod executor;
#[cfg(target_os = "linux")]
pub mod hooks;
#[cfg(target_os = "linux")]
pub mod io_buf;
#[cfg(target_os = "linux")]
pub mod limit;
#[cfg(target_os = "linux")]
pub mod lines;
#[cfg(target_os = "linux")]
pub mod log;
#[cfg(target_os = "linux")]
pub mod mailbox;
#[cfg(target_os = "linux")]
pub mod message;
#[cfg(target_os = "linux")]
pub mod net;
#[cfg(target_os = "linux")]
pub mod reactor_buf;
#[cfg(target_os = "linux")]
pub mod router;
#[cfg(target_os = "linux")]
pub mod signal;
#[cfg(target_os = "linux")]
pub mod task;
#[cfg(target_os = "linux")]
pub mod tcp_client;
#[cfg(target_os = "linux")]
pub mod tcp_conn;
#[cfg(target_os = "linux")]
pub mod udp;
