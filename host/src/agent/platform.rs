//! The secure processor of this host, shown and managed: status, certificates, ownership, SNP's configuration.
//!
//! What changes it is written down before it is done and once more when it is, with the keys that there are then.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use casemate_attest::legacy::SevCertificate;
use casemate_attest::legacy::certificate::CERTIFICATE_LEN;
use casemate_attest::product::Product;
use casemate_attest::tcb::RawTcb;
use casemate_policy::action::PlatformCommand;
use casemate_policy::ledger::{Entry, Outcome};

use crate::agent::amd_processor::AmdProcessor;
use crate::agent::api::{
    Answer, Failure, OrderedBytes, PlatformInfo, PlatformOrderText, ProcessorKind,
    SnpCertificatesText, SnpInfo, TcbInfo,
};
use crate::agent::authority::Caller;
use crate::agent::processor::{OperatedProcessor, root_of};
use crate::agent::{Agent, no_processor, sev};
use crate::confidential::protocol::{PlatformEvidence, PlatformOrder, SnpConfig, SnpStatus};

impl Agent {
    /// `casemate platform show`, and the certificates of `export`.
    pub(super) fn platform(&self, kind: Option<ProcessorKind>) -> Result<Answer, Failure> {
        self.with_processor(kind, |processor| info(processor))
            .map(|info| Answer::Platform(Box::new(info)))
    }

    /// The SNP part of `casemate platform export`.
    pub(super) fn snp_certificates(&self, kind: Option<ProcessorKind>) -> Result<Answer, Failure> {
        self.with_processor(kind, |processor| {
            let found = processor.snp_certificates()?;
            let text = |der: &Vec<u8>| STANDARD.encode(der);
            Ok(Answer::SnpCertificates(SnpCertificatesText {
                emulated: processor.emulated(),
                ark: found.as_ref().map(|found| text(&found.ark)),
                ask: found.as_ref().map(|found| text(&found.ask)),
                vcek: found.as_ref().map(|found| text(&found.vcek)),
            }))
        })
    }

    /// What else `casemate platform` does.
    pub(super) fn platform_order(
        &self,
        caller: &Caller,
        kind: Option<ProcessorKind>,
        text: &PlatformOrderText,
    ) -> Result<Answer, Failure> {
        let order = parse(text)?;
        self.with_processor(kind, |processor| {
            let entry = |outcome| {
                let entry = Entry::new(caller.name(), action(text), OBJECT, outcome);
                detailed(entry.emulated(processor.emulated()), text)
            };
            if changes(text) {
                if let Err(refused) = allowed(processor, text) {
                    let refusal = entry(Outcome::Refused).code(&refused.code);
                    self.evidence.record(refusal)?;
                    return Err(refused);
                }
                self.evidence.record(entry(Outcome::Allowed))?;
            }
            let done = processor.order(&order);
            let bytes = match done {
                Ok(bytes) => bytes,
                Err(failure) => {
                    let failed = entry(Outcome::Failed).code(&failure.code);
                    self.evidence.record(failed)?;
                    return Err(failure);
                }
            };
            if let Some(bytes) = bytes {
                self.evidence.record(entry(Outcome::Done))?;
                return Ok(Answer::Ordered(OrderedBytes {
                    what: action(text).trim_start_matches("platform-").to_owned(),
                    bytes: STANDARD.encode(bytes),
                    emulated: processor.emulated(),
                }));
            }
            // What was done is recorded even where it cannot be looked at afterwards.
            let now = info(processor);
            let keys = now.as_ref().map(fingerprints).unwrap_or_default();
            let done = keys
                .into_iter()
                .fold(entry(Outcome::Done), |entry, (name, sha256)| {
                    entry.with(name, sha256)
                });
            self.evidence.record(done)?;
            now.map(|info| Answer::Platform(Box::new(info)))
        })
    }

    /// The one that is asked for, or the one by which guests are launched here: the software one where the policy allows
    /// it, else AMD's.
    fn with_processor<T>(
        &self,
        kind: Option<ProcessorKind>,
        act: impl FnOnce(&dyn OperatedProcessor) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let amd = || AmdProcessor::open(&self.config);
        match (kind, &self.processor) {
            (Some(ProcessorKind::Amd), _) => act(&amd()?),
            (_, Some(software)) => act(software),
            (None, None) if sev::present() => act(&amd()?),
            _ => Err(no_processor()),
        }
    }
}

fn info(processor: &dyn OperatedProcessor) -> Result<PlatformInfo, Failure> {
    let (status, evidence) = (processor.status()?, processor.certificates()?);
    let root = match evidence.amd.is_empty() {
        true => String::new(),
        false => hex::encode(root_of(&evidence)?.as_bytes()),
    };
    let owner = owner(&evidence).filter(|_| status.owned);
    Ok(PlatformInfo {
        emulated: status.emulated,
        api_major: status.api.0,
        api_minor: status.api.1,
        build: status.api.2,
        state: match status.state {
            0 => "uninit".to_owned(),
            1 => "init".to_owned(),
            2 => "working".to_owned(),
            other => format!("unknown ({other})"),
        },
        owned: status.owned,
        owner_sha256: owner.map(|oca| hex::encode(oca.fingerprint())),
        sev_es: status.es,
        guests: status.guests,
        pdh: STANDARD.encode(&evidence.pdh),
        platform: STANDARD.encode(&evidence.platform),
        amd: STANDARD.encode(&evidence.amd),
        root_sha256: root,
        snp: processor.snp_status()?.map(snp_info),
    })
}

fn snp_info(status: SnpStatus) -> SnpInfo {
    let product: Option<Product> = status.product.as_deref().and_then(|name| name.parse().ok());
    let tcb = |raw: [u8; 8]| TcbInfo {
        raw: hex::encode(raw),
        parts: product.map(|product| RawTcb(raw).of(product)),
    };
    SnpInfo {
        current_tcb: tcb(status.current_tcb),
        reported_tcb: tcb(status.reported_tcb),
        product: status.product,
        api_major: status.api.0,
        api_minor: status.api.1,
        build: status.build,
        mask_chip_id: status.mask_chip_id,
        mask_chip_key: status.mask_chip_key,
        vlek_loaded: status.vlek_loaded,
        guests: status.guests,
    }
}

fn owner(evidence: &PlatformEvidence) -> Option<SevCertificate> {
    let oca = evidence
        .platform
        .get(CERTIFICATE_LEN..2 * CERTIFICATE_LEN)?;
    SevCertificate::parse(oca).ok()
}

/// What an auditor compares with the certificates that an owner has seen.
fn fingerprints(info: &PlatformInfo) -> Vec<(&'static str, String)> {
    let certificates = [&info.pdh, &info.platform].map(|text| STANDARD.decode(text));
    let [Ok(pdh), Ok(platform)] = certificates else {
        return Vec::new();
    };
    let parts = [
        ("pdh_sha256", pdh.as_slice()),
        (
            "pek_sha256",
            platform.get(..CERTIFICATE_LEN).unwrap_or_default(),
        ),
        (
            "oca_sha256",
            platform
                .get(CERTIFICATE_LEN..2 * CERTIFICATE_LEN)
                .unwrap_or_default(),
        ),
    ];
    let parsed = parts.into_iter().filter_map(|(name, raw)| {
        let certificate = SevCertificate::parse(raw).ok()?;
        Some((name, hex::encode(certificate.fingerprint())))
    });
    parsed.collect()
}

/// What is refused before the processor hears of it, so that both kinds refuse it alike.
fn allowed(processor: &dyn OperatedProcessor, order: &PlatformOrderText) -> Result<(), Failure> {
    let keys = matches!(
        order,
        PlatformOrderText::Import { .. }
            | PlatformOrderText::PekGen
            | PlatformOrderText::FactoryReset
    );
    let guests = processor.status()?.guests;
    if !keys || guests == 0 {
        return Ok(());
    }
    let text = format!(
        "the secure processor holds {guests} SEV or SEV-ES guests, whose keys depend on what this would change; \
         end them first (`casemate list`, `casemate stop`)"
    );
    Err(Failure::new("GUESTS_RUNNING", text))
}

impl PlatformOrderText {
    /// The order in the policy's words; none for what only looks.
    pub(super) fn command(&self) -> Option<PlatformCommand> {
        Some(match self {
            Self::Id => return None,
            Self::Csr => PlatformCommand::Csr,
            Self::Import { .. } => PlatformCommand::Import,
            Self::PekGen => PlatformCommand::PekGen,
            Self::PdhGen => PlatformCommand::PdhGen,
            Self::FactoryReset => PlatformCommand::Reset,
            Self::SnpConfig { .. } => PlatformCommand::Config,
            Self::SnpCommit => PlatformCommand::Commit,
            Self::SnpVlekLoad { .. } => PlatformCommand::Vlek,
        })
    }
}

fn changes(order: &PlatformOrderText) -> bool {
    !matches!(order, PlatformOrderText::Id | PlatformOrderText::Csr)
}

fn action(order: &PlatformOrderText) -> &'static str {
    match order {
        PlatformOrderText::Id => "platform-id",
        PlatformOrderText::Csr => "platform-csr",
        PlatformOrderText::Import { .. } => "platform-import",
        PlatformOrderText::PekGen => "platform-pek-gen",
        PlatformOrderText::PdhGen => "platform-pdh-gen",
        PlatformOrderText::FactoryReset => "platform-factory-reset",
        PlatformOrderText::SnpConfig { .. } => "platform-snp-config",
        PlatformOrderText::SnpCommit => "platform-snp-commit",
        PlatformOrderText::SnpVlekLoad { .. } => "platform-snp-vlek-load",
    }
}

fn detailed(entry: Entry, order: &PlatformOrderText) -> Entry {
    match order {
        PlatformOrderText::SnpConfig {
            reported_tcb,
            mask_chip_id,
            mask_chip_key,
        } => entry
            .with(
                "reported_tcb",
                reported_tcb.as_deref().unwrap_or("committed"),
            )
            .with("mask_chip_id", *mask_chip_id)
            .with("mask_chip_key", *mask_chip_key),
        _ => entry,
    }
}

fn parse(text: &PlatformOrderText) -> Result<PlatformOrder, Failure> {
    let bytes = |field: &str, text: &str| {
        STANDARD
            .decode(text)
            .map_err(|e| Failure::new("BAD_REQUEST", format!("{field} is not base64: {e}")))
    };
    Ok(match text {
        PlatformOrderText::Id => PlatformOrder::ChipId,
        PlatformOrderText::Csr => PlatformOrder::PekCsr,
        PlatformOrderText::Import { pek, oca } => PlatformOrder::PekCertImport {
            pek: bytes("pek", pek)?,
            oca: bytes("oca", oca)?,
        },
        PlatformOrderText::PekGen => PlatformOrder::PekGen,
        PlatformOrderText::PdhGen => PlatformOrder::PdhGen,
        PlatformOrderText::FactoryReset => PlatformOrder::FactoryReset,
        PlatformOrderText::SnpConfig {
            reported_tcb,
            mask_chip_id,
            mask_chip_key,
        } => PlatformOrder::SnpConfig(SnpConfig {
            reported_tcb: reported_tcb
                .as_deref()
                .map(tcb)
                .transpose()?
                .unwrap_or_default(),
            mask_chip_id: *mask_chip_id,
            mask_chip_key: *mask_chip_key,
        }),
        PlatformOrderText::SnpCommit => PlatformOrder::SnpCommit,
        PlatformOrderText::SnpVlekLoad { wrapped } => PlatformOrder::SnpVlekLoad {
            wrapped: bytes("wrapped", wrapped)?,
        },
    })
}

fn tcb(text: &str) -> Result<[u8; 8], Failure> {
    let raw = hex::decode(text)
        .ok()
        .and_then(|bytes| bytes.try_into().ok());
    raw.ok_or_else(|| {
        let text = format!("reported_tcb wants 16 hex digits, not {text:?}");
        Failure::new("BAD_REQUEST", text)
    })
}

/// What the ledger calls it; a host has one.
pub(super) const OBJECT: &str = "secure-processor";
