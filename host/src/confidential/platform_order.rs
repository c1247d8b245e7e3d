//! What the platform's operator orders, carried out by the software secure processor.
//!
//! What changes keys gives the new identity back: the agent keeps it, and where it cannot, has the processor
//! become again what it was.

use casemate_attest::processor::snp::SnpProcessor;
use casemate_attest::processor::{FirmwareError, Identity, PlatformState, SecureProcessor};
use casemate_attest::report::SigningKey;
use casemate_attest::tcb::RawTcb;

use crate::confidential::processor_role::{firmware_error, identity_error, no_snp};
use crate::confidential::protocol::{
    ControlOutcome, ControlReply, PlatformOrder, SnpCertificates, SnpConfig, SnpStatus,
};

/// Carries out one order.
pub(super) fn carry_out(
    platform: &mut SecureProcessor,
    snp: Option<&mut SnpProcessor>,
    order: PlatformOrder,
) -> ControlOutcome {
    match order {
        PlatformOrder::ChipId => {
            // What SNP reports show is the same chip's.
            let id = snp.map_or_else(|| platform.get_id(), |snp| *snp.chip_id());
            return Ok(ControlReply::Bytes { bytes: id.to_vec() });
        }
        PlatformOrder::PekCsr => {
            let request = platform.pek_csr().map_err(firmware_error)?;
            return Ok(ControlReply::Bytes {
                bytes: request.as_bytes().to_vec(),
            });
        }
        PlatformOrder::SnpConfig(config) => return configure(snp, config),
        PlatformOrder::SnpCommit => return with_snp(snp, SnpProcessor::commit),
        PlatformOrder::SnpVlekLoad { wrapped } => {
            return with_snp(snp, |snp| snp.vlek_load(&wrapped));
        }
        PlatformOrder::PekCertImport { pek, oca } => platform.pek_cert_import(&pek, &oca),
        PlatformOrder::PekGen => platform.pek_gen(),
        PlatformOrder::PdhGen => platform.pdh_gen(),
        PlatformOrder::FactoryReset => factory_reset(platform),
    }
    .map_err(firmware_error)?;
    let identity = platform.identity_bytes().to_vec();
    Ok(ControlReply::Changed { identity })
}

/// Becomes again the platform of an older identity of the same chip.
pub(super) fn restore(platform: &mut SecureProcessor, identity: &[u8]) -> ControlOutcome {
    let identity = Identity::from_bytes(identity).map_err(identity_error)?;
    platform
        .restore_identity(identity)
        .map_err(identity_error)?;
    Ok(ControlReply::Done)
}

/// SNP_PLATFORM_STATUS.
pub(super) fn snp_status(snp: Option<&mut SnpProcessor>) -> ControlOutcome {
    let status = snp.map(|snp| {
        let status = snp.status();
        SnpStatus {
            api: (status.firmware.major, status.firmware.minor),
            build: status.firmware.build.into(),
            initialised: status.state != PlatformState::Uninit,
            current_tcb: status.current_tcb.0,
            reported_tcb: status.reported_tcb.0,
            mask_chip_id: status.mask_chip_id,
            mask_chip_key: status.mask_chip_key,
            vlek_loaded: status.vlek_loaded,
            guests: status.guest_count,
            product: Some(snp.personality().product.to_string().to_lowercase()),
        }
    });
    Ok(ControlReply::SnpStatus(status))
}

/// The emulated certificates; real ones come from AMD's key service.
pub(super) fn snp_certificates(snp: Option<&mut SnpProcessor>) -> ControlOutcome {
    let snp = snp.ok_or_else(no_snp)?;
    let vcek = snp.endorsement(SigningKey::Vcek).map_err(firmware_error)?;
    let vcek = vcek.certificate().to_vec();
    let issuers = snp.identity().certificates();
    Ok(ControlReply::SnpCertificates(SnpCertificates {
        ark: issuers.ark.clone(),
        ask: issuers.ask.clone(),
        vcek,
    }))
}

/// As Linux does it: not with guests; otherwise shut down, reset, and initialised again at once.
fn factory_reset(platform: &mut SecureProcessor) -> Result<(), FirmwareError> {
    if platform.status().state == PlatformState::Working {
        return Err(FirmwareError::InvalidPlatformState);
    }
    platform.shutdown();
    let reset = platform.factory_reset();
    platform.init()?;
    reset
}

fn configure(snp: Option<&mut SnpProcessor>, config: SnpConfig) -> ControlOutcome {
    let config = casemate_attest::processor::snp::SnpConfig {
        reported_tcb: RawTcb(config.reported_tcb),
        mask_chip_id: config.mask_chip_id,
        mask_chip_key: config.mask_chip_key,
    };
    with_snp(snp, |snp| snp.configure(&config))
}

fn with_snp(
    snp: Option<&mut SnpProcessor>,
    order: impl FnOnce(&mut SnpProcessor) -> Result<(), FirmwareError>,
) -> ControlOutcome {
    order(snp.ok_or_else(no_snp)?).map_err(firmware_error)?;
    Ok(ControlReply::Done)
}

#[cfg(test)]
mod tests {
    use casemate_attest::legacy::{LegacyChain, SevCertificate, TrustAnchors, VerifiedChain};
    use casemate_attest::processor::OwnerAuthority;
    use casemate_attest::processor::snp::forge::Authority;
    use casemate_attest::product::Product;
    use casemate_attest::tcb::RawTcb;
    use zeroize::Zeroizing;

    use crate::confidential::control::{Ordered, ProcessorLink};
    use crate::confidential::processor_role;
    use crate::confidential::protocol::{PlatformOrder, SnpConfig};
    use crate::confidential::tests::{SITE_A, SITE_B, psp, root};
    use crate::ipc::Channel;
    use crate::role::FilterOnly;
    use crate::sandbox::seccomp::ThreadKind;

    fn bytes(psp: &ProcessorLink, order: &PlatformOrder) -> Vec<u8> {
        match psp.order(order) {
            Ok(Ordered::Bytes(bytes)) => bytes,
            other => panic!("{order:?}: {other:?}"),
        }
    }

    fn changed(psp: &ProcessorLink, order: &PlatformOrder) -> Zeroizing<Vec<u8>> {
        match psp.order(order) {
            Ok(Ordered::Changed(identity)) => identity,
            other => panic!("{order:?}: {other:?}"),
        }
    }

    fn code(psp: &ProcessorLink, order: &PlatformOrder) -> String {
        psp.order(order).expect_err("it should be refused").code
    }

    fn chain(psp: &ProcessorLink) -> VerifiedChain {
        let evidence = psp.evidence().unwrap();
        let chain = LegacyChain::parse(&evidence.pdh, &evidence.platform, &evidence.amd).unwrap();
        let trust = TrustAnchors::amd().with_emulated_root(root(&SITE_A));
        chain.verify(&trust.unwrap()).unwrap()
    }

    fn import(psp: &ProcessorLink, owner: &OwnerAuthority) -> PlatformOrder {
        let request = SevCertificate::parse(&bytes(psp, &PlatformOrder::PekCsr)).unwrap();
        PlatformOrder::PekCertImport {
            pek: owner.sign_pek(&request).unwrap().as_bytes().to_vec(),
            oca: owner.certificate().as_bytes().to_vec(),
        }
    }

    #[test]
    fn what_an_order_changes_is_handed_out_to_be_kept() {
        let first = psp(&SITE_A, &[]);
        let owner = OwnerAuthority::generate().unwrap();
        let import = import(&first, &owner);
        let identity = changed(&first, &import);
        assert!(first.status().unwrap().owned);
        assert_eq!(chain(&first).oca(), owner.certificate());
        assert_eq!(code(&first, &import), "ALREADY_OWNED");
        // Another psp with what was kept is the same platform.
        let again = psp(&identity, &[]);
        assert_eq!(chain(&again), chain(&first));
        let id = bytes(&again, &PlatformOrder::ChipId);
        for order in [
            PlatformOrder::PdhGen,
            PlatformOrder::PekGen,
            PlatformOrder::FactoryReset,
        ] {
            let before = chain(&again);
            let identity = changed(&again, &order);
            assert_ne!(chain(&again).pdh(), before.pdh(), "{order:?}");
            assert_eq!(chain(&psp(&identity, &[])), chain(&again), "{order:?}");
            assert_eq!(again.status().unwrap().state, 1, "{order:?}");
        }
        assert!(!again.status().unwrap().owned);
        assert_eq!(bytes(&again, &PlatformOrder::ChipId), id);
    }

    #[test]
    fn what_could_not_be_kept_is_taken_back() {
        let psp = psp(&SITE_A, &[]);
        let before = chain(&psp);
        changed(&psp, &PlatformOrder::PekGen);
        psp.restore(&SITE_A).unwrap();
        assert_eq!(chain(&psp), before);
        let refused = psp.restore(&SITE_B).unwrap_err();
        assert_eq!(refused.code, "PLATFORM_IDENTITY");
        assert_eq!(chain(&psp), before);
    }

    #[test]
    fn a_platform_without_snp_takes_no_order_for_it() {
        let psp = psp(&SITE_A, &[]);
        assert_eq!(psp.snp_status().unwrap(), None);
        assert_eq!(psp.snp_certificates().unwrap_err().code, "SNP_NOT_ENABLED");
        for order in [
            PlatformOrder::SnpConfig(SnpConfig::default()),
            PlatformOrder::SnpCommit,
            PlatformOrder::SnpVlekLoad { wrapped: vec![] },
        ] {
            assert_eq!(code(&psp, &order), "SNP_NOT_ENABLED");
        }
    }

    #[test]
    fn snp_is_configured_committed_and_given_a_vlek() {
        let (agent, role) = Channel::pair().unwrap();
        std::thread::spawn(move || {
            processor_role::run(role, Box::new(FilterOnly(ThreadKind::Psp)))
        });
        let psp = ProcessorLink::new(agent);
        let identity = Authority::shared().identity_again();
        let kept = identity.to_bytes().unwrap();
        psp.initialise(&SITE_A, Some(&kept), &[]).unwrap();
        let status = || psp.snp_status().unwrap().unwrap();
        let done = |order: &PlatformOrder| {
            let ordered = psp.order(order);
            assert!(
                matches!(ordered, Ok(Ordered::Done)),
                "{order:?}: {ordered:?}"
            );
        };
        let first = status();
        assert!(first.initialised && !first.vlek_loaded && !first.mask_chip_id);
        assert_eq!(first.product.as_deref(), Some("genoa"));
        // The chip is one, whichever half is asked.
        let id = bytes(&psp, &PlatformOrder::ChipId);
        assert_eq!(id, identity.chip_id(Product::Genoa).unwrap());
        let vcek = psp.snp_certificates().unwrap().vcek;

        let tcb = RawTcb(first.current_tcb).of(Product::Genoa);
        let mut lower = tcb;
        lower.microcode -= 1;
        let reported_tcb = lower.to_raw(Product::Genoa).unwrap().0;
        let config = SnpConfig {
            reported_tcb,
            mask_chip_id: true,
            mask_chip_key: true,
        };
        done(&PlatformOrder::SnpConfig(config));
        let set = status();
        assert_eq!(set.reported_tcb, reported_tcb);
        assert_eq!(set.current_tcb, first.current_tcb);
        assert!(set.mask_chip_id && set.mask_chip_key);
        assert_ne!(
            psp.snp_certificates().unwrap().vcek,
            vcek,
            "another TCB, another key"
        );

        let mut higher = tcb;
        higher.snp += 1;
        let reported_tcb = higher.to_raw(Product::Genoa).unwrap().0;
        let above = PlatformOrder::SnpConfig(SnpConfig {
            reported_tcb,
            ..SnpConfig::default()
        });
        assert_eq!(code(&psp, &above), "INVALID_PARAM");
        assert_eq!(status(), set);

        let wrapped = identity.wrap_vlek(Product::Genoa, tcb, "csp").unwrap();
        let mut damaged = wrapped.to_vec();
        damaged[40] ^= 1;
        let load = |wrapped: Vec<u8>| PlatformOrder::SnpVlekLoad { wrapped };
        assert_eq!(code(&psp, &load(damaged)), "BAD_MEASUREMENT");
        assert_eq!(code(&psp, &load(vec![0; 431])), "INVALID_LEN");
        assert!(!status().vlek_loaded);
        done(&load(wrapped.to_vec()));
        assert!(status().vlek_loaded);
        done(&PlatformOrder::SnpConfig(SnpConfig::default()));
        done(&PlatformOrder::SnpCommit);
        assert_eq!(status().reported_tcb, first.current_tcb);
    }
}
