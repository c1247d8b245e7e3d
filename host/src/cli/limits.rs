//! How much a disk or a card may do, on the command line.

use clap::Args;

use crate::agent::api::{Limits, Rate};
use crate::machine::spec::parse_size;

/// Limits; what is not given is not limited.
#[derive(Debug, Args)]
pub struct LimitArgs {
    /// Most bytes a second, read and written together.
    #[arg(long, group = "limits", value_name = "SIZE", value_parser = size)]
    bytes_per_second: Option<u64>,
    /// Bytes that may pass at once after a rest; by default those of a second.
    #[arg(long, value_name = "SIZE", value_parser = size, requires = "bytes_per_second")]
    bytes_burst: Option<u64>,
    /// Most requests, or frames, a second.
    #[arg(long, group = "limits", value_name = "COUNT")]
    operations_per_second: Option<u64>,
    /// Requests, or frames, that may pass at once after a rest; by default those of a second.
    #[arg(long, value_name = "COUNT", requires = "operations_per_second")]
    operations_burst: Option<u64>,
}

impl LimitArgs {
    /// As the agent wants them.
    pub fn limits(&self) -> Limits {
        let rate = |per_second: Option<u64>, burst: Option<u64>| {
            per_second.map(|per_second| Rate {
                per_second,
                burst: burst.unwrap_or(per_second),
            })
        };
        Limits {
            bytes: rate(self.bytes_per_second, self.bytes_burst),
            operations: rate(self.operations_per_second, self.operations_burst),
        }
    }
}

/// `512 MiB` or `2 GiB`.
pub fn size(text: &str) -> Result<u64, String> {
    parse_size(text).ok_or_else(|| "want a size such as \"512 MiB\" or \"2 GiB\"".to_owned())
}
