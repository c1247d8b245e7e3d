//! The records against rustls's own, and against a peer that bends them.

use std::io::{Read, Write};
use std::sync::Arc;
use std::thread;

use rustls::server::{ServerConfig, ServerConnection};

use super::verify::parts;
use super::*;
use crate::crypto::Provider;
use crate::dev_ca::{DevCa, HostMaterial};
use crate::identity::{AllowList, AllowedPeer, Local, Path, TrustAnchors};

#[test]
fn rustls_reads_what_is_sent_and_is_read() {
    for &provider in Provider::ALL {
        for update_after in [UNLIMITED, 3] {
            let (near, far) = UnixStream::pair().unwrap();
            let (client, server) = locals(provider);
            let echo = thread::spawn(move || echo(far, &server));
            let mut tls = connect(near, &client, TIME).unwrap();
            tls.sender.update_after(update_after);
            for length in LENGTHS {
                let sent = pattern(length);
                tls.write_all(&mut sent.clone(), deadline()).unwrap();
                let mut back = vec![0; length];
                tls.read_exact(&mut back, deadline(), &|| false).unwrap();
                assert!(back == sent, "{provider} {length} {update_after}");
            }
            tls.finish(deadline()).unwrap();
            tls.linger(deadline());
            let received = echo.join().unwrap();
            assert_eq!(received, LENGTHS.iter().sum::<usize>());
        }
    }
}

#[test]
fn both_ends_update_their_keys_long_before_the_bound_and_read_on() {
    for &provider in Provider::ALL {
        let (mut client, mut server) = pair(provider);
        client.sender.update_after(2);
        server.sender.update_after(5);
        let sent = pattern(3 << 20);
        let copy = sent.clone();
        let other = thread::spawn(move || {
            let mut got = vec![0; copy.len()];
            server.read_exact(&mut got, deadline(), &|| false).unwrap();
            assert!(got == copy);
            server.write_all(&mut got, deadline()).unwrap();
            assert!(got != copy, "what is left is ciphertext");
            server
        });
        client.write_all(&mut sent.clone(), deadline()).unwrap();
        let mut back = vec![0; sent.len()];
        client.read_exact(&mut back, deadline(), &|| false).unwrap();
        assert!(back == sent);
        let server = other.join().unwrap();
        // A group of eight records may follow the limit.
        assert!(client.sender.sequence() <= 10 && server.sender.sequence() <= 13);
    }
}

#[test]
fn a_record_that_was_changed_cut_swapped_or_sent_again_is_refused() {
    let (one, two) = (pattern(20_000), pattern(30_000));
    let changes: [fn(&mut Vec<Vec<u8>>); 9] = [
        |records| records[0][100] ^= 1,
        |records| *records[1].last_mut().unwrap() ^= 0x80,
        |records| records.swap(0, 1),
        |records| {
            let again = records[0].clone();
            records.insert(1, again);
        },
        |records| drop(records.remove(0)),
        |records| records[0][0] = 22,   // another content type outside
        |records| records[0][3] = 0xff, // a length that no record has
        |records| {
            records[0].truncate(RECORD_HEADER + 5);
            records[0][3..5].copy_from_slice(&[0, 5]); // too short for a tag
        },
        |records| {
            let length = records[0].len() - RECORD_HEADER - 1;
            records[0].pop();
            records[0][3..5].copy_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
        },
    ];
    for (number, change) in changes.iter().enumerate() {
        let (mut client, mut server) = pair(Provider::default());
        let mut tap = Tap::default();
        for bytes in [&one, &two] {
            let sender = &mut client.sender;
            let mut bytes = [bytes.as_slice(), &[0]].concat();
            sender.send(&mut tap, &mut bytes, deadline()).unwrap();
        }
        let mut records = tap.records();
        assert!(records.len() > 2);
        change(&mut records);
        client.io.write_all(&records.concat()).unwrap();
        client.io.shutdown(std::net::Shutdown::Write).unwrap();
        let mut got = vec![0; 50_000];
        let error = server.read_exact(&mut got, deadline(), &|| false);
        let code = error.unwrap_err().code();
        assert!(
            matches!(code, Code::TlsFailed | Code::StreamTruncated),
            "{number}: {code}"
        );
    }
}

#[test]
fn alerts_end_and_anything_else_than_a_key_update_is_refused() {
    let refused = |content: u8, message: &[u8]| {
        let (mut client, mut server) = pair(Provider::default());
        let mut message = [message, &[0]].concat();
        let sender = &mut client.sender;
        sender
            .raw(&mut client.io, content, &mut message, deadline())
            .unwrap();
        client.finish(deadline()).unwrap();
        let error = server.read_exact(&mut [0; 4], deadline(), &|| false);
        error.unwrap_err().code()
    };
    assert_eq!(refused(21, &[1, 0]), Code::StreamTruncated, "close_notify");
    assert_eq!(refused(21, &[2, 40]), Code::TlsRefusedByPeer);
    assert_eq!(refused(21, &[2]), Code::TlsFailed);
    assert_eq!(refused(22, &[4, 0, 0, 0]), Code::TlsFailed, "a ticket");
    assert_eq!(refused(22, &[24, 0, 0, 1, 2]), Code::TlsFailed);
    assert_eq!(refused(22, &[24, 0, 0, 1, 0, 0]), Code::TlsFailed);
    assert_eq!(refused(20, &[1]), Code::TlsFailed, "compatibility mode");
    assert_eq!(refused(0, &[0, 0, 0]), Code::TlsFailed, "padding only");
    assert_eq!(
        refused(23, b"abc"),
        Code::StreamTruncated,
        "data, one short"
    );
}

#[test]
fn a_key_update_makes_the_peer_readable_for_nobody() {
    let (mut client, mut server) = pair(Provider::default());
    assert!(!server.readable().unwrap());
    client.sender.update(&mut client.io, deadline()).unwrap();
    assert!(!server.readable().unwrap());
    client.write_all(&mut b"data".to_vec(), deadline()).unwrap();
    assert!(server.readable().unwrap());
    let mut data = [0; 4];
    server.read_exact(&mut data, deadline(), &|| false).unwrap();
    assert_eq!(&data, b"data");
}

#[test]
fn bytes_that_trickle_are_put_together() {
    let (mut client, mut server) = pair(Provider::default());
    let sent = pattern(40_000);
    let mut tap = Tap::default();
    let mut bytes = [sent.as_slice(), &[0]].concat();
    client
        .sender
        .send(&mut tap, &mut bytes, deadline())
        .unwrap();
    let trickle = thread::spawn(move || {
        for piece in tap.0.chunks(977) {
            client.io.write_all(piece).unwrap();
        }
        client
    });
    let mut got = vec![0; sent.len()];
    server.read_exact(&mut got, deadline(), &|| false).unwrap();
    assert!(got == sent);
    drop(trickle.join().unwrap());
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(48))]

    /// Whatever a peer sends after the handshake, in pieces of any size: a record that was sealed, or a refusal.
    #[test]
    fn rubbish_is_refused_without_waiting(
        rubbish in proptest::collection::vec(proptest::prelude::any::<u8>(), 1..600),
        as_record: bool,
    ) {
        let (mut client, mut server) = pair(Provider::default());
        let mut bytes = rubbish;
        if as_record {
            let length = u16::try_from(bytes.len()).unwrap().to_be_bytes();
            bytes.splice(0..0, [23, 3, 3, length[0], length[1]]);
        }
        client.io.write_all(&bytes).unwrap();
        client.io.shutdown(std::net::Shutdown::Write).unwrap();
        let error = server.read_exact(&mut [0; 1], deadline(), &|| false).unwrap_err();
        proptest::prop_assert!(matches!(error.code(), Code::TlsFailed | Code::StreamTruncated));
    }
}

/// Echoes by rustls's own records, updating its key now and then; returns how many bytes came.
fn echo(mut stream: UnixStream, local: &Local) -> usize {
    let (provider, verifier) = parts(local);
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(local.identity.resolver());
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    let mut connection = ServerConnection::new(Arc::new(config)).unwrap();
    let (mut received, mut piece) = (0, vec![0; 10_000]);
    loop {
        let mut tls = rustls::Stream::new(&mut connection, &mut stream);
        match tls.read(&mut piece) {
            Ok(0) | Err(_) => return received,
            Ok(count) => {
                tls.write_all(&piece[..count]).unwrap();
                received += count;
            }
        }
        connection.refresh_traffic_keys().unwrap();
    }
}

fn pair(provider: Provider) -> (TlsStream<UnixStream>, TlsStream<UnixStream>) {
    let (near, far) = UnixStream::pair().unwrap();
    let (client, server) = locals(provider);
    let server = thread::spawn(move || accept(far, &server, TIME).unwrap());
    (
        connect(near, &client, TIME).unwrap(),
        server.join().unwrap(),
    )
}

fn locals(provider: Provider) -> (Local, Local) {
    let ca = DevCa::new("tls").unwrap();
    let (a, b) = (ca.issue("a.test").unwrap(), ca.issue("b.test").unwrap());
    let local = |own: &HostMaterial, peer: &HostMaterial| Local {
        identity: own.identity().unwrap(),
        anchors: TrustAnchors::from_pem(ca.certificate_pem()).unwrap(),
        allow: AllowList::new(vec![AllowedPeer {
            name: "peer".into(),
            identity: peer.pinned().unwrap(),
            path: Path::Direct,
        }]),
        provider,
    };
    (local(&a, &b), local(&b, &a))
}

/// Keeps what is written.
#[derive(Default)]
struct Tap(Vec<u8>);

impl Tap {
    fn records(&self) -> Vec<Vec<u8>> {
        let mut rest = self.0.as_slice();
        let mut records = Vec::new();
        while let [_, _, _, high, low, ..] = *rest {
            let length = RECORD_HEADER + usize::from(u16::from_be_bytes([high, low]));
            let (record, after) = rest.split_at(length);
            records.push(record.to_vec());
            rest = after;
        }
        records
    }
}

impl Read for Tap {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }
}

impl Write for Tap {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Transport for Tap {
    fn set_read_timeout(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
    fn set_write_timeout(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
    fn set_nonblocking(&self, _: bool) -> io::Result<()> {
        Ok(())
    }
    fn close(&self) -> io::Result<()> {
        Ok(())
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7 + at / 251) as u8).collect()
}

fn deadline() -> Instant {
    Instant::now() + TIME
}

const TIME: Duration = Duration::from_secs(10);
const UNLIMITED: u64 = u64::MAX;
const RECORD_HEADER: usize = 5;
/// Around the sizes of a small record, of a record's content and of a group.
const LENGTHS: [usize; 11] = [
    1, 16, 63, 64, 65, 16_383, 16_384, 16_385, 131_071, 131_072, 131_073,
];
