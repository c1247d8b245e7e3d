//! The guest.
fn main() {}
