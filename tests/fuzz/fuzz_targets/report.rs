//! SNP reports: any bytes are a report or a typed refusal, and what is read is what was there.
#![no_main]

use casemate_attest::report::Report;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(report) = Report::parse(bytes) else {
        return;
    };
    assert_eq!(report.as_bytes().as_slice(), bytes);
    assert_eq!(report.signed_bytes(), &bytes[..0x2a0]);
    let _ = (report.signature(), report.product(), report.cpuid());
    let _ = format!("{report:?} {} {}", report.policy(), report.platform_info());
});
