//! One fault at a time, under a root that is trusted.

use super::forge::*;
use super::{NO_LIST, at, vector};
use crate::chain::extensions::AMD_ARC;
use crate::chain::*;
use crate::product::Product;
use crate::report::SigningKey;
use proptest::prelude::*;
use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

/// PSS is salted: signed anew, it would be another root.
static ROOT_DER: LazyLock<Vec<u8>> = LazyLock::new(|| Template::root().signed_by(&ROOT));

fn trust() -> SnpTrust {
    let named = x509::sha256(&ROOT_DER);
    SnpTrust::amd()
        .with_emulated_root(&ROOT_DER, &[named])
        .unwrap()
}

pub(super) fn issuer(kind: SigningKey) -> TrustedIntermediate {
    intermediate(&Template::intermediate(kind)).unwrap()
}

fn intermediate(template: &Template) -> Result<TrustedIntermediate, ChainError> {
    let intermediate = Intermediate::parse(&template.signed_by(&ROOT))?;
    trust().trust_intermediate(&intermediate, now())
}

pub(super) fn now() -> SystemTime {
    at("2026-01-15T00:00:00Z")
}

fn verdict(template: &Template) -> &'static str {
    code_of(&template.signed_by(&ASK), &issuer(SigningKey::Vcek), now())
}

fn code_of(der: &[u8], issuer: &TrustedIntermediate, clock: SystemTime) -> &'static str {
    let verified = Leaf::parse(der)
        .map_err(ChainError::from)
        .and_then(|leaf| verify(&leaf, issuer, &NO_LIST, clock));
    verified.map_or_else(|error| error.code(), |_| "ok")
}

fn vcek() -> Template {
    Template::leaf(Product::Milan, SigningKey::Vcek)
}

/// The verdict over a VCEK whose AMD extension `suffix` has `value`.
fn with(suffix: &[u8], value: &[u8]) -> &'static str {
    let mut leaf = vcek();
    leaf.extension(&[AMD_ARC, suffix].concat()).value = value.to_vec();
    verdict(&leaf)
}

fn without(suffix: &[u8]) -> &'static str {
    let mut leaf = vcek();
    let oid = [AMD_ARC, suffix].concat();
    leaf.extensions.retain(|extension| extension.oid != oid);
    verdict(&leaf)
}

#[test]
fn emulated_leaves_of_all_products_and_kinds_are_valid_and_say_so() {
    for product in Product::ALL {
        for kind in [SigningKey::Vcek, SigningKey::Vlek] {
            let der = Template::leaf(product, kind).signed_by(&ASK);
            let leaf = Leaf::parse(&der).unwrap();
            let verified = verify(&leaf, &issuer(kind), &NO_LIST, now()).unwrap();
            assert!(verified.emulated());
            assert_eq!(verified.issuer().root(), SnpRoot::Emulated);
            assert_eq!((verified.product(), verified.kind()), (product, kind));
            assert_eq!(verified.tcb().microcode, 219);
            assert_eq!(verified.tcb().fmc, (product == Product::Turin).then_some(1));
            assert_eq!(verified.csp_id().is_some(), kind == SigningKey::Vlek);
            assert_eq!(
                verified.hwid().map(<[u8]>::len),
                (kind == SigningKey::Vcek).then_some(product.hwid_len())
            );
            let signature = chip_signature(b"report");
            assert!(verified.verify_signature(b"report", &signature));
            assert!(!verified.verify_signature(b"repost", &signature));
            assert!(!verified.verify_signature(b"report", &[0; 96]));
        }
    }
}

#[test]
fn each_fault_of_an_extension_has_its_code() {
    for suffix in [&[1][..], &[2], &[3, 1], &[3, 2], &[3, 3], &[3, 8], &[4]] {
        assert_eq!(without(suffix), "EXTENSION_MISSING", "{suffix:?}");
        let mut leaf = vcek();
        let twice = leaf.extension(&[AMD_ARC, suffix].concat()).clone();
        leaf.extensions.push(twice);
        assert_eq!(verdict(&leaf), "EXTENSION_DUPLICATE", "{suffix:?}");
    }
    for suffix in [&[3, 1][..], &[3, 2], &[3, 3], &[3, 8]] {
        assert_eq!(with(suffix, &[2, 1, 0]), "ok");
        assert_eq!(with(suffix, &[2, 2, 0, 255]), "ok");
        assert_eq!(with(suffix, &[2, 1, 0x80]), "EXTENSION_NEGATIVE");
        assert_eq!(with(suffix, &[2, 2, 0xfe, 0]), "EXTENSION_NEGATIVE");
        assert_eq!(with(suffix, &[2, 2, 1, 0]), "EXTENSION_RANGE");
        assert_eq!(
            with(suffix, &[2, 9, 1, 0, 0, 0, 0, 0, 0, 0, 4]),
            "EXTENSION_RANGE"
        );
        for encoding in [
            &[][..],
            &[2, 0],
            &[2, 1],
            &[2, 2, 0, 4],
            &[2, 1, 4, 0],
            &[2, 0x81, 1, 4],
            &[4, 1, 4],
            &[10, 1, 4],
        ] {
            assert_eq!(with(suffix, encoding), "EXTENSION_ENCODING", "{encoding:?}");
        }
    }
    assert_eq!(with(&[1], &[2, 1, 1]), "EXTENSION_LAYOUT");
    assert_eq!(with(&[1], &[2, 1, 2]), "EXTENSION_LAYOUT");
}

#[test]
fn a_chips_identity_has_its_products_length_bare_or_wrapped() {
    assert_eq!(with(&[4], &[9; 64]), "ok");
    assert_eq!(with(&[4], &tlv(4, &[9; 64])), "ok");
    for len in [0, 1, 8, 63, 65, 66, 200] {
        assert_eq!(with(&[4], &vec![9; len]), "EXTENSION_LENGTH", "{len}");
        assert_eq!(
            with(&[4], &tlv(4, &vec![9; len])),
            "EXTENSION_LENGTH",
            "{len}"
        );
    }
    // 64 bytes that happen to look like a wrapped 62 are the identity themselves.
    let mut lookalike = tlv(4, &[9; 62]);
    assert_eq!(with(&[4], &lookalike), "ok");
    lookalike.push(0);
    assert_eq!(with(&[4], &lookalike), "EXTENSION_LENGTH");
}

#[test]
fn product_and_kind_come_from_one_mould() {
    let named = |text: &[u8]| with(&[2], &tlv(0x16, text));
    assert_eq!(named(b"Milan-EMULATED"), "ok");
    assert_eq!(named(b"Venice-EMULATED"), "EXTENSION_PRODUCT");
    assert_eq!(named(b"Genoa-EMULATED"), "ok");
    assert_eq!(named(b""), "EXTENSION_LENGTH");
    assert_eq!(named(&[b'M'; 300]), "EXTENSION_LENGTH");
    assert_eq!(named(b"Milan\n-EMULATED"), "EXTENSION_ENCODING");
    assert_eq!(
        with(&[2], &tlv(0x0c, b"Milan-EMULATED")),
        "EXTENSION_ENCODING"
    );
    // Turin's layout has an FMC level and a short identity.
    assert_eq!(named(b"Turin-EMULATED"), "EXTENSION_LAYOUT");
    let mut leaf = Template::leaf(Product::Turin, SigningKey::Vcek);
    assert_eq!(verdict(&leaf), "ok");
    let fmc = [AMD_ARC, &[3, 9]].concat();
    leaf.extensions.retain(|extension| extension.oid != fmc);
    assert_eq!(verdict(&leaf), "EXTENSION_MISSING");
    let mut leaf = vcek();
    leaf.extensions.push(amd(&[3, 9], &[2, 1, 1]));
    assert_eq!(verdict(&leaf), "EXTENSION_UNEXPECTED");
    let mut leaf = vcek();
    leaf.extensions.push(amd(&[5], &tlv(0x16, b"CN=cloud")));
    assert_eq!(verdict(&leaf), "EXTENSION_UNEXPECTED");
    let mut leaf = vcek();
    leaf.subject = name("SEV-VLEK", "NOT AMD");
    assert_eq!(verdict(&leaf), "LEAF_NAME");
}

#[test]
fn an_emulated_chain_cannot_pass_for_amds() {
    assert_eq!(with(&[2], &tlv(0x16, b"Milan-B0")), "EMULATION_MISMATCH");
    let mut leaf = vcek();
    leaf.subject = name("SEV-VCEK", "Advanced Micro Devices");
    assert_eq!(verdict(&leaf), "EMULATION_MISMATCH");
    let mut below = Template::intermediate(SigningKey::Vcek);
    below.subject = name("SEV-EMULATED", "Advanced Micro Devices");
    assert_eq!(intermediate(&below).unwrap_err().code(), "CHAIN_NAME");
    below.subject = name("SEV-Milan", "NOT AMD");
    assert_eq!(intermediate(&below).unwrap_err().code(), "CHAIN_NAME");
}

#[test]
fn other_faults_of_a_leaf_are_refused() {
    let check = |fault: fn(&mut Template), code: &str| {
        let mut leaf = vcek();
        fault(&mut leaf);
        assert_eq!(verdict(&leaf), code);
    };
    check(|leaf| leaf.key = ASK.spki(), "LEAF_KEY");
    check(
        |leaf| {
            // secp521r1 as the curve.
            let at = leaf.key.windows(3).position(|w| w == [0x81, 4, 0]).unwrap();
            leaf.key[at + 3] = 0x23;
        },
        "LEAF_KEY",
    );
    check(
        |leaf| leaf.issuer = name("SEV-OTHER", "NOT AMD"),
        "CHAIN_NAME",
    );
    check(|leaf| leaf.version = None, "CERTIFICATE_VERSION");
    check(|leaf| leaf.version = Some(1), "CERTIFICATE_VERSION");
    check(
        |leaf| leaf.outer_algorithm[67 - 10] ^= 1,
        "CERTIFICATE_ALGORITHM",
    );
    check(
        |leaf| leaf.outer_algorithm = pss::EXPLICIT_TRAILER.to_vec(),
        "CERTIFICATE_ALGORITHM",
    );
    check(
        |leaf| {
            // sha384WithRSAEncryption.
            let rsa = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0c\x05\x00".to_vec();
            leaf.inner_algorithm.clone_from(&rsa);
            leaf.outer_algorithm = rsa;
        },
        "CERTIFICATE_ALGORITHM",
    );
    check(
        |leaf| leaf.dates = ["350101000000Z", "250101000000Z"],
        "CERTIFICATE_DATES",
    );
    check(
        |leaf| leaf.subject = name("SEV-VCEK\n", "NOT AMD"),
        "CERTIFICATE_NAME",
    );
    check(
        |leaf| leaf.subject = name("SEV-VCEK", "\x1b[2J"),
        "CERTIFICATE_NAME",
    );
    check(
        |leaf| leaf.subject = sequence(&[leaf.subject[2..].to_vec(), leaf.subject[2..].to_vec()]),
        "CERTIFICATE_NAME",
    );
    check(
        |leaf| {
            leaf.extensions
                .extend((0..60).map(|last| other(&[0x55, 0x1d, last], false, &[5, 0])))
        },
        "EXTENSION_COUNT",
    );
    let constraints = sequence(&[tlv(1, &[0xff])]);
    let mut leaf = vcek();
    leaf.extensions
        .push(other(BASIC_CONSTRAINTS, true, &constraints));
    assert_eq!(verdict(&leaf), "LEAF_IS_AUTHORITY");
    let mut leaf = vcek();
    leaf.extensions
        .push(other(&[0x55, 0x1d, 0x63], true, &[5, 0]));
    assert_eq!(verdict(&leaf), "CRITICAL_EXTENSION");
    let mut leaf = vcek();
    let server = sequence(&[tlv(6, &[0x2b, 6, 1, 5, 5, 7, 3, 1])]);
    leaf.extensions
        .push(other(EXTENDED_KEY_USAGE, false, &server));
    assert_eq!(verdict(&leaf), "KEY_PURPOSE");
    let mut leaf = vcek();
    leaf.extensions.push(other(KEY_USAGE, true, &[3, 2, 1, 6]));
    assert_eq!(verdict(&leaf), "LEAF_KEY_USAGE");
    leaf.extension(KEY_USAGE).value = vec![3, 2, 7, 0x80];
    assert_eq!(verdict(&leaf), "ok");
}

#[test]
fn either_encoding_of_the_algorithm_is_taken() {
    let mut leaf = vcek();
    leaf.inner_algorithm = pss::EXPLICIT_TRAILER.to_vec();
    leaf.outer_algorithm = pss::EXPLICIT_TRAILER.to_vec();
    assert_eq!(verdict(&leaf), "ok");
}

#[test]
fn a_signature_by_another_key_is_refused_at_each_level() {
    let der = vcek().signed_by(&STRANGER);
    assert_eq!(
        code_of(&der, &issuer(SigningKey::Vcek), now()),
        "LEAF_SIGNATURE"
    );
    let below = Template::intermediate(SigningKey::Vcek).signed_by(&STRANGER);
    let below = Intermediate::parse(&below).unwrap();
    let refused = trust().trust_intermediate(&below, now()).unwrap_err();
    assert_eq!(refused.code(), "INTERMEDIATE_SIGNATURE");
    let root = Template::root().signed_by(&STRANGER);
    let refused = SnpTrust::amd().with_emulated_root(&root, &[x509::sha256(&root)]);
    assert_eq!(refused.unwrap_err().code(), "ROOT_SIGNATURE");
}

#[test]
fn each_certificates_dates_count_to_the_second() {
    let dates = ["250101000000Z", "260115000000Z"];
    let (last, after) = (at("2026-01-15T00:00:00.9Z"), at("2026-01-15T00:00:01Z"));
    let (first, before) = (at("2025-01-01T00:00:00Z"), at("2024-12-31T23:59:59.9Z"));

    let leaf = Template { dates, ..vcek() }.signed_by(&ASK);
    let long = issuer(SigningKey::Vcek);
    assert_eq!(code_of(&leaf, &long, last), "ok");
    assert_eq!(code_of(&leaf, &long, after), "LEAF_EXPIRED");

    let root = Template {
        dates,
        ..Template::root()
    }
    .signed_by(&ROOT);
    let short_root = SnpTrust::amd()
        .with_emulated_root(&root, &[x509::sha256(&root)])
        .unwrap();
    let below = Template::intermediate(SigningKey::Vcek);
    let short = Template {
        dates,
        ..below.clone()
    };
    for (trust, below, link) in [
        (trust(), short, "INTERMEDIATE"),
        (short_root, below, "ROOT"),
    ] {
        let below = Intermediate::parse(&below.signed_by(&ROOT)).unwrap();
        let code = |clock| trust.trust_intermediate(&below, clock).unwrap_err().code();
        assert_eq!(code(after), format!("{link}_EXPIRED"));
        // Both start at once: the root is looked at first.
        assert_eq!(code(before), "ROOT_NOT_YET_VALID");
        let kept = trust.trust_intermediate(&below, first).unwrap();
        let leaf = vcek().signed_by(&ASK);
        assert_eq!(code_of(&leaf, &kept, last), "ok");
        assert_eq!(code_of(&leaf, &kept, after), format!("{link}_EXPIRED"));
        let verified = verify(&Leaf::parse(&leaf).unwrap(), &kept, &NO_LIST, last).unwrap();
        let late = verified.recheck(&NO_LIST, after).unwrap_err();
        assert_eq!(late.code(), format!("{link}_EXPIRED"));
    }

    let young = ["260201000000Z", "350101000000Z"];
    let leaf = Template {
        dates: young,
        ..vcek()
    };
    assert_eq!(verdict(&leaf), "LEAF_NOT_YET_VALID");
    let below = Template {
        dates: young,
        ..Template::intermediate(SigningKey::Vcek)
    };
    assert_eq!(
        intermediate(&below).unwrap_err().code(),
        "INTERMEDIATE_NOT_YET_VALID"
    );
    assert_eq!(
        code_of(
            &leaf.signed_by(&ASK),
            &long,
            SystemTime::UNIX_EPOCH - Duration::from_secs(9)
        ),
        "ROOT_NOT_YET_VALID"
    );
}

#[test]
fn only_an_authority_may_sign() {
    let check = |fault: fn(&mut Template), code: &str| {
        let mut below = Template::intermediate(SigningKey::Vcek);
        fault(&mut below);
        assert_eq!(intermediate(&below).unwrap_err().code(), code);
    };
    check(
        |below| below.extension(BASIC_CONSTRAINTS).value = sequence(&[]),
        "NOT_AUTHORITY",
    );
    check(
        |below| below.extensions.retain(|one| one.oid != BASIC_CONSTRAINTS),
        "NOT_AUTHORITY",
    );
    // cRLSign alone; none.
    check(
        |below| below.extension(KEY_USAGE).value = vec![3, 2, 1, 2],
        "NOT_AUTHORITY",
    );
    check(
        |below| below.extensions.retain(|one| one.oid != KEY_USAGE),
        "NOT_AUTHORITY",
    );
    check(
        |below| {
            below
                .extensions
                .push(other(&[0x55, 0x1d, 0x63], true, &[5, 0]))
        },
        "CRITICAL_EXTENSION",
    );
    check(
        |below| {
            let server = sequence(&[tlv(6, &[0x2b, 6, 1, 5, 5, 7, 3, 1])]);
            below
                .extensions
                .push(other(EXTENDED_KEY_USAGE, false, &server));
        },
        "KEY_PURPOSE",
    );
    check(
        |below| below.extensions.push(below.extensions[0].clone()),
        "EXTENSION_DUPLICATE",
    );

    let mut root = Template::root();
    let no_more = sequence(&[tlv(1, &[0xff]), tlv(2, &[0])]);
    root.extension(BASIC_CONSTRAINTS).value = no_more;
    let root = root.signed_by(&ROOT);
    let trust = SnpTrust::amd()
        .with_emulated_root(&root, &[x509::sha256(&root)])
        .unwrap();
    let below = Template::intermediate(SigningKey::Vcek).signed_by(&ROOT);
    let below = Intermediate::parse(&below).unwrap();
    let refused = trust.trust_intermediate(&below, now()).unwrap_err();
    assert_eq!(refused, ChainError::NotAuthority(Link::Root));
}

#[test]
fn an_emulated_root_counts_only_when_named_and_marked() {
    let root = ROOT_DER.clone();
    let code = |root: &[u8], named: &[[u8; 32]]| {
        let trust = SnpTrust::amd().with_emulated_root(root, named);
        trust.map_or_else(|error| error.code(), |_| "ok")
    };
    let named = [x509::sha256(&root)];
    assert_eq!(code(&root, &named), "ok");
    assert_eq!(code(&root, &[]), "ROOT_NOT_PINNED");
    assert_eq!(code(&root, &[[7; 32]]), "ROOT_NOT_PINNED");
    for (common, organization) in [
        ("ARK-EMULATED", "Advanced Micro Devices"),
        ("ARK-Milan", "NOT AMD"),
        ("ARK-EMULATED ", "NOT AMD"),
    ] {
        let subject = name(common, organization);
        let issuer = subject.clone();
        let unmarked = Template {
            subject,
            issuer,
            ..Template::root()
        }
        .signed_by(&ROOT);
        let refused = code(&unmarked, &[x509::sha256(&unmarked)]);
        assert_eq!(refused, "ROOT_NOT_MARKED_EMULATED");
    }
    let amd = include_bytes!("../roots/milan-ark.der");
    assert_eq!(code(amd, &[x509::sha256(amd)]), "ROOT_IS_AMD");
    assert_eq!(trust().recognise(&root), Ok(SnpRoot::Emulated));
    assert_eq!(
        SnpTrust::amd().recognise(&root).unwrap_err().code(),
        "ROOT_NOT_PINNED"
    );
}

#[test]
fn several_emulated_roots_of_one_name_are_told_apart() {
    let other = Template {
        key: STRANGER.spki(),
        ..Template::root()
    }
    .signed_by(&STRANGER);
    let trust = trust()
        .with_emulated_root(&other, &[x509::sha256(&other)])
        .unwrap();
    for key in [&*ROOT, &*STRANGER] {
        let below = Template::intermediate(SigningKey::Vcek).signed_by(key);
        let below = Intermediate::parse(&below).unwrap();
        let below = trust.trust_intermediate(&below, now()).unwrap();
        let of_other = below.root_fingerprint() == x509::sha256(&other);
        assert_eq!(of_other, std::ptr::eq(key, &*STRANGER));
    }
}

#[test]
fn a_forged_chain_with_amds_exact_names_is_refused() {
    let of_amd = |common: &str| {
        // AMD's own order of the name's parts.
        let real = Intermediate::amd(Product::Milan, SigningKey::Vcek).unwrap();
        let subject = x509::parse_der(real.as_der())
            .unwrap()
            .subject()
            .as_raw()
            .to_vec();
        let mut subject = subject;
        let at = subject.len() - "SEV-Milan".len();
        subject.truncate(at);
        subject.extend_from_slice(common.as_bytes());
        subject
    };
    let root = Template {
        subject: of_amd("ARK-Milan"),
        issuer: of_amd("ARK-Milan"),
        ..Template::root()
    };
    let root = root.signed_by(&ROOT);
    assert_eq!(
        SnpTrust::amd().recognise(&root).unwrap_err().code(),
        "ROOT_NOT_PINNED"
    );
    let refused = SnpTrust::amd().with_emulated_root(&root, &[x509::sha256(&root)]);
    assert_eq!(refused.unwrap_err().code(), "ROOT_NOT_MARKED_EMULATED");

    let below = Template::intermediate(SigningKey::Vcek);
    let below = Template {
        subject: of_amd("SEV-Milan"),
        issuer: of_amd("ARK-Milan"),
        ..below
    };
    let below = Intermediate::parse(&below.signed_by(&ROOT)).unwrap();
    let refused = SnpTrust::amd()
        .trust_intermediate(&below, now())
        .unwrap_err();
    assert_eq!(refused.code(), "INTERMEDIATE_SIGNATURE");

    let mut leaf = Template {
        issuer: of_amd("SEV-Milan"),
        ..vcek()
    };
    let vcek_name = {
        let real = Leaf::parse(&vector("reports/milan-v2/vcek.der")).unwrap();
        real.outline.subject
    };
    leaf.subject = vcek_name;
    leaf.extension(&[AMD_ARC, &[2]].concat()).value = tlv(0x16, b"Milan-B0");
    let real = super::amd_intermediate(Product::Milan, SigningKey::Vcek, now());
    // Under AMD's key the made-up signature, of another length, cannot hold.
    assert_eq!(
        code_of(&leaf.signed_by(&ASK), &real, now()),
        "LEAF_SIGNATURE"
    );
}

#[test]
fn cut_and_lengthened_certificates_are_refused() {
    let der = vector("reports/milan-v3-vlek/vlek.der");
    for len in 0..der.len() {
        assert!(Leaf::parse(&der[..len]).is_err(), "{len}");
        assert!(Intermediate::parse(&der[..len]).is_err(), "{len}");
    }
    let mut long = der.clone();
    long.push(0);
    assert_eq!(
        Leaf::parse(&long).unwrap_err().code(),
        "CERTIFICATE_MALFORMED"
    );
    assert_eq!(
        Leaf::parse(&[&der[..], &der].concat()).unwrap_err().code(),
        "CERTIFICATE_MALFORMED"
    );
    let big = vec![0x30; MAX_CERTIFICATE_LEN + 1];
    assert_eq!(
        Leaf::parse(&big).unwrap_err().code(),
        "CERTIFICATE_TOO_LARGE"
    );
    assert_eq!(
        split_pem(&vec![b'-'; 1 << 20]).unwrap_err().code(),
        "CERTIFICATE_TOO_LARGE"
    );
}

#[test]
fn pem_is_one_certificate_and_nothing_else() {
    let der = vcek().signed_by(&ASK);
    let text = pem("CERTIFICATE", &der);
    assert_eq!(Leaf::parse(text.as_bytes()).unwrap().as_der(), der);
    assert!(Leaf::parse(format!("\n {text}\r\n").as_bytes()).is_ok());
    for wrong in [
        format!("{text}{text}"),
        format!("{text}x"),
        format!("x{text}"),
        pem("X509 CRL", &der),
        text.replace("END", "ENDE"),
        text.replace('M', "!"),
    ] {
        assert!(Leaf::parse(wrong.as_bytes()).is_err(), "{wrong}");
    }
    let two = split_pem(format!("{text}\n{text}").as_bytes()).unwrap();
    assert_eq!(two, [der.clone(), der]);
    for wrong in [String::new(), text.repeat(5), format!("{text}x{text}")] {
        assert_eq!(
            split_pem(wrong.as_bytes()).unwrap_err().code(),
            "CERTIFICATE_PEM"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn a_changed_byte_of_a_real_leaf_is_never_believed(at in 0usize..1319, bits in 1u8..) {
        let mut der = vector("reports/milan-v3-vlek/vlek.der");
        der[at] ^= bits;
        let clock = super::at("2025-06-01T00:00:00Z");
        let real = amd_vlek();
        prop_assert_ne!(code_of(&der, &real, clock), "ok");
    }
}

#[test]
fn a_changed_byte_of_a_real_intermediate_is_never_believed() {
    let der = include_bytes!("../roots/turin-asvk.der");
    let trust = SnpTrust::amd();
    assert!(
        trust
            .trust_intermediate(&Intermediate::parse(der).unwrap(), now())
            .is_ok()
    );
    for at in 0..der.len() {
        for bits in [0x01, 0x10, 0x80] {
            let mut der = der.to_vec();
            der[at] ^= bits;
            let trusted = Intermediate::parse(&der)
                .and_then(|intermediate| trust.trust_intermediate(&intermediate, now()));
            assert!(trusted.is_err(), "{at}");
        }
    }
}

fn amd_vlek() -> TrustedIntermediate {
    static REAL: LazyLock<TrustedIntermediate> = LazyLock::new(|| {
        super::amd_intermediate(Product::Milan, SigningKey::Vlek, at("2025-06-01T00:00:00Z"))
    });
    REAL.clone()
}
