//! `casemate vm attach` and `casemate vm detach`: a disk or a network card of a running guest.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use clap::Args;

use super::absolute;
use super::limits::LimitArgs;
use crate::agent::api::{Attach, DeviceName, DiskAttach, Failure, NetAttach, Request};
use crate::machine::plan::DiskFormat;

/// A device, and what it is on this host.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("device").required(true))]
pub struct AttachArgs {
    /// The guest's name.
    name: String,
    /// A disk of this name: 1 to 20 of a-z, 0-9 and '-'. The guest reads it as its serial number.
    #[arg(long, group = "device", value_name = "ID", requires = "path")]
    disk: Option<String>,
    /// Its image, or a block device.
    #[arg(long, value_name = "FILE", conflicts_with = "net")]
    path: Option<PathBuf>,
    /// The image is QEMU's qcow2; otherwise its bytes are the disk's.
    #[arg(long, conflicts_with = "net")]
    qcow2: bool,
    /// The guest may not write.
    #[arg(long, conflicts_with = "net")]
    read_only: bool,
    /// A network card of this name.
    #[arg(long, group = "device", value_name = "ID")]
    net: Option<String>,
    /// Its tap device, made where there is none; by default one that is made.
    #[arg(long, value_name = "NAME", conflicts_with = "disk")]
    tap: Option<String>,
    /// Bridge that the tap is put on.
    #[arg(long, value_name = "NAME", conflicts_with = "disk")]
    bridge: Option<String>,
    /// Its address; by default one under 52:54:00.
    #[arg(long, value_name = "MAC", conflicts_with = "disk")]
    mac: Option<String>,
    /// IPv4 address that is announced after a move; may stand several times.
    #[arg(long, value_name = "ADDRESS", conflicts_with = "disk")]
    announce: Vec<Ipv4Addr>,
    #[command(flatten)]
    limits: LimitArgs,
}

impl AttachArgs {
    /// What the agent is asked.
    pub fn request(self) -> Result<Request, Failure> {
        let limits = self.limits.limits();
        let device = match (self.disk, self.path, self.net) {
            (Some(id), Some(path), None) => Attach::Disk(DiskAttach {
                id,
                path: absolute(&path)?,
                format: if self.qcow2 {
                    DiskFormat::Qcow2
                } else {
                    DiskFormat::Raw
                },
                read_only: self.read_only,
                limits,
            }),
            (None, None, Some(id)) => Attach::Net(NetAttach {
                id,
                tap: self.tap,
                bridge: self.bridge,
                mac: self.mac,
                announce: self.announce,
                limits,
            }),
            _ => {
                let text =
                    "name a disk with its --path, or a card; see `casemate vm attach --help`";
                return Err(Failure::new("USAGE", text));
            }
        };
        Ok(Request::Attach {
            name: self.name,
            device,
        })
    }
}

/// A device that was attached.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("device").required(true))]
pub struct DetachArgs {
    /// The guest's name.
    name: String,
    /// This disk.
    #[arg(long, group = "device", value_name = "ID")]
    disk: Option<String>,
    /// This network card.
    #[arg(long, group = "device", value_name = "ID")]
    net: Option<String>,
    /// How long the guest has to let go of it; 15 by default.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u32>,
}

impl DetachArgs {
    /// What the agent is asked.
    pub fn request(self) -> Result<Request, Failure> {
        let device = match (self.disk, self.net) {
            (Some(id), None) => DeviceName::Disk(id),
            (None, Some(id)) => DeviceName::Net(id),
            _ => return Err(Failure::new("USAGE", "name a disk or a card")),
        };
        Ok(Request::Detach {
            name: self.name,
            device,
            timeout_s: self.timeout,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::agent::api::Rate;

    #[derive(Parser)]
    enum Line {
        Attach(AttachArgs),
        Detach(DetachArgs),
    }

    fn asked(words: &str) -> Option<Request> {
        let words = std::iter::once("vm").chain(words.split(' '));
        match Line::try_parse_from(words).ok()? {
            Line::Attach(args) => args.request().ok(),
            Line::Detach(args) => args.request().ok(),
        }
    }

    #[test]
    fn a_disk_wants_its_image_and_a_card_only_its_name() {
        let limited = "attach vm --disk d --path /i --qcow2 --read-only --operations-per-second 7";
        let Some(Request::Attach {
            name,
            device: Attach::Disk(disk),
        }) = asked(limited)
        else {
            panic!("{limited}");
        };
        assert_eq!((name.as_str(), disk.id.as_str()), ("vm", "d"));
        assert_eq!(disk.path, PathBuf::from("/i"));
        assert!(disk.read_only && disk.format == DiskFormat::Qcow2);
        let seven = Rate {
            per_second: 7,
            burst: 7,
        };
        assert_eq!(
            (disk.limits.operations, disk.limits.bytes),
            (Some(seven), None)
        );
        let Some(Request::Attach {
            device: Attach::Net(net),
            ..
        }) = asked("attach vm --net n --tap t --announce 10.0.0.1 --announce 10.0.0.2")
        else {
            panic!("a card");
        };
        assert_eq!((net.tap.as_deref(), net.announce.len()), (Some("t"), 2));
        let Some(Request::Detach {
            device, timeout_s, ..
        }) = asked("detach vm --net n --timeout 3")
        else {
            panic!("detach");
        };
        assert_eq!((device, timeout_s), (DeviceName::Net("n".into()), Some(3)));
        for wrong in [
            "attach vm",
            "attach vm --disk d",
            "attach vm --path /i",
            "attach vm --disk d --path /i --net n",
            "attach vm --net n --path /i",
            "attach vm --net n --read-only",
            "attach vm --disk d --path /i --tap t",
            "attach vm --disk d --path /i --bytes-burst 1~MiB",
            "detach vm",
            "detach vm --disk d --net n",
        ] {
            assert!(asked(wrong).is_none(), "{wrong}");
        }
    }
}
