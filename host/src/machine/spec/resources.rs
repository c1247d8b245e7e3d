//! `[resources]`: how much of the host's processors and block devices a guest may take. A matter of the host that it runs on: it does not
//! move with the guest.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::Deserialize;
use toml::Spanned;

use super::document::Size;
use super::{Reader, SpecError};
use crate::sandbox::io_limit::IoLimits;
use crate::sandbox::jail::CpuShare;

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Resources {
    /// Percent of one processor.
    #[schemars(with = "Option<u32>", range(min = 1, max = 100_000))]
    cpu_percent: Option<Spanned<u32>>,
    /// Weight against other guests; 100 is usual.
    #[schemars(with = "Option<u32>", range(min = 1, max = 10_000))]
    cpu_weight: Option<Spanned<u32>>,
    /// The processors that it may run on, such as "0-3,8".
    #[schemars(with = "Option<String>")]
    cpus: Option<Spanned<String>>,
    /// Most of each block device beneath its disks (cgroup v2's `io.max`).
    pub(super) io_max: Option<IoMax>,
}

/// Limits of a block device; what is not given is not limited.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct IoMax {
    /// Bytes read a second, such as "100 MiB".
    #[schemars(with = "Option<Size>")]
    read_bytes_per_second: Option<Spanned<String>>,
    /// Bytes written a second.
    #[schemars(with = "Option<Size>")]
    write_bytes_per_second: Option<Spanned<String>>,
    /// Reads a second.
    #[schemars(with = "Option<u64>")]
    reads_per_second: Option<Spanned<u64>>,
    /// Writes a second.
    #[schemars(with = "Option<u64>")]
    writes_per_second: Option<Spanned<u64>>,
    /// Whether a host that cannot enforce them refuses the guest; else the guest's sandbox report says so.
    #[serde(default)]
    required: bool,
}

impl Reader<'_> {
    pub(super) fn resources(&self, value: Resources) -> Result<CpuShare, SpecError> {
        let within = |key: &str, value: Option<Spanned<u32>>, most: u32| {
            let Some(value) = value else { return Ok(None) };
            let found = *value.get_ref();
            if (1..=most).contains(&found) {
                return Ok(Some(found));
            }
            let problem = format!("`resources.{key}` is {found}; want 1 to {most}");
            Err(self.at(value.span(), problem))
        };
        let cpus = value.cpus.map(|text| {
            parse_list(text.get_ref()).ok_or_else(|| {
                let problem = format!(
                    "`resources.cpus` is {:?}; want processors such as \"0-3,8\", below {MAX_CPU}",
                    text.get_ref()
                );
                self.at(text.span(), problem)
            })
        });
        Ok(CpuShare {
            percent: within("cpu_percent", value.cpu_percent, MAX_PERCENT)?,
            weight: within("cpu_weight", value.cpu_weight, MAX_WEIGHT)?,
            cpus: cpus.transpose()?.unwrap_or_default(),
        })
    }
}

impl Reader<'_> {
    pub(super) fn io_max(&self, value: IoMax) -> Result<IoLimits, SpecError> {
        let key = |name: &str| format!("resources.io_max.{name}");
        let size = |name: &str, value| Ok(self.size(&key(name), value)?.map(|(n, _)| n));
        let number = |name: &str, value| Ok(self.number(&key(name), value)?.map(|(n, _)| n));
        Ok(IoLimits {
            read_bytes: size("read_bytes_per_second", value.read_bytes_per_second)?,
            write_bytes: size("write_bytes_per_second", value.write_bytes_per_second)?,
            reads: number("reads_per_second", value.reads_per_second)?,
            writes: number("writes_per_second", value.writes_per_second)?,
            required: value.required,
        })
    }
}

/// `0-3,8` as the set of its members; none if it is no such list, or an empty one.
fn parse_list(text: &str) -> Option<BTreeSet<u16>> {
    let mut all = BTreeSet::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.trim().parse::<u16>().ok();
        let (first, last) = (number(first)?, number(last)?);
        if first > last || last >= MAX_CPU {
            return None;
        }
        all.extend(first..=last);
    }
    Some(all)
}

/// As many as a kernel's `cpu_set_t` names.
const MAX_CPU: u16 = 1024;
/// A thousand processors.
const MAX_PERCENT: u32 = 100_000;
/// cgroup v2's largest `cpu.weight`.
const MAX_WEIGHT: u32 = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors_are_read_and_nonsense_is_not() {
        let list = |text| parse_list(text).map(|set| set.into_iter().collect::<Vec<_>>());
        assert_eq!(list("0"), Some(vec![0]));
        assert_eq!(list("0-2, 5,1"), Some(vec![0, 1, 2, 5]));
        for wrong in ["", ",", "2-1", "a", "-1", "1-", "1024", "0-99999", "1,,2"] {
            assert_eq!(list(wrong), None, "{wrong}");
        }
    }
}
