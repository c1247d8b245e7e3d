//! Listens on a site's links for the frames by which a guest that has arrived makes itself known.

use std::fs::File;
use std::io::Read;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Result, io};
use crate::network::Namespace;
use crate::sys::packet_socket;

/// Two packet sockets in one namespace.
pub struct Announcements {
    arp: File,
    rarp: File,
}

/// What was heard of one guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// A gratuitous ARP: sender and target are the guest's address.
    pub gratuitous_arp: bool,
    /// A RARP from the guest's MAC address.
    pub rarp: bool,
}

impl Announcements {
    /// Begins to listen.
    pub fn listen(namespace: &Arc<Namespace>) -> Result<Self> {
        let open = |ether_type| {
            namespace
                .run(|| packet_socket(ether_type))?
                .map_err(io("open a packet socket"))
        };
        Ok(Self {
            arp: open(ARP)?,
            rarp: open(RARP)?,
        })
    }

    /// What was heard since, waiting for it at most `time`.
    pub fn heard(&mut self, mac: [u8; 6], ip: Ipv4Addr, time: Duration) -> Heard {
        let deadline = Instant::now() + time;
        let mut heard = Heard::default();
        loop {
            let mut frame = [0u8; 256];
            // Nothing there is an error that passes.
            while let Ok(length @ 1..) = self.arp.read(&mut frame) {
                heard.gratuitous_arp |=
                    is_gratuitous(frame.get(..length).unwrap_or_default(), mac, ip);
            }
            while let Ok(length @ 1..) = self.rarp.read(&mut frame) {
                heard.rarp |= is_from(frame.get(..length).unwrap_or_default(), mac, RARP);
            }
            if (heard.gratuitous_arp && heard.rarp) || Instant::now() > deadline {
                return heard;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

fn is_from(frame: &[u8], mac: [u8; 6], ether_type: u16) -> bool {
    frame.get(6..12) == Some(&mac) && frame.get(12..14) == Some(&ether_type.to_be_bytes())
}

fn is_gratuitous(frame: &[u8], mac: [u8; 6], ip: Ipv4Addr) -> bool {
    let address = Some(ip.octets());
    let field = |at: usize| {
        frame
            .get(at..at + 4)
            .and_then(|bytes| <[u8; 4]>::try_from(bytes).ok())
    };
    is_from(frame, mac, ARP) && field(SENDER) == address && field(TARGET) == address
}

const ARP: u16 = 0x0806;
const RARP: u16 = 0x8035;
/// Protocol addresses in an ARP frame, the Ethernet header included (RFC 826).
const SENDER: usize = 14 + 14;
const TARGET: usize = 14 + 24;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_guests_own_announcement_counts() {
        let (mac, ip) = ([2, 0, 0, 0, 0, 7], Ipv4Addr::new(10, 0, 0, 7));
        let arp = |sender: Ipv4Addr, target: Ipv4Addr| {
            let mut frame = [
                &[0xff; 6][..],
                &mac,
                &[8, 6],
                &[0; 14],
                &sender.octets(),
                &[0; 6],
            ]
            .concat();
            frame.extend(target.octets());
            frame
        };
        assert!(is_gratuitous(&arp(ip, ip), mac, ip));
        assert!(!is_gratuitous(
            &arp(ip, Ipv4Addr::new(10, 0, 0, 1)),
            mac,
            ip
        ));
        assert!(!is_gratuitous(&arp(ip, ip), [2; 6], ip));
        assert!(!is_gratuitous(&arp(ip, ip)[..40], mac, ip));
        assert!(!is_from(&arp(ip, ip), mac, RARP));
    }
}
