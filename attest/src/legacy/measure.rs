//! The launch measure: the platform's proof, keyed with the owner's session, of what it loaded.

use super::policy::{ApiVersion, GuestPolicy};
use crate::bytes;
use crate::measure::LaunchDigest;
use ring::hmac;
use serde::{Deserialize, Serialize};

/// What LAUNCH_MEASURE returns: the measure and the nonce in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeasureBlob {
    /// HMAC-SHA256 under the TIK.
    pub measure: [u8; 32],
    /// The platform's nonce.
    pub mnonce: [u8; 16],
}

/// Why bytes are no measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a launch measure has {MEASURE_LEN} bytes, this one has {0}")]
pub struct MeasureError(usize);

impl MeasureBlob {
    /// Parses exactly [`MEASURE_LEN`] bytes: measure ‖ mnonce.
    pub fn from_bytes(raw: &[u8]) -> Result<Self, MeasureError> {
        let wrong = MeasureError(raw.len());
        if raw.len() != MEASURE_LEN {
            return Err(wrong);
        }
        Ok(Self {
            measure: bytes::array(raw, 0).ok_or(wrong)?,
            mnonce: bytes::array(raw, 32).ok_or(wrong)?,
        })
    }

    /// measure ‖ mnonce.
    pub fn to_bytes(&self) -> [u8; MEASURE_LEN] {
        let mut raw = [0; MEASURE_LEN];
        for (to, from) in raw
            .iter_mut()
            .zip(self.measure.into_iter().chain(self.mnonce))
        {
            *to = from;
        }
        raw
    }
}

/// The measure that firmware of this version returns for `digest`.
pub(crate) fn launch_measure(
    tik: &hmac::Key,
    api: ApiVersion,
    build: u8,
    policy: GuestPolicy,
    digest: &LaunchDigest,
    mnonce: &[u8; 16],
) -> [u8; 32] {
    let mut mac = hmac::Context::with_key(tik);
    if api >= VERSIONED_SINCE {
        mac.update(&[0x04, api.major, api.minor, build]);
    }
    mac.update(&policy.to_le_bytes());
    mac.update(digest.as_bytes());
    mac.update(mnonce);
    let mut measure = [0; 32];
    measure.copy_from_slice(mac.sign().as_ref());
    measure
}

/// Length of a launch measure.
pub const MEASURE_LEN: usize = 48;

/// Firmware before this version measured neither a context byte nor its own version.
const VERSIONED_SINCE: ApiVersion = ApiVersion::new(0, 17);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::LaunchDigester;

    fn hex_array<const N: usize>(text: &str) -> [u8; N] {
        hex::decode(text).unwrap().try_into().unwrap()
    }

    /// A measure from real firmware 0.18 build 15, from the `sev` crate's session test.
    #[test]
    fn real_firmwares_measure_is_reproduced() {
        let tik: [u8; 16] = hex_array("66320db73158a35a255d051758e95ed4");
        let tik = hmac::Key::new(hmac::HMAC_SHA256, &tik);
        let measure = |api, build| {
            launch_measure(
                &tik,
                api,
                build,
                GuestPolicy::from_raw(0).unwrap(),
                &LaunchDigester::new().finish(),
                &hex_array("4fbe0bedbad6c86ae8f68971d103e554"),
            )
        };
        assert_eq!(
            hex::encode(measure(ApiVersion::new(0, 0x12), 15)),
            "6faab2daae389bcd3405a05d6cafe33c0414f7bedd0bae19ba5f38b7fd1664ea"
        );
        assert_ne!(
            measure(ApiVersion::new(0, 0x12), 15),
            measure(ApiVersion::new(0, 0x12), 14)
        );
        assert_eq!(
            measure(ApiVersion::new(0, 16), 1),
            measure(ApiVersion::new(0, 16), 2)
        );
    }

    #[test]
    fn blobs_round_trip_whole() {
        let blob = MeasureBlob {
            measure: [1; 32],
            mnonce: [2; 16],
        };
        assert_eq!(MeasureBlob::from_bytes(&blob.to_bytes()), Ok(blob));
        assert_eq!(MeasureBlob::from_bytes(&[0; 47]), Err(MeasureError(47)));
    }
}
