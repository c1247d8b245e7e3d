//! The transcript that both hosts sign, and the keys that come of it.

use zeroize::Zeroizing;

use super::{Membership, Session, SessionError, encode};
use crate::channel::STREAM;
use crate::crypto::{
    self, AeadKey, CryptoError, EphemeralKey, KeyChain, KeySchedule, MacKey, Provider,
};
use crate::guest::GuestOffer;
use crate::identity::{HostIdentity, PeerIdentity};
use crate::page::Binding;
use crate::preamble::Ticket;
use crate::tls::{TlsStream, Transport};
use crate::wire::messages::{PathKind, Signed};

/// A secret of the guest's owner, mixed into the keys at both ends; 32 bytes.
pub struct OwnerKey(Zeroizing<[u8; 32]>);

impl OwnerKey {
    /// Takes the key.
    pub fn new(key: [u8; 32]) -> Self {
        Self(Zeroizing::new(key))
    }
}

impl std::fmt::Debug for OwnerKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OwnerKey")
    }
}

pub(super) struct Facts<'a> {
    pub(super) session_id: [u8; 16],
    pub(super) guest: &'a GuestOffer,
    pub(super) path: PathKind,
    pub(super) offer_hash: [u8; 32],
}

impl Facts<'_> {
    pub(super) fn session(
        &self,
        peer: PeerIdentity,
        page_keys: KeyChain,
        evidence: Vec<u8>,
        further: ForFurther,
    ) -> Session {
        Session {
            peer,
            path: self.path,
            binding: self.binding(),
            page_keys,
            offer_hash: self.offer_hash,
            evidence,
            streams: further.streams,
            ticket: further.ticket,
            membership: further.membership,
        }
    }

    /// Of the first connection's stream.
    pub(super) fn binding(&self) -> Binding {
        Binding {
            session_id: self.session_id,
            vm_id: self.guest.vm_id,
            epoch: self.guest.epoch,
            stream: STREAM,
        }
    }

    fn info(&self, label: &str, role: Role) -> Vec<u8> {
        key_info(label, role, &self.binding(), self.path)
    }
}

/// What an agreement leaves for further connections.
pub(super) struct ForFurther {
    pub(super) streams: u16,
    pub(super) ticket: Ticket,
    pub(super) membership: Membership,
}

/// The info of a key: what it is for, and of which stream of which session it is.
pub(super) fn key_info(label: &str, role: Role, binding: &Binding, path: PathKind) -> Vec<u8> {
    let path: &[u8] = match path {
        PathKind::Direct => b"direct",
        PathKind::Gateway => b"gateway",
    };
    let direction: &[u8] = match role {
        Role::Source => b"source to destination",
        Role::Destination => b"destination to source",
    };
    let mut info = b"casemate-migrate/1 key".to_vec();
    let (epoch, stream) = (binding.epoch.to_le_bytes(), binding.stream.to_le_bytes());
    let fields: [&[u8]; 7] = [
        label.as_bytes(),
        &binding.session_id,
        &binding.vm_id,
        path,
        direction,
        &stream,
        &epoch,
    ];
    for field in fields {
        append(&mut info, field);
    }
    info
}

pub(super) struct Keys {
    pub(super) confirm_source: MacKey,
    pub(super) confirm_destination: MacKey,
    pub(super) control_source: AeadKey,
    pub(super) control_destination: AeadKey,
    pub(super) pages: KeyChain,
    /// What the keys of further connections come of.
    pub(super) join: Zeroizing<[u8; 48]>,
}

impl Keys {
    pub(super) fn derive(
        transcript: &[u8; 48],
        secret: &[u8],
        facts: &Facts<'_>,
        provider: Provider,
    ) -> Result<Self, CryptoError> {
        let schedule = KeySchedule::extract(transcript, secret);
        let aead = |label, role| schedule.aead(provider, &facts.info(label, role));
        Ok(Self {
            confirm_source: schedule.mac(&facts.info("confirm", Role::Source))?,
            confirm_destination: schedule.mac(&facts.info("confirm", Role::Destination))?,
            control_source: aead("control", Role::Source)?,
            control_destination: aead("control", Role::Destination)?,
            pages: schedule.chain(provider, &facts.info("page", Role::Source))?,
            join: schedule.secret(&facts.info("join", Role::Source))?,
        })
    }
}

#[derive(Clone, Copy)]
pub(super) enum Role {
    Source,
    Destination,
}

/// The running hash: `H(previous ‖ body)` is signed, `H(that ‖ signature)` goes on.
pub(super) struct Transcript([u8; 48]);

impl Default for Transcript {
    fn default() -> Self {
        Self(crypto::sha384(&[b"casemate-migrate/1 session"]))
    }
}

impl Transcript {
    pub(super) fn hash(&self) -> [u8; 48] {
        self.0
    }

    pub(super) fn sign(
        &mut self,
        body: Vec<u8>,
        role: Role,
        identity: &HostIdentity,
    ) -> Result<Vec<u8>, SessionError> {
        self.absorb(&body);
        let signature = identity.sign(&self.message(role))?;
        self.absorb(&signature);
        encode(&Signed { body, signature })
    }

    pub(super) fn verify(
        &mut self,
        signed: &Signed,
        role: Role,
        peer: &PeerIdentity,
    ) -> Result<(), SessionError> {
        self.absorb(&signed.body);
        peer.verify_signature(&self.message(role), &signed.signature)?;
        self.absorb(&signed.signature);
        Ok(())
    }

    fn message(&self, role: Role) -> Vec<u8> {
        let context: &[u8] = match role {
            Role::Source => b"casemate-migrate/1 transcript, source\0",
            Role::Destination => b"casemate-migrate/1 transcript, destination\0",
        };
        [context, &self.0].concat()
    }

    fn absorb(&mut self, bytes: &[u8]) {
        self.0 = crypto::sha384(&[&self.0, &(bytes.len() as u64).to_le_bytes(), bytes]);
    }
}

/// The input of the key derivation; every part with its length, absent parts with length 0.
pub(super) fn secret<T: Transport>(
    tls: &TlsStream<T>,
    ephemeral: EphemeralKey,
    peer: &[u8; 32],
    owner_key: Option<&OwnerKey>,
    path: PathKind,
) -> Result<Zeroizing<Vec<u8>>, SessionError> {
    let agreed = ephemeral.agree(peer)?;
    let mut secret = Zeroizing::new(Vec::with_capacity(128)); // never reallocated: nothing is left behind
    append(&mut secret, agreed.as_slice());
    append(
        &mut secret,
        owner_key.map_or(&[][..], |key| key.0.as_slice()),
    );
    match path {
        PathKind::Direct => append(
            &mut secret,
            tls.exporter(b"EXPORTER-casemate-migrate-1")?.as_slice(),
        ),
        PathKind::Gateway => append(&mut secret, &[]),
    }
    Ok(secret)
}

pub(super) fn append(out: &mut Vec<u8>, field: &[u8]) {
    out.extend_from_slice(&(field.len() as u64).to_le_bytes());
    out.extend_from_slice(field);
}

/// What the keys of an example session, under the nonce 0, make of a known text: by name.
#[cfg(test)]
pub(crate) fn example_keys(
    transcript: &[u8; 48],
    secret: &[u8],
) -> Result<[(&'static str, Vec<u8>); 6], CryptoError> {
    let guest = GuestOffer {
        vm_id: [2; 16],
        name: "example".to_owned(),
        epoch: 3,
        memory: Vec::new(),
        description: Vec::new(),
    };
    let facts = Facts {
        session_id: [1; 16],
        guest: &guest,
        path: PathKind::Direct,
        offer_hash: [0; 32],
    };
    let mut keys = Keys::derive(transcript, secret, &facts, Provider::default())?;
    let seal = |key: &AeadKey| {
        let mut data = b"probe".to_vec();
        let tag = key.seal(0, b"", &mut data)?;
        Ok::<_, CryptoError>([data.as_slice(), &tag].concat())
    };
    let mut pages = seal(keys.pages.of(0)?)?;
    pages.extend(seal(keys.pages.of(crate::SEALS_PER_KEY)?)?);
    Ok([
        ("confirm_source", keys.confirm_source.mac(b"probe").to_vec()),
        (
            "confirm_destination",
            keys.confirm_destination.mac(b"probe").to_vec(),
        ),
        ("control_source", seal(&keys.control_source)?),
        ("control_destination", seal(&keys.control_destination)?),
        ("pages", pages),
        ("join", keys.join.to_vec()),
    ])
}
