//! The guest's attestation report, by the program that real guests have for it.

use std::process::{Command, Stdio};

/// Where the initramfs has it.
const AGENT: &str = "/bin/casemate-agent";

/// Asks the agent for a report over `nonce` (hex, as the request gave it): a JSON object with the report in hex, or
/// with what the agent said instead.
pub(crate) fn answer(nonce: &str) -> String {
    let plain = |text: &str| text.bytes().all(|b| b.is_ascii_hexdigit());
    if nonce.is_empty() || !plain(nonce) {
        return failed("a nonce is 1 to 64 bytes in hex");
    }
    let ran = Command::new(AGENT)
        .args(["report", "--nonce", nonce])
        .stdin(Stdio::null())
        .output();
    let output = match ran {
        Ok(output) => output,
        Err(error) => return failed(&format!("{AGENT}: {error}")),
    };
    let report = String::from_utf8_lossy(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    match report.trim() {
        report if output.status.success() && plain(report) => {
            format!(
                "{{\"ok\":true,\"report\":\"{report}\",\"said\":\"{}\"}}",
                shown(&said)
            )
        }
        _ => failed(&said),
    }
}

fn failed(error: &str) -> String {
    format!("{{\"ok\":false,\"error\":\"{}\"}}", shown(error))
}

/// Text that needs no escape in JSON.
fn shown(text: &str) -> String {
    text.trim()
        .chars()
        .map(|c| match c {
            '"' | '\\' => '\'',
            c if c.is_control() => ' ',
            c => c,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_nonce_never_becomes_an_argument() {
        for nonce in ["", "0x00", "--help", "00 --out /x", "zz"] {
            assert!(
                answer(nonce).starts_with("{\"ok\":false,\"error\":\"a nonce"),
                "{nonce}"
            );
        }
    }

    #[test]
    fn what_the_agent_says_is_one_line_of_json() {
        assert_eq!(
            failed("a \"b\"\n\\c\n"),
            "{\"ok\":false,\"error\":\"a 'b' 'c\"}"
        );
    }
}
