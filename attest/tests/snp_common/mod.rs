//! An emulated SNP platform, its guests, and an owner who signs ID blocks.
#![allow(dead_code, reason = "each test binary uses its own part")]

use casemate_attest::measure::id_block::{ID_AUTH_LEN, ID_BLOCK_LEN};
use casemate_attest::measure::snp::PageType;
use casemate_attest::processor::FirmwareError;
use casemate_attest::processor::snp::forge::Authority;
use casemate_attest::processor::snp::{
    GuestChannel, IdBlockParameters, KeyRequest, KeySelect, LaunchPage, MessageError, PageBytes,
    Personality, SnpGuestHandle, SnpLaunchFinish, SnpLaunchStart, SnpProcessor,
};
use casemate_attest::product::Product;
use casemate_attest::report::{Report, SigningKey as KeyKind, SnpPolicy};
use p384::ecdsa::SigningKey;
use p384::ecdsa::signature::Signer;
use sev::certs::snp::{Certificate, Chain, Verifiable, ca};
use sev::firmware::guest::AttestationReport;
use sev::parser::ByteParser;
use sha2::{Digest, Sha384};

pub const START: SnpLaunchStart = SnpLaunchStart {
    policy: SnpPolicy(0x3_0000),
    desired_tsc_khz: 2_450_000,
    gosvw: [0x60; 16],
};
pub const FINISH: SnpLaunchFinish<'static> = SnpLaunchFinish {
    id: None,
    host_data: [0; 32],
    vcek_disabled: false,
};

pub fn processor(product: Product) -> SnpProcessor {
    processor_as(Personality::of(product))
}

pub fn processor_as(personality: Personality) -> SnpProcessor {
    let identity = Authority::shared().identity_again();
    let mut processor = SnpProcessor::new(identity, personality)
        .unwrap()
        .with_max_guests(4);
    processor.init().unwrap();
    processor
}

/// A guest in the state LAUNCH on the next free ASID.
pub fn started(processor: &mut SnpProcessor, start: SnpLaunchStart) -> SnpGuestHandle {
    let handle = processor.gctx_create().unwrap();
    processor.launch_start(handle, start).unwrap();
    let asid =
        (1..).find(|asid| processor.activate(handle, *asid) != Err(FirmwareError::AsidOwned));
    assert!(asid.is_some());
    handle
}

/// One page of each kind, as a VMM would load them; returns the filled secrets page.
pub fn load(processor: &mut SnpProcessor, handle: SnpGuestHandle) -> PageBytes {
    let guest = processor.guest(handle).unwrap();
    let mut secrets = [0xaa; 4096];
    for (page_type, gpa, page) in [
        (PageType::Normal, 0xffff_f000, &mut [0x11; 4096]),
        (PageType::Zero, 0x80_0000, &mut [0x22; 4096]),
        (PageType::Secrets, 0x80_d000, &mut secrets),
        (PageType::Cpuid, 0x80_e000, &mut [0; 4096]),
        (PageType::Unmeasured, 0x80_f000, &mut [0x33; 4096]),
        (PageType::Vmsa, 0xffff_ffff_f000, &mut [0x44; 4096]),
    ] {
        guest
            .launch_update(LaunchPage::new(page_type, gpa), page)
            .unwrap();
    }
    secrets
}

/// A running guest and its secrets page.
pub fn running(processor: &mut SnpProcessor) -> (SnpGuestHandle, PageBytes) {
    running_with(processor, &FINISH)
}

pub fn running_with(
    processor: &mut SnpProcessor,
    finish: &SnpLaunchFinish<'_>,
) -> (SnpGuestHandle, PageBytes) {
    let handle = started(processor, START);
    let secrets = load(processor, handle);
    processor.launch_finish(handle, finish).unwrap();
    (handle, secrets)
}

pub fn channel(secrets: &PageBytes) -> GuestChannel {
    GuestChannel::new(secrets, 0).unwrap()
}

/// A report as the guest gets it.
pub fn report(
    processor: &mut SnpProcessor,
    handle: SnpGuestHandle,
    channel: &mut GuestChannel,
    data: [u8; 64],
    key: KeySelect,
) -> Report {
    let request = channel.report_request(&data, 0, key).unwrap();
    let reply = processor.guest_request(handle, &request).unwrap();
    Report::parse(&channel.report(&reply).unwrap()).unwrap()
}

/// The `sev` crate's verdict on the whole chain and the report.
pub fn signed_by(processor: &mut SnpProcessor, kind: KeyKind, report: &Report) {
    let leaf = processor.endorsement(kind).unwrap().certificate().to_vec();
    let certificates = processor.identity().certificates();
    let intermediate = match kind {
        KeyKind::Vcek => &certificates.ask,
        KeyKind::Vlek => &certificates.asvk,
    };
    let chain = Chain {
        ca: ca::Chain {
            ark: Certificate::from_der(&certificates.ark).unwrap(),
            ask: Certificate::from_der(intermediate).unwrap(),
        },
        vek: Certificate::from_der(&leaf).unwrap(),
    };
    let report = AttestationReport::from_bytes(report.as_bytes()).unwrap();
    (&chain, &report).verify().unwrap();
}

/// A derived key as the guest gets it.
pub fn key(
    processor: &mut SnpProcessor,
    handle: SnpGuestHandle,
    guest: &mut GuestChannel,
    request: &KeyRequest,
) -> Result<[u8; 32], MessageError> {
    let request = guest.key_request(request).unwrap();
    let reply = processor.guest_request(handle, &request).unwrap();
    guest.key(&reply).map(|key| *key)
}

/// An owner's ID block and its authentication, written by hand from the specification's tables.
pub struct Owner {
    id: SigningKey,
    author: SigningKey,
}

#[derive(Clone)]
pub struct SignedBlock {
    pub block: [u8; ID_BLOCK_LEN],
    pub auth: Box<[u8; ID_AUTH_LEN]>,
}

impl Owner {
    pub fn new() -> Self {
        let key = || SigningKey::from(p384::SecretKey::random(&mut rand_core::OsRng));
        Self {
            id: key(),
            author: key(),
        }
    }

    pub fn sign(&self, digest: &[u8; 48], policy: SnpPolicy) -> SignedBlock {
        let mut block = [0; ID_BLOCK_LEN];
        block[..48].copy_from_slice(digest);
        block[0x30..0x40].fill(0xfa);
        block[0x40..0x50].fill(0x1a);
        block[0x50] = 1;
        block[0x54] = 7;
        block[0x58..].copy_from_slice(&policy.0.to_le_bytes());
        self.sign_block(block)
    }

    pub fn sign_block(&self, block: [u8; ID_BLOCK_LEN]) -> SignedBlock {
        let mut auth = Box::new([0; ID_AUTH_LEN]);
        auth[0] = 1;
        auth[4] = 1;
        let id_key = key_field(&self.id);
        auth[0x40..0x40 + 144].copy_from_slice(&signature_field(&self.id, &block));
        auth[0x240..0x240 + 0x404].copy_from_slice(&id_key);
        auth[0x680..0x680 + 144].copy_from_slice(&signature_field(&self.author, &id_key));
        auth[0x880..0x880 + 0x404].copy_from_slice(&key_field(&self.author));
        SignedBlock { block, auth }
    }

    /// SHA-384 of the ID key and of the author key, as reports have them.
    pub fn key_digests(&self) -> [[u8; 48]; 2] {
        [&self.id, &self.author].map(|key| Sha384::digest(key_field(key)).into())
    }
}

impl SignedBlock {
    pub fn finish(&self, author_key_en: bool) -> SnpLaunchFinish<'_> {
        SnpLaunchFinish {
            id: Some(IdBlockParameters {
                block: &self.block,
                auth: &self.auth,
                author_key_en,
            }),
            ..FINISH
        }
    }
}

fn key_field(key: &SigningKey) -> Vec<u8> {
    let point = key.verifying_key().to_encoded_point(false);
    let mut field = 2u32.to_le_bytes().to_vec();
    for number in [point.x().unwrap(), point.y().unwrap()] {
        field.extend(number.iter().rev());
        field.resize(field.len() + 24, 0);
    }
    field.resize(0x404, 0);
    field
}

fn signature_field(key: &SigningKey, message: &[u8]) -> Vec<u8> {
    let signature: p384::ecdsa::Signature = key.sign(message);
    let mut field = Vec::new();
    for number in signature.to_bytes().chunks(48) {
        field.extend(number.iter().rev());
        field.resize(field.len() + 24, 0);
    }
    field
}
