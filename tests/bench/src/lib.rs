//! What the benchmarks of whole guests have in common.

pub mod host;

use std::time::Duration;

/// How long a guest may take to its first line.
pub const PATIENCE: Duration = Duration::from_secs(40);
