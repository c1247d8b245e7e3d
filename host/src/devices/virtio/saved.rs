//! Device state as bytes: one version byte, then postcard. What comes back from another host is not believed.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::RestoreError;

/// The state as `version` writes it.
pub(super) fn encode<T: Serialize>(version: u8, state: &T) -> Vec<u8> {
    // Only a type that cannot be written at all fails here; its empty state is refused by `decode`.
    postcard::to_extend(state, vec![version]).unwrap_or_default()
}

/// The state of `device`, if these bytes are exactly what `version` writes.
pub(super) fn decode<T: DeserializeOwned>(
    device: &'static str,
    version: u8,
    bytes: &[u8],
) -> Result<T, RestoreError> {
    let refuse = |reason: String| RestoreError { device, reason };
    if bytes.len() > MAX_STATE {
        return Err(refuse(format!(
            "{} bytes, at most {MAX_STATE} are accepted",
            bytes.len()
        )));
    }
    let (found, body) = bytes.split_first().ok_or_else(|| refuse("empty".into()))?;
    if *found != version {
        return Err(refuse(format!(
            "version {found}, this host reads {version}"
        )));
    }
    let (state, rest) =
        postcard::take_from_bytes(body).map_err(|error| refuse(error.to_string()))?;
    if !rest.is_empty() {
        return Err(refuse(format!("{} bytes too many", rest.len())));
    }
    Ok(state)
}

const MAX_STATE: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_exact_bytes_are_read() {
        let bytes = encode(1, &(7u32, true));
        assert_eq!(bytes, [1, 7, 1]);
        assert_eq!(
            decode::<(u32, bool)>("x", 1, &bytes).expect("round trip"),
            (7, true)
        );
        for wrong in [
            &[][..],
            &[2, 7, 1],
            &[1, 7],
            &[1, 7, 1, 0],
            &[1, 7, 9],
            &[1; MAX_STATE + 1],
        ] {
            assert!(decode::<(u32, bool)>("x", 1, wrong).is_err(), "{wrong:?}");
        }
    }
}
