//! SEND and RECEIVE: a guest's pages re-encrypted for one other platform.
//!
//! The target's chain is verified up to its root before a key is wrapped for it. Packets are
//! bound to the session, not to an address or a moment; the stream around them has to do that.

use super::guest::{Command, Guest, GuestState, whole_blocks};
use super::{FirmwareError, Identity};
use crate::legacy::chain::{LegacyChain, TrustAnchors};
use crate::legacy::packet::{Context, PacketCipher, PacketHeader, TransportKeys};
use crate::legacy::policy::{GuestPolicy, PolicyFlag};
use crate::legacy::session::SessionBlob;
use serde::{Deserialize, Serialize};

/// What the receiving platform's RECEIVE_START takes, besides the sender's PDH certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendSession {
    /// The guest's policy.
    pub policy: GuestPolicy,
    /// New transport keys, wrapped for the target.
    pub session: SessionBlob,
}

/// SEND_START, after the platform found the guest.
pub(super) fn send_start(
    identity: &Identity,
    peers: &TrustAnchors,
    guest: &mut Guest,
    target: &LegacyChain,
) -> Result<SendSession, FirmwareError> {
    guest.require(Command::SendStart)?;
    if guest.policy.has(PolicyFlag::NoSend) {
        return Err(FirmwareError::PolicyFailure);
    }
    // Registers would stay behind: no kernel has the commands that carry them.
    if guest.policy.has(PolicyFlag::EncryptedState) {
        return Err(FirmwareError::Unsupported);
    }
    // Stricter than the SEV policy bit asks: no guest goes to a platform without a chain.
    let target = target.verify(peers)?;
    let same_owner = target.oca().public_key() == identity.chain().oca.public_key();
    if guest.policy.has(PolicyFlag::Domain) && !same_owner {
        return Err(FirmwareError::PolicyFailure);
    }
    if guest.policy.min_api() > target.pdh().api() {
        return Err(FirmwareError::PolicyFailure);
    }
    let keys = TransportKeys::random()?;
    let peer = target.pdh().public_key();
    let session = SessionBlob::wrap(identity.pdh_key(), peer, &keys, guest.policy)?;
    guest.outgoing = Some(PacketCipher::new(&keys));
    guest.state = GuestState::SUpdate;
    Ok(SendSession {
        policy: guest.policy,
        session,
    })
}

impl Guest {
    /// SEND_UPDATE_DATA: seals at most one page into a new buffer.
    pub fn send_update_data(
        &mut self,
        page: &[u8],
    ) -> Result<(PacketHeader, Vec<u8>), FirmwareError> {
        let mut ciphertext = vec![0; page.len().min(PAGE_SIZE)];
        let header = self.send_update_data_into(page, &mut ciphertext)?;
        Ok((header, ciphertext))
    }

    /// SEND_UPDATE_DATA into a given buffer, as long as `page`; allocates nothing.
    pub fn send_update_data_into(
        &mut self,
        page: &[u8],
        out: &mut [u8],
    ) -> Result<PacketHeader, FirmwareError> {
        self.require_active(Command::SendUpdateData)?;
        whole_blocks(page.len(), PAGE_SIZE)?;
        let outgoing = self
            .outgoing
            .as_ref()
            .ok_or(FirmwareError::InvalidGuestState)?;
        Ok(outgoing.seal(&Context::Data, page, out)?)
    }

    /// SEND_FINISH: the guest is the target's now; here it can only be decommissioned.
    pub fn send_finish(&mut self) -> Result<(), FirmwareError> {
        self.require(Command::SendFinish)?;
        self.outgoing = None;
        self.state = GuestState::Sent;
        Ok(())
    }

    /// SEND_CANCEL: the guest stays, and the keys wrapped for the target are forgotten.
    pub fn send_cancel(&mut self) -> Result<(), FirmwareError> {
        self.require(Command::SendCancel)?;
        self.outgoing = None;
        self.state = GuestState::Running;
        Ok(())
    }

    /// RECEIVE_UPDATE_DATA: checks a packet and writes it over `memory`, which is exactly as
    /// long. Memory is untouched where the packet is refused.
    pub fn receive_update_data(
        &mut self,
        header: &PacketHeader,
        ciphertext: &[u8],
        memory: &mut [u8],
    ) -> Result<(), FirmwareError> {
        self.require_active(Command::ReceiveUpdateData)?;
        whole_blocks(ciphertext.len(), PAGE_SIZE)?;
        Ok(self
            .session
            .open(&Context::Data, header, ciphertext, memory)?)
    }

    /// RECEIVE_FINISH: the guest may run.
    pub fn receive_finish(&mut self) -> Result<(), FirmwareError> {
        self.require(Command::ReceiveFinish)?;
        self.state = GuestState::Running;
        Ok(())
    }
}

/// The most that one SEND or RECEIVE takes.
const PAGE_SIZE: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::ApiVersion;
    use crate::legacy::chain::EMULATED_ARK_ID;
    use crate::processor::guest::GuestHandle;
    use crate::processor::{Profile, testing};

    #[test]
    fn a_target_older_than_the_policy_asks_is_refused() {
        let old = Identity::generate_as(Profile {
            ark_id: EMULATED_ARK_ID,
            ask_id: [0; 16],
            api: ApiVersion::new(1, 51),
        })
        .unwrap();
        let peers = TrustAnchors::amd()
            .with_emulated_root(old.root_fingerprint())
            .unwrap();
        let send = |min_api| {
            let keys = TransportKeys::random().unwrap();
            let policy = GuestPolicy::new(&[], min_api);
            let mut guest = Guest::new(GuestHandle(1), policy, GuestState::Running, &keys);
            send_start(testing::identity(), &peers, &mut guest, old.chain()).map(|_| guest.state)
        };
        assert_eq!(
            send(ApiVersion::new(1, 52)),
            Err(FirmwareError::PolicyFailure)
        );
        assert_eq!(send(ApiVersion::new(1, 51)), Ok(GuestState::SUpdate));
    }
}
