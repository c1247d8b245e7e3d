//! What a program of this name reads and writes where another version of it may be at the other end.

use serde::{Deserialize, Serialize};

/// What a program says of itself: `casemate internal formats`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Formats {
    /// Its version.
    pub version: String,
    /// [`VMM_PROTOCOL`](crate::vmm::protocol::VMM_PROTOCOL).
    pub vmm_protocol: u16,
    /// Version of [`MACHINE_STATE`](crate::machine::saved::MACHINE_STATE).
    pub machine_state: u16,
}

/// This program's, as it says them. The numbers are those of the code, which a test compares.
pub const FORMATS: &str = concat!(
    "{\"version\":\"",
    env!("CARGO_PKG_VERSION"),
    "\",\"vmm_protocol\":1,\"machine_state\":4}"
);

impl Formats {
    /// What a program said; nothing else may be around it but a line end.
    pub fn parse(text: &str) -> Option<Self> {
        let formats: Self = serde_json::from_str(text.trim_end()).ok()?;
        let plain = |c: char| c.is_ascii_alphanumeric() || ".-+".contains(c);
        let sane = (1..=64).contains(&formats.version.len()) && formats.version.chars().all(plain);
        sane.then_some(formats)
    }

    /// This program's.
    pub fn here() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            vmm_protocol: crate::vmm::protocol::VMM_PROTOCOL,
            machine_state: crate::machine::saved::MACHINE_STATE.version,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_what_the_code_does() {
        assert_eq!(Formats::parse(FORMATS), Some(Formats::here()));
    }

    #[test]
    fn what_is_no_answer_is_none() {
        for wrong in [
            "",
            "casemate 0.1.0",
            "{}",
            "{\"version\":\"\",\"vmm_protocol\":1,\"machine_state\":3}",
            "{\"version\":\"a\\nb\",\"vmm_protocol\":1,\"machine_state\":3}",
            "{\"version\":\"1\",\"vmm_protocol\":70000,\"machine_state\":3}",
        ] {
            assert_eq!(Formats::parse(wrong), None, "{wrong}");
        }
    }
}
