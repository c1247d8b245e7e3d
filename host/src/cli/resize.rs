//! `casemate vm resize`: which device, and what becomes of it.

use clap::Args;

use super::limits::{LimitArgs, size};
use crate::agent::api::{DeviceChange, DeviceName, Failure, Limits, Request};

/// One device and its change.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("device").required(true))]
pub struct ResizeArgs {
    /// The guest's name.
    name: String,
    /// So much memory the guest shall give back, for example "512 MiB"; "0 MiB" gives all of it to the guest.
    #[arg(long, group = "device", value_name = "SIZE", value_parser = size, conflicts_with = "limits")]
    balloon: Option<u64>,
    /// This disk: without limits, its image has another size now, which the guest is told.
    #[arg(long, group = "device", value_name = "ID")]
    disk: Option<String>,
    /// This network card, which is given other limits.
    #[arg(long, group = "device", value_name = "ID", requires = "limits")]
    net: Option<String>,
    #[command(flatten)]
    limits: LimitArgs,
    /// Take all limits away.
    #[arg(
        long,
        group = "limits",
        conflicts_with_all = ["bytes_per_second", "operations_per_second"]
    )]
    unlimited: bool,
}

impl ResizeArgs {
    /// What the agent is asked. Limits that are given stand in place of all that held.
    pub fn request(self) -> Result<Request, Failure> {
        let limits = self.limits();
        let (device, change) = match (self.balloon, self.disk, self.net, limits) {
            (Some(bytes), ..) => (DeviceName::Balloon, DeviceChange::Balloon(bytes)),
            (_, Some(id), _, None) => (DeviceName::Disk(id), DeviceChange::Resized),
            (_, Some(id), _, Some(limits)) => (DeviceName::Disk(id), DeviceChange::Limits(limits)),
            (_, _, Some(id), Some(limits)) => (DeviceName::Net(id), DeviceChange::Limits(limits)),
            _ => {
                let text = "name a device and what becomes of it; see `casemate vm resize --help`";
                return Err(Failure::new("USAGE", text));
            }
        };
        Ok(Request::Device {
            name: self.name,
            device,
            change: Some(change),
        })
    }

    fn limits(&self) -> Option<Limits> {
        let limits = self.limits.limits();
        (self.unlimited || limits != Limits::default()).then_some(limits)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::agent::api::Rate;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: ResizeArgs,
    }

    fn asked(words: &str) -> Option<(DeviceName, DeviceChange)> {
        let words = words.split('_').map(|word| word.replace('~', " "));
        let line = Line::try_parse_from(std::iter::once("resize".to_owned()).chain(words)).ok()?;
        match line.args.request() {
            Ok(Request::Device { device, change, .. }) => Some((device, change?)),
            _ => None,
        }
    }

    #[test]
    fn each_device_is_asked_for_what_it_can_do_and_nothing_else() {
        let (disk, net) = (DeviceName::Disk("d".into()), DeviceName::Net("n".into()));
        let rate = |per_second, burst| Some(Rate { per_second, burst });
        let mut limits = Limits {
            bytes: rate(10 << 20, 10 << 20),
            operations: None,
        };
        let balloon = DeviceChange::Balloon(64 << 20);
        assert_eq!(
            asked("vm_--balloon_64~MiB"),
            Some((DeviceName::Balloon, balloon))
        );
        let resized = DeviceChange::Resized;
        assert_eq!(asked("vm_--disk_d"), Some((disk.clone(), resized)));
        let change = DeviceChange::Limits(limits);
        assert_eq!(
            asked("vm_--disk_d_--bytes-per-second_10~MiB"),
            Some((disk, change))
        );
        limits.operations = rate(7, 9);
        limits.bytes = None;
        let change = DeviceChange::Limits(limits);
        let words = "vm_--net_n_--operations-per-second_7_--operations-burst_9";
        assert_eq!(asked(words), Some((net.clone(), change)));
        let none = DeviceChange::Limits(Limits::default());
        assert_eq!(asked("vm_--net_n_--unlimited"), Some((net, none)));
        for wrong in [
            "vm",
            "vm_--net_n",
            "vm_--disk_d_--net_n_--unlimited",
            "vm_--balloon_64",
            "vm_--balloon_64~MiB_--unlimited",
            "vm_--disk_d_--bytes-burst_1~MiB",
            "vm_--disk_d_--unlimited_--operations-per-second_7",
        ] {
            assert_eq!(asked(wrong), None, "{wrong}");
        }
    }
}
