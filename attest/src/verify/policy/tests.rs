//! What is a policy file, and what is none.

use super::*;

fn error(text: &str) -> String {
    OwnerPolicy::parse(text.as_bytes()).unwrap_err().to_string()
}

#[test]
fn an_empty_file_is_the_default_policy() {
    let empty = OwnerPolicy::parse(b"").unwrap();
    let default = OwnerPolicy::default();
    assert_eq!(empty.ids(), default.ids());
    assert_eq!(
        hex::encode(&empty.digest()[..4]),
        "38b060a7", // SHA-384 of nothing
    );
    assert_eq!(
        format!("{:?}", empty.rules()),
        format!("{:?}", default.rules())
    );
    assert_eq!(default.rules().provisional_firmware, Leave::Refuse);
    assert_eq!(default.rules().migration_agent, Leave::Refuse);
    assert!(!default.rules().allow_emulated);
}

#[test]
fn a_full_file_is_read() {
    let hex = |bytes: usize| "0a".repeat(bytes);
    let text = format!(
        r#"
        allow_emulated = true
        emulated_roots = ["sha256:{root}"]
        signing_keys = ["vcek", "vlek"]
        csp_ids = ["provider"]
        products = ["milan", "genoa", "turin"]
        measurements = ["{digest}"]
        reference_signers = ["ed25519:{root}"]
        reference_threshold = 1
        vmpl = [0, 3]
        min_report_version = 3
        provisional_firmware = "allow"
        migration_agent = "allow"
        masked_chip_id = "refuse"
        chip_ids = ["{chip}"]
        [tcb.milan]
        reported = {{ boot_loader = 4, tee = 0, snp = 23, microcode = 219 }}
        [tcb.turin]
        launch = {{ fmc = 1 }}
        [guest_policy]
        require = ["smt"]
        forbid = ["migrate_ma", "debug"]
        min_abi = "1.51"
        [platform]
        require = ["ecc_enabled"]
        forbid = ["smt_enabled"]
        [launch]
        host_data = ["{root}"]
        family_ids = ["{id}"]
        image_ids = ["{id}"]
        min_guest_svn = 2
        require_id_key = true
        id_key_digests = ["{digest}"]
        author_key_digests = ["{digest}"]
        [firmware]
        min_current = "1.55.29"
        min_committed = "1.55.0"
        [mitigations]
        launch = 0x0b
        current = 11
        [crl]
        mode = "required"
        max_age_days = 30
        "#,
        root = hex(32),
        digest = hex(48),
        chip = hex(64),
        id = hex(16),
    );
    let policy = OwnerPolicy::parse(text.as_bytes()).unwrap();
    let rules = policy.rules();
    assert_eq!(rules.vmpl.as_deref(), Some(&[0, 3][..]));
    assert_eq!(rules.min_report_version, Some(ReportVersion::V3));
    assert_eq!(rules.crl.max_age_days, Some(30));
    assert_eq!(rules.crl.mode, CrlMode::Required);
    assert_eq!(rules.mitigations.launch, rules.mitigations.current);
    let milan = rules.minima(Product::Milan).unwrap();
    assert_eq!(milan.reported.unwrap().levels().microcode, 219);
    assert!(rules.minima(Product::Genoa).is_none());
    assert_eq!(rules.firmware.min_current.unwrap().build, 29);
    assert_ne!(policy.digest(), OwnerPolicy::default().digest());
}

#[test]
fn what_is_not_understood_is_refused_with_its_place() {
    let hex = |bytes: usize| "0a".repeat(bytes);
    for (text, words) in [
        ("measurment = []".to_owned(), "unknown field"),
        ("vmpl = [0]\nvmpl = [1]".to_owned(), "duplicate key"),
        ("[crl]\n[crl]".to_owned(), "duplicate key"),
        ("[tcb.milan]\n[tcb.milan]".to_owned(), "duplicate key"),
        ("[tcb.venice]".to_owned(), "unknown variant"),
        (
            "[tcb.milan]\nreported = { fmc = 1 }".to_owned(),
            "only Turin has an FMC",
        ),
        (
            "[tcb.genoa]\nlaunch = { fmc = 0 }".to_owned(),
            "only Turin has an FMC",
        ),
        (
            "[tcb.milan]\nreported = { snp = 256 }".to_owned(),
            "invalid value",
        ),
        ("[tcb.milan]\nreported = {}".to_owned(), "names no level"),
        (
            format!("measurements = [\"{}\"]", hex(47)),
            "48 bytes as 96 hex digits",
        ),
        (
            format!("measurements = [\"{}\"]", "g".repeat(96)),
            "48 bytes as 96 hex digits",
        ),
        (format!("emulated_roots = [\"{}\"]", hex(32)), "sha256:"),
        (
            format!("chip_ids = [\"{}\"]", "00".repeat(64)),
            "names no chip",
        ),
        ("vmpl = [4]".to_owned(), "always rejected"),
        ("vmpl = [4294967295]".to_owned(), "always rejected"),
        (
            "[guest_policy]\nrequire = [\"debug\"]".to_owned(),
            "always rejected",
        ),
        (
            "[platform]\nrequire = [\"ecc_enabled\"]\nforbid = [\"ecc_enabled\"]".to_owned(),
            "both required and forbidden",
        ),
        ("[mitigations]\nlaunch = 0".to_owned(), "asks for nothing"),
        ("reference_threshold = 1".to_owned(), "reference_threshold"),
        (
            format!(
                "reference_threshold = 0\nreference_signers = [\"ed25519:{}\"]",
                hex(32)
            ),
            "reference_threshold",
        ),
        (
            format!("reference_signers = [\"sha256:{}\"]", hex(32)),
            "ed25519:",
        ),
        ("[mitigations]\ncurrent = -1".to_owned(), "invalid"),
        (
            "[firmware]\nmin_current = \"1.55\"".to_owned(),
            "major, minor and build",
        ),
        (
            "[firmware]\nmin_current = \"1.55.+9\"".to_owned(),
            "major, minor and build",
        ),
        ("[guest_policy]\nmin_abi = \"1\"".to_owned(), "firmware ABI"),
        ("min_report_version = 6".to_owned(), "2, 3, 4 or 5"),
        ("signing_keys = [\"none\"]".to_owned(), "vcek"),
        (
            "provisional_firmware = true".to_owned(),
            "provisional_firmware",
        ),
        ("[crl]\nmode = \"off\"".to_owned(), "unknown variant"),
        ("[crl]\nmax_age = 3".to_owned(), "unknown field"),
    ] {
        let error = error(&text);
        assert!(error.contains(words), "{text}: {error}");
    }
    assert!(error("vmpl = [0]\nxyz = 1").contains("line 2"));
}

#[test]
fn the_size_is_bounded_and_the_text_is_utf8() {
    let long = vec![b'#'; MAX_POLICY_LEN + 1];
    assert!(matches!(
        OwnerPolicy::parse(&long),
        Err(PolicyError::TooLong(_))
    ));
    assert!(OwnerPolicy::parse(&long[1..]).is_ok());
    assert!(matches!(
        OwnerPolicy::parse(&[0xff]),
        Err(PolicyError::Utf8(_))
    ));
    let deep = format!("vmpl = {}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(matches!(
        OwnerPolicy::parse(deep.as_bytes()),
        Err(PolicyError::Toml(_))
    ));
}

#[test]
fn an_added_root_is_part_of_the_name() {
    let root = Fingerprint([3; 32]);
    let policy = OwnerPolicy::default().with_emulated_root(root);
    assert_eq!(policy.ids().len(), 2);
    assert!(policy.ids()[1].ends_with(&root.to_string()));
    assert_eq!(policy.digest(), OwnerPolicy::default().digest());
    assert!(!policy.rules().allow_emulated);
    assert!(OwnerPolicy::allowing_emulated(root).rules().allow_emulated);
}
