//! `[resources]`: how much of the host's processors a guest may take. A matter of the host that it runs on: it does not
//! move with the guest.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::Deserialize;
use toml::Spanned;

use super::{Reader, SpecError};
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
