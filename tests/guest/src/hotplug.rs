//! Devices that come and go while the guest runs: what the kernel has made of them.

use std::fs::{self, File};
use std::io::Read;
use std::net::Ipv4Addr;

use crate::sys;

/// Whether a disk is there, its serial number, and its first bytes.
pub(crate) fn block(name: &str) -> String {
    if !is_device(name) {
        return failed("want the name of a disk");
    }
    let folder = format!("/sys/block/{name}");
    if !fs::exists(&folder).unwrap_or(false) {
        return "{\"ok\":true,\"there\":false,\"serial\":\"\",\"head\":\"\"}".to_owned();
    }
    let serial = fs::read_to_string(format!("{folder}/serial")).unwrap_or_default();
    let mut head = [0; HEAD];
    let read = File::open(format!("/dev/{name}")).and_then(|mut disk| disk.read_exact(&mut head));
    let head: String = head.iter().map(|byte| format!("{byte:02x}")).collect();
    format!(
        "{{\"ok\":{},\"there\":true,\"serial\":\"{}\",\"head\":\"{head}\"}}",
        read.is_ok(),
        serial.trim(),
    )
}

/// Whether a card is there; if so it is brought up with this address.
pub(crate) fn card(request: &str) -> String {
    let words = request.split_once(' ');
    let parsed = words.and_then(|(name, ip)| Some((name, ip.parse::<Ipv4Addr>().ok()?)));
    let Some((name, ip)) = parsed.filter(|(name, _)| is_device(name)) else {
        return failed("want the name of a card and an address");
    };
    let there = fs::exists(format!("/sys/class/net/{name}")).unwrap_or(false);
    let up = || {
        sys::interface_address(name, ip, Ipv4Addr::new(255, 255, 255, 0))
            .and_then(|()| sys::interface_up(name))
    };
    let ok = !there || up().is_ok();
    format!("{{\"ok\":{ok},\"there\":{there},\"serial\":\"\",\"head\":\"\"}}")
}

fn is_device(name: &str) -> bool {
    (1..16).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

fn failed(error: &str) -> String {
    format!("{{\"ok\":false,\"error\":\"{error}\"}}")
}

const HEAD: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_nowhere_else() {
        for wrong in ["", "../vda", "a b", "abcdefghijklmnop"] {
            assert!(block(wrong).starts_with("{\"ok\":false"), "{wrong}");
            assert!(
                card(&format!("{wrong} 10.0.0.1")).starts_with("{\"ok\":false"),
                "{wrong}"
            );
        }
        assert!(card("eth0").starts_with("{\"ok\":false"));
        assert!(block("nosuch").contains("\"there\":false"));
    }
}
