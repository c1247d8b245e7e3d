//! Bytes that may leave the host: the authenticated, encrypted migration stream.
//!
//! One guest moves over one connection, or over up to 16 of one session. TLS 1.3 with mutual authentication carries frames ([`wire`]);
//! inside and independent of it, every page is sealed end to end ([`page`]) under keys that both hosts agree
//! on and sign ([`session`]), so that a gateway that policy names can forward, but neither read nor change
//! anything. Nothing resumes before both ends hold the same manifest ([`transcript`]).
//!
//! | | |
//! | --- | --- |
//! | [`source::migrate`] | moves a guest away: give it a [`guest::SourceGuest`] |
//! | [`source::migrate_over`] | the same over several connections |
//! | [`source::assess`] | finds out what that would be like, and moves nothing |
//! | [`settlement::settle`] | asks who has a guest whose commit was not answered |
//! | [`destination::serve`] | takes a guest in, or answers an assessment |
//! | [`destination::serve_over`] | the same over several connections |
//! | [`destination::receive`] | takes a guest in: give it a [`guest::DestinationGuest`] |
//! | [`identity`] | who this host is, who is allowed, and the way to them |
//! | [`vault`] | a guest at rest: a file of sealed pages |
//! | [`dev_ca`] | a site authority for development |
//! | [`parts`] | what each part of the stream costs alone, for the benchmark |
//! | [`preamble`] | where a further connection wants to go |
//! | [`gateway`] | forwards, and sees nothing; the attack drill's tool |
//! | [`code`] | the stable codes of every refusal |
//!
//! Blocking I/O on the caller's thread; the transport is a `TcpStream` or `UnixStream`, connected by the
//! caller. Every wait has a deadline. System calls besides memory: `recvfrom`, `writev`/`sendto`,
//! `setsockopt` (timeouts, once), `ioctl(FIONBIO)`, `shutdown`, `getrandom`, `clock_gettime`.
//!
//! `WIRE.md` is the format byte by byte, `THREATS.md` who might attack a move and the test of each claim, `PERFORMANCE.md` what
//! was measured.
//!
//! The example `loopback` moves a toy guest between two threads:
//! `cargo run --release -p casemate-crypto-migrate --example loopback`.
#![forbid(unsafe_code)]

pub mod code;
pub mod control;
pub mod destination;
pub mod dev_ca;
pub mod gateway;
pub mod guest;
pub mod identity;
pub mod page;
pub mod pages;
pub mod parts;
pub mod preamble;
pub mod precopy;
pub mod progress;
pub mod session;
pub mod settlement;
pub mod source;
pub mod tls;
pub mod transcript;
pub mod vault;
pub mod wire;

mod channel;
mod crypto;
#[cfg(test)]
mod rogue_streams_tests;
#[cfg(test)]
mod rogue_tests;
#[cfg(test)]
mod threats;

pub use channel::ChannelError;
pub use crypto::{CryptoError, Provider, SEALS_PER_KEY};
