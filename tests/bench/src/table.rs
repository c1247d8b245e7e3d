//! The comparison, for people and for programs.

use anyhow::Result;
use serde_json::json;

use crate::measure::Summary;

/// All that was measured.
pub struct Report {
    pub casemate: Summary,
    /// Of a guest with one disk and one network card.
    pub equipped_rss_mib: f64,
    pub q35: Summary,
    /// Where it boots.
    pub microvm: Option<Summary>,
}

impl Report {
    /// Casemate's wall time as a part of q35's.
    fn q35_ratio(&self) -> f64 {
        self.casemate.wall_s / self.q35.wall_s
    }

    /// One JSON object, or a table.
    pub fn print(&self, as_json: bool) -> Result<()> {
        if as_json {
            let ours = &self.casemate;
            let all = json!({
                "exits": ours.exits,
                "wall_s": ours.wall_s,
                "q35_ratio": self.q35_ratio(),
                "rss_over_guest_mib": self.equipped_rss_mib,
                "start_cpu_ms": ours.start_cpu_ms,
                "casemate": ours,
                "q35": self.q35,
                "microvm": self.microvm,
            });
            println!("{}", serde_json::to_string(&all)?);
            return Ok(());
        }
        println!(
            "VMM            wall s (range)        exits (range)          PIO   MMIO  RSS MiB  CPU ms  to start"
        );
        let rows = [("casemate", &self.casemate), ("qemu q35", &self.q35)];
        let microvm = self.microvm.iter().map(|row| ("qemu microvm", row));
        for (name, row) in rows.into_iter().chain(microvm) {
            println!(
                "{name:<13} {:>5.2} ({:.2}-{:.2})  {:>8} ({}-{})  {:>7} {:>6}  {:>7.1} {:>7.1} {:>9}",
                row.wall_s,
                row.wall_s_min,
                row.wall_s_max,
                row.exits,
                row.exits_min,
                row.exits_max,
                row.io_exits,
                row.mmio_exits,
                row.rss_over_guest_mib,
                row.vmm_cpu_ms,
                row.start_cpu_ms
                    .map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1}"))
            );
        }
        println!("casemate to q35, wall: {:.2}", self.q35_ratio());
        println!(
            "casemate with a disk and a card, RSS beyond guest memory: {:.1} MiB",
            self.equipped_rss_mib
        );
        Ok(())
    }
}
