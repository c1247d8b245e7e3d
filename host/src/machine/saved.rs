//! What outlives the program that wrote it, or reaches another one: a tag, the format's version, then the body, bounded.
//!
//! One version is read, the one that is written; of another it is said what to do. A change of what a format holds is a new
//! version, a new golden file (`host/tests/golden`) and a line in STATE.md.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::plan::MachinePlan;

/// One kind of saved thing.
#[derive(Debug)]
pub struct Format {
    /// In words.
    pub name: &'static str,
    /// The first eight bytes.
    pub tag: [u8; 8],
    /// The version behind them, little-endian.
    pub version: u16,
    /// Most bytes, all in all.
    pub max: usize,
}

/// A machine's state. Version 1 knew neither watchdog (2) nor board (3) nor cards with several queues (4).
pub const MACHINE_STATE: Format = Format {
    name: "machine state",
    tag: *b"CSMT-MST",
    version: 4,
    max: crate::vmm::protocol::MAX_STATE,
};

/// A plan on its way to another host. Version 1 had neither tag nor number (2), nor how many queues a card has (3).
pub const PLAN: Format = Format {
    name: "machine plan",
    tag: *b"CSMT-PLN",
    version: 3,
    max: MAX_PLAN,
};

impl Format {
    /// Tag, version, body.
    pub fn encode<T: Serialize>(&self, body: &T) -> Result<Vec<u8>, FormatError> {
        let mut bytes = self.tag.to_vec();
        bytes.extend_from_slice(&self.version.to_le_bytes());
        let bytes =
            postcard::to_extend(body, bytes).map_err(|e| FormatError::Body(self.name, e))?;
        self.bounded(&bytes)?;
        Ok(bytes)
    }

    /// Reads what [`Format::encode`] wrote; nothing may follow.
    pub fn decode<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, FormatError> {
        self.bounded(bytes)?;
        let rest = bytes.strip_prefix(self.tag.as_slice());
        let (version, body) = rest
            .and_then(<[u8]>::split_first_chunk::<2>)
            .ok_or(FormatError::Tag(self.name))?;
        let version = u16::from_le_bytes(*version);
        if version != self.version {
            return Err(FormatError::Version {
                name: self.name,
                found: version,
                here: self.version,
            });
        }
        let (value, rest) =
            postcard::take_from_bytes(body).map_err(|e| FormatError::Body(self.name, e))?;
        if !rest.is_empty() {
            return Err(FormatError::Trailing(self.name, rest.len()));
        }
        Ok(value)
    }

    fn bounded(&self, bytes: &[u8]) -> Result<(), FormatError> {
        if bytes.len() <= self.max {
            return Ok(());
        }
        Err(FormatError::Size {
            name: self.name,
            found: bytes.len(),
            max: self.max,
        })
    }
}

/// A plan as it is offered to another host. With it goes the version of the state that follows when all memory has: a host
/// that could not read that refuses before the first page.
pub fn encode_plan(plan: &MachinePlan) -> Result<Vec<u8>, FormatError> {
    PLAN.encode(&(MACHINE_STATE.version, plan))
}

/// Reads what [`encode_plan`] wrote; what it says is not checked yet.
pub fn decode_plan(bytes: &[u8]) -> Result<MachinePlan, FormatError> {
    let (state, plan) = PLAN.decode::<(u16, MachinePlan)>(bytes)?;
    if state != MACHINE_STATE.version {
        return Err(FormatError::Version {
            name: MACHINE_STATE.name,
            found: state,
            here: MACHINE_STATE.version,
        });
    }
    Ok(plan)
}

/// Bytes that this version cannot read.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// No tag.
    #[error("not a {0}")]
    Tag(&'static str),
    /// Another version.
    #[error("{name} of version {found}; this host reads version {here}, {}", remedy(*found, *here))]
    Version {
        /// Which format.
        name: &'static str,
        /// The version found.
        found: u16,
        /// The version that is read.
        here: u16,
    },
    /// Too long.
    #[error("{name} of {found} bytes is larger than {max}")]
    Size {
        /// Which format.
        name: &'static str,
        /// Bytes found.
        found: usize,
        /// Most bytes.
        max: usize,
    },
    /// The body does not parse.
    #[error("{0} cannot be read")]
    Body(&'static str, #[source] postcard::Error),
    /// Something follows the body.
    #[error("{1} bytes behind the {0}")]
    Trailing(&'static str, usize),
}

impl FormatError {
    /// Whether another version of this program could read it.
    pub fn is_version(&self) -> bool {
        matches!(self, Self::Version { .. })
    }
}

fn remedy(found: u16, here: u16) -> &'static str {
    if found < here {
        "use the casemate that wrote it, or launch the guest anew"
    } else {
        "update its casemate"
    }
}

/// Names, command line, 8 disks and cards with 8 addresses each, and processor bits fit many times.
const MAX_PLAN: usize = 64 << 10;

/// A golden file; with `CASEMATE_GOLDEN=write` it is written anew first, which is for a new version only.
#[cfg(test)]
pub(crate) fn golden(name: &str, now: &[u8]) -> Vec<u8> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    if std::env::var_os("CASEMATE_GOLDEN").is_some_and(|v| v == "write") {
        std::fs::write(folder.join(name), now).unwrap();
    }
    std::fs::read(folder.join(name)).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::cpu::{CpuBaseline, CpuModel, CpuPlan, Topology, XsaveComponent};
    use crate::machine::plan::devices::{
        BalloonPlan, ConsolePlan, DeviceName, HotPlugPlan, Limits, Plugged, Rate, RngPlan,
        SmallDevices, WatchdogAction, WatchdogPlan,
    };
    use crate::machine::plan::{DiskFormat, DiskIo, DiskPlan, FirmwarePlan, NetPlan, Technology};

    const SMALL: Format = Format {
        name: "small thing",
        tag: *b"CSMT-TST",
        version: 2,
        max: 32,
    };

    #[test]
    fn what_is_not_this_version_whole_is_refused_with_what_to_do() {
        let good = SMALL.encode(&(7u32, "text".to_owned())).unwrap();
        let read = |bytes: &[u8]| SMALL.decode::<(u32, String)>(bytes);
        assert_eq!(read(&good).unwrap(), (7, "text".to_owned()));
        let refuse = |bytes: &[u8]| read(bytes).unwrap_err().to_string();
        for length in 0..10 {
            assert_eq!(refuse(&good[..length]), "not a small thing");
        }
        for length in 10..good.len() {
            assert_eq!(refuse(&good[..length]), "small thing cannot be read");
        }
        let at_version = |version| [&good[..8], &[version, 0], &good[10..]].concat();
        assert_eq!(
            refuse(&at_version(1)),
            "small thing of version 1; this host reads version 2, use the casemate that wrote it, or launch the guest anew"
        );
        assert!(refuse(&at_version(3)).ends_with("reads version 2, update its casemate"));
        assert_eq!(
            refuse(&[&good[..], &[0]].concat()),
            "1 bytes behind the small thing"
        );
        assert!(refuse(&[0; 33]).contains("33 bytes is larger than 32"));
        assert!(SMALL.encode(&vec![0u8; 40]).is_err());
    }

    #[test]
    fn a_plan_is_as_its_golden_file_has_it() {
        let bytes = encode_plan(&full()).unwrap();
        let golden = golden("machine-plan-3.bin", &bytes);
        assert_eq!(decode_plan(&golden).unwrap(), full());
        assert!(bytes == golden, "a change of a plan is a new version");
    }

    #[test]
    fn a_plan_whose_state_could_not_be_read_is_refused_before_it() {
        let newer = PLAN.encode(&(MACHINE_STATE.version + 1, full())).unwrap();
        let error = decode_plan(&newer).unwrap_err();
        let text = error.to_string();
        assert!(
            error.is_version() && text.contains("machine state of version 5"),
            "{text}"
        );
        let error = decode_plan(&postcard::to_stdvec(&full()).unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "not a machine plan");
    }

    /// A plan that has everything once.
    fn full() -> MachinePlan {
        let rate = Rate {
            per_second: 1 << 20,
            burst: 1 << 21,
        };
        let limits = Limits {
            bytes: Some(rate),
            operations: Some(rate),
        };
        MachinePlan {
            name: "golden".into(),
            vm_id: [7; 16],
            vcpus: 4,
            cpu: CpuPlan {
                model: CpuModel::EpycRome,
                topology: Some(Topology {
                    sockets: 1,
                    cores: 2,
                    threads: 2,
                }),
                baseline: Some(CpuBaseline {
                    vendor: *b"AuthenticAMD",
                    signature: 0x0083_0f10,
                    words: [0x8000_0001; 12],
                    xsave: vec![XsaveComponent {
                        bit: 2,
                        size: 256,
                        offset: 576,
                    }],
                    tsc_khz: 2_000_000,
                }),
            },
            memory_bytes: 4 << 30,
            firmware: FirmwarePlan::for_image(2 << 20),
            cmdline: "console=ttyS0".into(),
            technology: Technology::SevSnp {
                emulated: true,
                policy: 0x3_0000,
            },
            disks: vec![DiskPlan {
                id: "data".into(),
                format: DiskFormat::Qcow2,
                read_only: true,
                io: DiskIo::Threads,
                limits,
            }],
            nets: vec![NetPlan {
                id: "net0".into(),
                mac: [0x52, 0x54, 0, 0, 0, 1],
                queues: 2,
                announce: vec![[192, 0, 2, 10].into()],
                limits,
            }],
            vsock_cid: Some(3),
            small: SmallDevices {
                rng: Some(RngPlan { bytes: rate }),
                balloon: Some(BalloonPlan {
                    free_page_reporting: true,
                    deflate_on_oom: false,
                }),
                console: Some(ConsolePlan {
                    columns: 80,
                    rows: 25,
                }),
                watchdog: Some(WatchdogPlan {
                    action: WatchdogAction::Report,
                }),
            },
            hotplug: HotPlugPlan {
                slots: 2,
                plugged: vec![Plugged {
                    slot: 1,
                    device: DeviceName::Disk("data".into()),
                }],
            },
        }
    }
}
