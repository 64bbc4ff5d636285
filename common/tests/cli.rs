//! The promises of `cli`.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::net::{Ipv6Addr, SocketAddrV6};

use common::cli::Addr;
use nix::net::if_::if_nametoindex;

#[test]
fn a_link_local_address_has_its_interface_by_name_or_number() {
    let lo = if_nametoindex("lo").unwrap();
    let ip = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
    for text in ["[fe80::1%lo]:7701", &format!("[fe80::1%{lo}]:7701")] {
        let addr: Addr = text.parse().unwrap();
        assert_eq!(addr.resolved(), [SocketAddrV6::new(ip, 7701, 0, lo).into()]);
        assert_eq!(addr.to_string(), text);
    }
}

#[test]
fn an_unknown_interface_is_named() {
    let err = "[fe80::1%nope0]:7701".parse::<Addr>().unwrap_err();
    assert!(err.starts_with("no network interface \"nope0\""), "{err}");
}
