//! Equal to `sev-snp-measure` on generated guests, in what it measures and in what it refuses.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use casemate_attest::measure::guest::Technology;
use casemate_attest::measure::id_block::{IdAuth, IdBlock, IdSigningKey};
use casemate_attest::measure::vcpu::CpuModel;
use casemate_measure_compare::guests::{Guest, generate};
use casemate_measure_compare::peer::{Digest, IdBlockQuestion, Peer, Question};
use std::collections::BTreeMap;
use std::path::Path;

fn peer() -> Peer {
    Peer::install(Path::new(env!("CARGO_TARGET_TMPDIR")))
}

#[test]
fn every_generated_guest_has_the_digest_that_sev_snp_measure_gives_it() {
    let folder = tempfile::tempdir().unwrap();
    let guests = generate(SEED, GUESTS, folder.path());
    let answer = peer().ask(&Question {
        guests: &guests,
        repeat: 1,
        id_blocks: &[],
    });
    let mut equal: BTreeMap<String, usize> = BTreeMap::new();
    let mut refused = 0;
    for (guest, theirs) in guests.iter().zip(&answer.digests) {
        match (guest.measure(), theirs) {
            (Ok(ours), Digest::Measured(theirs)) => {
                assert_eq!(ours, *theirs, "{guest:?}");
                *equal.entry(guest.mode.to_string()).or_default() += 1;
            }
            (Err(_), Digest::Refused { .. }) => refused += 1,
            (ours, theirs) => panic!("{guest:?}: ours {ours:?}, theirs {theirs:?}"),
        }
    }
    println!("equal: {equal:?}, refused by both: {refused}");
    assert_eq!(answer.digests.len(), GUESTS);
    assert!(equal.values().sum::<usize>() >= 200, "{equal:?}");
    for mode in [Technology::Sev, Technology::SevEs, Technology::Snp] {
        assert!(equal[&mode.to_string()] >= 50, "{equal:?}");
    }
    assert!(refused > 0, "no guest is one that nobody can launch");
}

/// Debian's build as the lab has it now, whichever that is, with the kernel that it starts there.
#[test]
fn debians_firmware_and_kernel_have_the_digest_that_sev_snp_measure_gives_them() {
    let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/lab");
    let file = |name: &str| {
        let path = lab.join(name);
        assert!(
            path.exists(),
            "no {}; `cargo lab guest-image` and `cargo lab boot-disk` make it",
            path.display()
        );
        path
    };
    let guests = [Technology::Sev, Technology::SevEs, Technology::Snp].map(|mode| Guest {
        mode,
        ovmf: file("firmware-forky/usr/share/ovmf/OVMF.amdsev.fd"),
        kernel: Some(file("guest/vmlinuz")),
        initrd: Some(file("guest/initrd.cpio")),
        append: Some("console=ttyS0 casemate.snp=0x80d000,0x80e000".to_owned()),
        vcpus: 2,
        vcpu_signature: 0,
        guest_features: 1,
    });
    let answer = peer().ask(&Question {
        guests: &guests,
        repeat: 1,
        id_blocks: &[],
    });
    assert_eq!(answer.digests.len(), guests.len());
    for (guest, theirs) in guests.iter().zip(&answer.digests) {
        let Digest::Measured(theirs) = theirs else {
            panic!("{guest:?}: {theirs:?}");
        };
        assert_eq!(guest.measure().as_ref(), Ok(theirs), "{guest:?}");
    }
}

#[test]
fn every_vcpu_type_it_knows_is_known_with_the_same_signature() {
    let answer = peer().ask(&Question {
        guests: &[],
        repeat: 1,
        id_blocks: &[],
    });
    assert!(answer.signatures.len() >= 16);
    for (name, signature) in answer.signatures {
        let model: CpuModel = name.parse().unwrap();
        assert_eq!(model.signature().0, signature, "{name}");
    }
}

#[test]
fn its_id_blocks_verify_and_name_the_keys_as_we_do() {
    let pem = |der: &[u8]| {
        let digits = STANDARD.encode(der);
        format!("-----BEGIN PRIVATE KEY-----\n{digits}\n-----END PRIVATE KEY-----\n")
    };
    let ders = [
        IdSigningKey::generate().unwrap(),
        IdSigningKey::generate().unwrap(),
    ];
    let [id, author] = ders
        .each_ref()
        .map(|der| IdSigningKey::from_pkcs8(der).unwrap());
    let digest = "a14d638341e5674628fe1e02fbedebe5e5ab4faf1dd72d8966068e615bb99efd13d214b35c231715b38e263dc6059745";
    let answer = peer().ask(&Question {
        guests: &[],
        repeat: 1,
        id_blocks: &[IdBlockQuestion {
            digest: digest.to_owned(),
            id_key: pem(&ders[0]),
            author_key: pem(&ders[1]),
        }],
    });
    let text = &answer.id_blocks[0];
    let field = |name: &str, end: char| {
        let rest = text.split_once(name).unwrap().1;
        STANDARD.decode(rest.split(end).next().unwrap()).unwrap()
    };
    let block = IdBlock::parse(&field("id-block=", ',')).unwrap();
    assert_eq!(block.launch_digest.to_string(), digest);
    let auth = IdAuth::parse(&field("id-auth=", '\n')).unwrap();
    let keys = auth.verify(&block).unwrap();
    assert_eq!(keys.id_key, id.public().digest());
    assert_eq!(keys.author_key, Some(author.public().digest()));
    assert_eq!(keys.id_key.as_bytes()[..], field("id_key_hash: ", '\n'));
    let theirs = field("author_key: ", '\n');
    assert_eq!(keys.author_key.unwrap().as_bytes()[..], theirs);
}

const SEED: u64 = 0x00ca_5e3a_7e00;
const GUESTS: usize = 480;
