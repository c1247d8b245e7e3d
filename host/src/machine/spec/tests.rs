//! A good description, and everything that can be wrong with one.

use super::*;
use crate::machine::plan::devices::Rate;
use crate::machine::plan::{DEFAULT_SLOTS, Technology};

const OFFER: Offer = Offer {
    emulated: true,
    strongest: Strongest::SevSnp,
};

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["vmlinuz", "initrd", "data.raw"] {
        std::fs::write(folder.path().join(file), b"x").unwrap();
    }
    folder
}

const GOOD: &str = r#"name = "vault"
vcpus = 2
memory = "512 MiB"
[boot]
kernel = "vmlinuz"
initrd = "initrd"
cmdline = "console=ttyS0"
[confidential]
technology = "sev"
secret = true
[[disk]]
id = "data"
path = "data.raw"
[[net]]
id = "net0"
tap = "tap0"
bridge = "br0"
mac = "52:54:00:00:00:01"
announce = ["10.0.0.1"]
[vsock]
cid = 3
"#;

fn parse(text: &str) -> Result<MachineSpec, SpecError> {
    let folder = folder();
    MachineSpec::parse(&folder.path().join("vm.toml"), text)
}

#[test]
fn a_good_description_is_read_whole() {
    let spec = parse(GOOD).unwrap();
    assert_eq!((spec.vcpus, spec.memory_bytes), (2, 512 << 20));
    assert_eq!(
        spec.confidential,
        ConfidentialSpec::Sev(SevSpec {
            policy: 0x23,
            secret: true,
            owner_session: None,
        })
    );
    let plan = spec.plan([7; 16], OFFER);
    assert_eq!(
        plan.technology,
        Technology::Sev {
            emulated: true,
            policy: 0x23
        }
    );
    assert_eq!(plan.nets.first().unwrap().mac, [0x52, 0x54, 0, 0, 0, 1]);
}

#[test]
fn every_fault_names_its_line_its_key_and_what_would_be_right() {
    let cases = [
        ("vcpus = 2", "vcpus = 0", 2, "want 1 to 64"),
        ("vcpus = 2", "cpus = 2", 2, "unknown field `cpus`"),
        ("\"512 MiB\"", "\"512 MB\"", 3, "such as \"512 MiB\""),
        ("\"512 MiB\"", "\"99 GiB\"", 3, "to 64 GiB"),
        ("\"512 MiB\"", "\"9 GiB\"", 3, "confidential guest"),
        ("\"512 MiB\"", "\"513 MiB\"", 3, "multiple of 2 MiB"),
        (
            "kernel = \"vmlinuz\"",
            "kernel = \"nowhere\"",
            5,
            "`boot.kernel` names",
        ),
        (
            "technology = \"sev\"",
            "technology = \"tdx\"",
            9,
            "want \"none\", \"sev\"",
        ),
        ("secret = true", "policy = 0x22", 10, "NODBG"),
        ("\"data.raw\"", "\".\"", 13, "not a regular file"),
        ("\"data.raw\"", "\"/dev/null\"", 13, "or a block device"),
        ("\"vmlinuz\"", "\"/dev/null\"", 5, "not a regular file;"),
        ("\"tap0\"", "\"../tap\"", 16, "`net.tap`"),
        ("52:54:00:00:00:01", "53:54:00:00:00:01", 18, "unicast"),
        ("52:54:00:00:00:01", "52:54:00:00:00", 18, "`net.mac`"),
        (
            "announce = [\"10.0.0.1\"]",
            "queues = 9",
            19,
            "want 1 to 8 pairs",
        ),
        (
            "announce = [\"10.0.0.1\"]",
            "queues = 0",
            19,
            "`net.queues` is 0",
        ),
        ("cid = 3", "cid = 2", 21, "want 3"),
        ("name = \"vault\"", "name = \"Vault!\"", 1, "a-z"),
    ];
    for (from, to, line, words) in cases {
        let error = parse(&GOOD.replacen(from, to, 1)).unwrap_err();
        assert_eq!(error.line, Some(line), "{to}: {error}");
        assert!(error.to_string().contains(words), "{to}: {error}");
    }
}

/// The description of a plain guest, with these lines at its end.
fn plain_with(lines: &str) -> Result<MachineSpec, SpecError> {
    let plain = GOOD.replacen(
        "technology = \"sev\"\nsecret = true",
        "technology = \"none\"",
        1,
    );
    parse(&format!("{plain}{lines}"))
}

#[test]
fn small_devices_and_limits_are_read_and_checked() {
    let spec =
        plain_with("[rng]\n[balloon]\n[console]\ncolumns = 80\n[watchdog]\naction = \"report\"\n");
    let small = spec.unwrap().small;
    assert_eq!(small.count(), 4);
    assert_eq!(small.rng.unwrap().bytes.per_second, 1 << 20);
    let balloon = small.balloon.unwrap();
    assert!(balloon.free_page_reporting && balloon.deflate_on_oom);
    assert_eq!(
        (small.console.unwrap().columns, small.console.unwrap().rows),
        (80, 0)
    );
    let limit = |lines: &str| {
        plain_with(&format!(
            "[[disk]]\nid = \"b\"\npath = \"data.raw\"\nlimit = {{ {lines} }}\n"
        ))
    };
    let limits =
        limit("bytes_per_second = \"2 MiB\", operations_per_second = 100, operations_burst = 7");
    let limits = limits.unwrap().plan([7; 16], OFFER).disks[1].limits;
    let rate = |per_second, burst| Some(Rate { per_second, burst });
    assert_eq!(
        (limits.bytes, limits.operations),
        (rate(2 << 20, 2 << 20), rate(100, 7))
    );
    for (result, words) in [
        (
            plain_with("[watchdog]\naction = \"bark\"\n"),
            "want \"stop\", \"pause\" or \"report\"",
        ),
        (
            plain_with("[rng]\nbytes_per_second = \"0 MiB\"\n"),
            "`rng.bytes_per_second`",
        ),
        (plain_with("[balloon]\nsize = 3\n"), "unknown field `size`"),
        (
            limit("bytes_per_second = \"fast\""),
            "`disk.limit.bytes_per_second`",
        ),
        (limit("operations_per_second = 0"), "want 1 to"),
        (limit("operations_burst = 5"), "give both"),
        (
            parse(&format!("{GOOD}[balloon]\n")),
            "not for confidential guests",
        ),
    ] {
        let error = result.unwrap_err();
        assert!(
            error.line.is_some() && error.to_string().contains(words),
            "{error}"
        );
    }
}

#[test]
fn a_plain_guest_has_slots_and_a_confidential_one_has_none() {
    assert_eq!(plain_with("").unwrap().slots, DEFAULT_SLOTS);
    for slots in [0, 8] {
        let text = format!("[hotplug]\nslots = {slots}\n");
        assert_eq!(plain_with(&text).unwrap().slots, slots);
    }
    for wrong in ["slots = 9", "slots = -1", "slot = 1", ""] {
        let text = format!("[hotplug]\n{wrong}\n");
        assert!(plain_with(&text).is_err(), "{wrong}");
    }
    let sev = "technology = \"sev\"\n";
    assert_eq!(confidential(sev).unwrap().slots, 0);
    let refused = confidential(&format!("{sev}[hotplug]\nslots = 1\n")).unwrap_err();
    assert!(refused.problem.contains("confidential guests"), "{refused}");
}

#[test]
fn the_example_is_a_good_description() {
    let text = include_str!("../../../examples/microvm.toml").replace("initrd.cpio", "initrd");
    let spec = parse(&text).unwrap();
    assert_eq!(spec.confidential, ConfidentialSpec::None);
    spec.plan([7; 16], OFFER).check().unwrap();
}

#[test]
fn a_name_used_twice_is_refused() {
    let twice = format!("{GOOD}\n[[disk]]\nid = \"data\"\npath = \"data.raw\"\n");
    assert!(parse(&twice).unwrap_err().problem.contains("stands twice"));
}

#[test]
fn a_missing_file_is_named() {
    let error = MachineSpec::load(Path::new("/nowhere/vm.toml")).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("/nowhere/vm.toml: cannot be read"),
        "{error}"
    );
}

/// The description with another `[confidential]` section; `vault` is the folder's own file.
fn confidential(section: &str) -> Result<MachineSpec, SpecError> {
    parse(&GOOD.replacen("technology = \"sev\"\nsecret = true", section, 1))
}

#[test]
fn each_technology_has_its_keys_its_default_policy_and_no_others() {
    let technology = |section: &str| {
        confidential(section)
            .unwrap()
            .confidential
            .technology(OFFER)
    };
    let (emulated, sev, es, snp) = (true, 0x23, 0x27, 0x3_0000);
    for (section, wanted) in [
        ("technology = \"none\"", Technology::None),
        (
            "technology = \"sev\"",
            Technology::Sev {
                emulated,
                policy: sev,
            },
        ),
        (
            "technology = \"sev-es\"",
            Technology::SevEs {
                emulated,
                policy: es,
            },
        ),
        (
            "technology = \"sev-snp\"",
            Technology::SevSnp {
                emulated,
                policy: snp,
            },
        ),
        (
            "technology = \"auto\"",
            Technology::SevSnp {
                emulated,
                policy: snp,
            },
        ),
    ] {
        assert_eq!(technology(section), wanted, "{section}");
    }
    let weaker = Offer {
        strongest: Strongest::SevEs,
        ..OFFER
    };
    let auto = confidential("technology = \"auto\"").unwrap().confidential;
    assert_eq!(
        auto.technology(weaker),
        Technology::SevEs {
            emulated,
            policy: es
        }
    );

    let spec = confidential(&format!(
        "technology = \"sev-snp\"\nhost_data = \"{}\"\nid_block = \"data.raw\"\nid_auth = \"initrd\"\nvcek_disabled = true",
        "ab".repeat(32)
    ));
    let ConfidentialSpec::SevSnp(snp) = spec.unwrap().confidential else {
        panic!("not SEV-SNP");
    };
    assert_eq!((snp.host_data, snp.vcek_disabled), ([0xab; 32], true));
    assert!(snp.id.unwrap().block.ends_with("data.raw"));
}

#[test]
fn what_a_technology_cannot_have_is_refused_with_its_line() {
    let cases = [
        (
            "technology = \"auto\"\npolicy = 1",
            10,
            "means nothing under technology \"auto\"",
        ),
        (
            "technology = \"none\"\nsecret = true",
            10,
            "`confidential.secret` means nothing",
        ),
        (
            "technology = \"sev-snp\"\nsecret = true",
            10,
            "`confidential.secret` means nothing",
        ),
        (
            "technology = \"sev\"\nhost_data = \"00\"",
            10,
            "`confidential.host_data` means nothing",
        ),
        ("technology = \"sev\"\npolicy = 5", 10, "bit 2 (ES)"),
        ("technology = \"sev-es\"\npolicy = 1", 10, "bit 2 (ES)"),
        ("technology = \"sev-es\"\npolicy = 4", 10, "NODBG"),
        ("technology = \"sev\"\npolicy = 0x100000001", 10, "32 bits"),
        ("technology = \"sev-snp\"\npolicy = 0xb0000", 10, "DEBUG"),
        ("technology = \"sev-snp\"\npolicy = 0x10000", 10, "bit 17"),
        (
            "technology = \"sev-snp\"\nhost_data = \"00\"",
            10,
            "64 hex digits",
        ),
        (
            "technology = \"sev-snp\"\nid_block = \"initrd\"",
            10,
            "go together",
        ),
        (
            "technology = \"sev\"\nowner_session = \"initrd\"",
            10,
            "no folder",
        ),
    ];
    for (section, line, words) in cases {
        let error = confidential(section).unwrap_err();
        assert_eq!(error.line, Some(line), "{section}: {error}");
        assert!(error.to_string().contains(words), "{section}: {error}");
    }
}

#[test]
fn a_processor_is_read_and_a_wrong_one_is_named_with_what_is_right() {
    let with = |cpu: &str| parse(&GOOD.replacen("[boot]", &format!("[cpu]\n{cpu}\n[boot]"), 1));
    assert_eq!(parse(GOOD).unwrap().cpu, CpuPlan::default());
    let spec = with("model = \"epyc-rome\"\ncores = 1\nthreads = 2").unwrap();
    assert_eq!(spec.cpu.model, CpuModel::EpycRome);
    assert_eq!(spec.plan([7; 16], OFFER).cpu.topology(2).threads, 2);
    for (cpu, words) in [
        ("model = \"rome\"", "want one of baseline, epyc-naples"),
        ("cores = 3", "is not `vcpus`"),
        ("threads = 2", "`cpu.cores` is missing"),
        ("moddel = \"host\"", "moddel"),
    ] {
        let problem = with(cpu).unwrap_err().to_string();
        assert!(problem.contains(words), "{cpu}: {problem}");
    }
}

/// The schema that editors read is that of the types; `casemate vm schema > host/guest.schema.json` writes it.
#[test]
fn the_published_schema_is_the_one_of_this_version() {
    let published: serde_json::Value =
        serde_json::from_str(include_str!("../../../guest.schema.json")).unwrap();
    assert_eq!(serde_json::to_value(schema()).unwrap(), published);
}

/// Every key that the reader takes is in the schema with a word of explanation, and no other is allowed.
#[test]
fn every_key_of_the_schema_is_explained_and_no_other_is_allowed() {
    let schema = serde_json::to_value(schema()).unwrap();
    let mut tables = vec![&schema];
    let named = schema["$defs"].as_object().unwrap().values();
    tables.extend(named.filter(|table| table["type"] == "object"));
    assert!(tables.len() >= 10, "{}", tables.len());
    for table in tables {
        assert_eq!(table["additionalProperties"], false, "{table}");
        for (key, value) in table["properties"].as_object().unwrap() {
            assert!(value["description"].is_string(), "{key}: {value}");
        }
    }
}

#[test]
fn firmware_stands_in_place_of_a_kernel_and_in_front_of_one_in_a_confidential_guest() {
    let kernel = "kernel = \"vmlinuz\"\ninitrd = \"initrd\"\ncmdline = \"console=ttyS0\"";
    let plain = GOOD.replacen(
        "[confidential]\ntechnology = \"sev\"\nsecret = true\n",
        "",
        1,
    );
    let with = |text: &str, length: u64| {
        let folder = folder();
        let file = File::create(folder.path().join("fw.fd")).unwrap();
        file.set_len(length).unwrap();
        let spec = MachineSpec::parse(&folder.path().join("vm.toml"), text);
        spec.map_err(|e| e.to_string())
    };
    let firmware = plain.replacen(kernel, "firmware = \"fw.fd\"", 1);
    let spec = with(&firmware, (3 << 20) + 1).unwrap();
    let plan = spec.plan([7; 16], OFFER);
    assert_eq!(plan.firmware.unwrap().rom_bytes, 4 << 20);
    assert_eq!(plan.mapped_bytes(), (512 << 20) + (4 << 20));
    assert_eq!((plan.cmdline.as_str(), spec.boot.kernel()), ("", None));
    plan.check().unwrap();
    let measured = GOOD.replacen(kernel, &format!("firmware = \"fw.fd\"\n{kernel}"), 1);
    let spec = with(&measured, 1 << 20).unwrap();
    assert_eq!(spec.boot.files().len(), 3);
    assert!(spec.boot.kernel().is_some() && spec.boot.firmware().is_some());
    let plan = spec.plan([7; 16], OFFER);
    assert_eq!(plan.firmware.unwrap().rom_bytes, 2 << 20);
    assert_eq!(plan.cmdline, "console=ttyS0");
    for (text, length, words) in [
        (firmware.clone(), 0, "at most 16 MiB"),
        (firmware.clone(), (16 << 20) + 1, "at most 16 MiB"),
        (
            plain.replacen(kernel, &format!("firmware = \"fw.fd\"\n{kernel}"), 1),
            1 << 20,
            "leave `kernel`",
        ),
        (
            plain.replacen(kernel, "kernel = \"vmlinuz\"", 1),
            1 << 20,
            "either `firmware`, or `kernel`",
        ),
        (
            GOOD.replacen(kernel, "firmware = \"fw.fd\"", 1),
            1 << 20,
            "starts what it can check",
        ),
    ] {
        let error = with(&text, length).unwrap_err();
        assert!(error.contains(words), "{words}: {error}");
    }
}
