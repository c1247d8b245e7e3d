//! Address space identifiers: one guest each.

use super::FirmwareError;

/// What ACTIVATE checks before a guest that holds `held` gets `asid`, 1 to `highest`; `owned` says
/// whether another guest has it.
pub(super) fn free(
    held: Option<u32>,
    asid: u32,
    highest: u32,
    owned: bool,
) -> Result<u32, FirmwareError> {
    if held.is_some() {
        return Err(FirmwareError::Active);
    }
    if asid == 0 || asid > highest {
        return Err(FirmwareError::InvalidAsid);
    }
    if owned {
        return Err(FirmwareError::AsidOwned);
    }
    Ok(asid)
}
