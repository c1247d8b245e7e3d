//! The guest's half: its first line of user space is also its last.

use std::time::Duration;

/// What the guest says.
pub const MARKER: &str = "bench-boot: user space";

/// The whole init.
pub fn main() -> ! {
    println!("{MARKER}");
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}
