//! What the kernel command line says to this program: every option begins with `casemate.`.
//!
//! | Option | Default | Meaning |
//! | --- | --- | --- |
//! | `casemate.secret=0xGPA,0xSIZE` | none | the reserved range the launch secret is injected to |
//! | `casemate.snp=0xGPA,0xGPA` | none | not ours: tells `casemate-agent` where the SEV-SNP pages are |
//! | `casemate.ip=10.77.0.10/24` | none | the address of `eth0` |
//! | `casemate.dirty_mib=N` | 32 | memory under the self-checking pattern; 0 for none |
//! | `casemate.dirty_pages_per_tick=N` | 256 | pages rewritten every 100 ms |
//! | `casemate.load=10.77.0.1` | none | no workload; disk and card are measured once, with the host that listens there |
//! | `casemate.exit=poweroff\|reboot\|halt` | poweroff | what the `poweroff` request does |

use std::net::Ipv4Addr;

/// The parsed options.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) secret: Option<SecretRange>,
    pub(crate) address: Option<Address>,
    pub(crate) dirty_mib: u32,
    pub(crate) dirty_pages_per_tick: u32,
    pub(crate) exit: Exit,
    /// Where the host listens that the devices are measured with.
    pub(crate) load: Option<Ipv4Addr>,
    /// Options that were not understood.
    pub(crate) problems: Vec<String>,
}

/// Guest physical range of the launch secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SecretRange {
    pub(crate) gpa: u64,
    pub(crate) size: usize,
}

/// An IPv4 address with its prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) ip: Ipv4Addr,
    pub(crate) prefix: u8,
}

impl Address {
    pub(crate) fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from(
            u32::MAX
                .checked_shl(32 - u32::from(self.prefix))
                .unwrap_or(0),
        )
    }
}

/// How the guest goes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    Poweroff,
    Reboot,
    Halt,
}

impl Options {
    pub(crate) fn from_command_line(line: &str) -> Self {
        let mut options = Self {
            secret: None,
            address: None,
            dirty_mib: 32,
            dirty_pages_per_tick: 256,
            exit: Exit::Poweroff,
            load: None,
            problems: Vec::new(),
        };
        for word in line
            .split_ascii_whitespace()
            .filter_map(|word| word.strip_prefix("casemate."))
        {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            if options.set(name, value).is_none() {
                options.problems.push(format!("casemate.{word}"));
            }
        }
        options
    }

    fn set(&mut self, name: &str, value: &str) -> Option<()> {
        match name {
            "secret" => {
                let (gpa, size) = value.split_once(',')?;
                let size = usize::try_from(hexadecimal(size)?).ok()?;
                self.secret = Some(SecretRange {
                    gpa: hexadecimal(gpa)?,
                    size: Some(size).filter(|s| (4..=MAX_SECRET).contains(s))?,
                });
            }
            "ip" => {
                let (ip, prefix) = value.split_once('/')?;
                let prefix = prefix.parse().ok().filter(|prefix| *prefix <= 32)?;
                self.address = Some(Address {
                    ip: ip.parse().ok()?,
                    prefix,
                });
            }
            // The agent's: where the SEV-SNP pages are.
            "snp" => {}
            "load" => self.load = Some(value.parse().ok()?),
            "dirty_mib" => self.dirty_mib = value.parse().ok()?,
            "dirty_pages_per_tick" => self.dirty_pages_per_tick = value.parse().ok()?,
            "exit" => {
                self.exit = match value {
                    "poweroff" => Exit::Poweroff,
                    "reboot" => Exit::Reboot,
                    "halt" => Exit::Halt,
                    _ => return None,
                }
            }
            _ => return None,
        }
        Some(())
    }
}

/// The largest range that is read for a secret.
const MAX_SECRET: usize = 1 << 20;

fn hexadecimal(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_line_parses() {
        let options = Options::from_command_line(
            "console=ttyS0 quiet casemate.secret=0x1f000000,0x1000 casemate.ip=10.77.0.10/24 casemate.dirty_mib=8 \
             casemate.dirty_pages_per_tick=10 casemate.exit=reboot casemate.load=10.77.0.1\n",
        );
        assert_eq!(
            options.secret,
            Some(SecretRange {
                gpa: 0x1f00_0000,
                size: 0x1000
            })
        );
        let address = options.address.unwrap();
        assert_eq!(
            (address.ip.to_string(), address.mask().to_string()),
            ("10.77.0.10".into(), "255.255.255.0".into())
        );
        assert_eq!(
            (
                options.dirty_mib,
                options.dirty_pages_per_tick,
                options.exit
            ),
            (8, 10, Exit::Reboot)
        );
        assert_eq!(options.load, Some(Ipv4Addr::new(10, 77, 0, 1)));
        assert!(options.problems.is_empty());
    }

    #[test]
    fn masks_reach_from_end_to_end() {
        let mask = |prefix| {
            Address {
                ip: Ipv4Addr::LOCALHOST,
                prefix,
            }
            .mask()
            .to_string()
        };
        assert_eq!(
            (mask(0), mask(8), mask(32)),
            (
                "0.0.0.0".into(),
                "255.0.0.0".into(),
                "255.255.255.255".into()
            )
        );
    }

    #[test]
    fn what_is_not_understood_is_reported_and_ignored() {
        for bad in [
            "secret=1000,0x10",
            "secret=0x1,0x3",
            "secret=0x1,0xffffffff",
            "ip=1.2.3.4",
            "ip=1.2.3.4/33",
            "dirty_mib=-1",
            "exit=no",
            "load=",
            "what",
            "what=1",
        ] {
            let options = Options::from_command_line(&format!("casemate.{bad}"));
            assert_eq!(options.problems, [format!("casemate.{bad}")]);
            assert_eq!(
                (options.secret, options.address, options.dirty_mib),
                (None, None, 32)
            );
        }
    }
}
