//! Whether this host has the memory that a guest may come to need.

use std::fs;

use crate::agent::api::Failure;

/// Refuses a guest for which there is no room now. What other guests were promised and have not touched yet counts as
/// free here: the kernel's reserve and each guest's cgroup hold where hosts are overcommitted.
pub fn check(name: &str, memory_bytes: u64, overhead: u64) -> Result<(), Failure> {
    let unknown = |why: String| Failure::new("MEMORY_UNKNOWN", format!("/proc/meminfo: {why}"));
    let text = fs::read_to_string("/proc/meminfo").map_err(|e| unknown(e.to_string()))?;
    let available = available(&text).ok_or_else(|| unknown("says no MemAvailable".to_owned()))?;
    enough(name, memory_bytes.saturating_add(overhead), available)
}

fn enough(name: &str, needed: u64, available: u64) -> Result<(), Failure> {
    if needed <= available {
        return Ok(());
    }
    Err(Failure::new(
        "MEMORY_SHORT",
        format!(
            "{name} needs {} MiB here and {} MiB are available; move another guest away, or choose another host",
            needed >> 20,
            available >> 20
        ),
    ))
}

/// Bytes that can be had without swapping, as the kernel reckons.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_available_decides_to_the_byte() {
        let text = "MemTotal:       24683880 kB\nMemFree:  99 kB\nMemAvailable:   1048576 kB\n";
        let found = available(text).unwrap();
        assert_eq!(found, 1 << 30);
        assert!(enough("vault", 1 << 30, found).is_ok());
        let short = enough("vault", (1 << 30) + 1, found).unwrap_err();
        assert_eq!(short.code, "MEMORY_SHORT");
        assert!(short.error.contains("vault") && short.error.contains("1024 MiB"));
    }

    #[test]
    fn other_texts_are_not_believed() {
        for text in [
            "",
            "MemAvailable: 5 MB",
            "MemAvailable: -5 kB",
            "MemFree: 7 kB",
        ] {
            assert_eq!(available(text), None, "{text}");
        }
    }

    #[test]
    fn no_host_has_room_for_everything() {
        assert!(check("vault", 0, 0).is_ok());
        assert_eq!(
            check("vault", u64::MAX, 1).unwrap_err().code,
            "MEMORY_SHORT"
        );
    }
}
