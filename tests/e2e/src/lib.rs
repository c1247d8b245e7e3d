//! End to end: two sites, an owner, a guest, an attacker. The demo and the lab tests are written with it.
//!
//! Everything is driven from outside, through the `casemate` command line, the guest's console, its network and its
//! vsock port, as a user would.

pub mod announcement;
pub mod answers;
pub mod cleanup;
pub mod connection;
pub mod demo;
pub mod error;
pub mod forger;
pub mod guest_watch;
pub mod kernel;
pub mod network;
pub mod owner;
pub mod plaintext;
pub mod relay;
pub mod site;
pub mod table;
pub mod world;

mod steps;
mod sys;
