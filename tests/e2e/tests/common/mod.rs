//! A world for one lab test, and rubbish to throw at it.
#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]

pub mod debian;
pub mod lone;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use casemate_crypto_migrate::tls;
use casemate_e2e::cleanup::Cleanup;
use casemate_e2e::guest_watch::verify;
use casemate_e2e::site::Site;
use casemate_e2e::world::{Extent, Host, Product, World};

pub fn product() -> Product {
    Product::from_env().unwrap()
}

pub fn folder(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("casemate-{name}-{}", std::process::id()))
}

pub fn world(name: &str, extent: Extent) -> World {
    World::build(&product(), &folder(name), &Cleanup::new(), extent).unwrap()
}

/// All memory pages and disk blocks of the guest are what they should be.
pub fn assert_intact(world: &World, host: Host, guest: &str) {
    let verified = verify(&world.status(host, guest).unwrap().vsock.unwrap()).unwrap();
    assert!(
        verified.ok && verified.pages_checked > 0 && verified.blocks_checked > 0,
        "{verified:?}"
    );
}

/// Nothing is left of the world.
pub fn assert_ends_clean(world: World) {
    assert_eq!(world.end().unwrap(), Vec::<String>::new());
}

/// Sends bytes to a migration port and waits until the other side closes; returns how long that took.
pub fn throw(from: &Site, to: (Ipv4Addr, u16), bytes: &[u8]) -> Duration {
    let begun = Instant::now();
    let mut stream = from
        .namespace()
        .run(|| TcpStream::connect(SocketAddr::from(to)))
        .unwrap()
        .unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    // It may be closed while we still write.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
            panic!("not closed within {DEADLINE:?}")
        }
        _ => begun.elapsed(),
    }
}

/// As a gateway in good standing, sends bytes inside TLS; returns the code by which the TLS or the frame is refused.
pub fn throw_inside_tls(world: &World, to: (Ipv4Addr, u16), bytes: &[u8]) {
    let local = &world.relay_local;
    let stream = world
        .network
        .relay
        .run(|| TcpStream::connect(SocketAddr::from(to)))
        .unwrap()
        .unwrap();
    let mut tls = tls::connect(stream, local, DEADLINE).unwrap();
    let deadline = Instant::now() + DEADLINE;
    tls.write_all(&mut bytes.to_vec(), deadline).unwrap();
    let mut byte = [0; 1];
    while let Ok(()) = tls.read_exact(&mut byte, deadline, &|| false) {}
    assert!(Instant::now() < deadline, "not closed within {DEADLINE:?}");
}

/// Waits until the agent's log speaks of a code.
pub fn assert_logged(site: &Site, code: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let log = || std::fs::read_to_string(site.folder().join("agent.log")).unwrap();
    while !log().contains(code) {
        assert!(
            Instant::now() < deadline,
            "{code} is not in the log:\n{}",
            log()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What the lab's runner ships where `cargo verify` has made it.
pub fn shipped(name: &str) -> PathBuf {
    let path = std::env::var_os(name);
    path.unwrap_or_else(|| panic!("{name} is not set; run this through `cargo verify`"))
        .into()
}

/// An image as `qemu-img create -f qcow2` makes it: header, reference counts, an empty first table.
pub fn empty_qcow2(size: u64) -> Vec<u8> {
    let mut image = vec![0; 4 << 16];
    let mut set = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    set(0, b"QFI\xfb\0\0\0\x03");
    set(20, &16u32.to_be_bytes());
    set(24, &size.to_be_bytes());
    set(36, &1u32.to_be_bytes());
    set(40, &0x3_0000u64.to_be_bytes());
    set(48, &0x1_0000u64.to_be_bytes());
    set(56, &1u32.to_be_bytes());
    set(96, &4u32.to_be_bytes());
    set(100, &104u32.to_be_bytes());
    set(0x1_0000, &0x2_0000u64.to_be_bytes());
    (0..4).for_each(|n| set(0x2_0000 + n * 2, &[0, 1]));
    image
}

/// The product's own deadlines are shorter.
pub const DEADLINE: Duration = Duration::from_secs(40);
