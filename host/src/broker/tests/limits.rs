//! Bad input and too much of it, over HTTP.

use casemate_attest::broker::protocol::{MAX_ATTESTATION_LEN, MAX_REQUEST_LEN};
use rustls_pki_types::pem::PemObject;
use serde_json::json;

use super::*;

#[test]
fn malformed_bodies_are_refused_at_each_step() {
    let case = Case::new();
    let running = case.start();
    for body in ["", "{", "[]", "{\"version\":\"0.4.0\"}", "\u{0}", "\"snp\""] {
        let reply = running.ask("POST", "/kbs/v0/auth", None, body.as_bytes());
        assert_eq!(
            (reply.status, reply.code()),
            (400, "MALFORMED".into()),
            "{body:?}"
        );
        let (session, _) = running.open();
        let reply = running.ask("POST", "/kbs/v0/attest", Some(&session), body.as_bytes());
        assert_eq!(
            (reply.status, reply.code()),
            (400, "MALFORMED".into()),
            "{body:?}"
        );
        // A nonce serves once, whatever it was answered with.
        let reply = running.ask("POST", "/kbs/v0/attest", Some(&session), b"{}");
        assert_eq!(reply.code(), "NO_SESSION");
    }
}

#[test]
fn unknown_tees_and_versions_are_refused() {
    let case = Case::new();
    let running = case.start();
    let auth = |version: &str, tee: &str| {
        let body = json!({ "version": version, "tee": tee, "extra-params": "" }).to_string();
        let reply = running.ask("POST", "/kbs/v0/auth", None, body.as_bytes());
        (reply.status, (reply.status != 200).then(|| reply.code()))
    };
    assert_eq!(auth("0.4.0", "snp"), (200, None));
    assert_eq!(auth("0.4.0", "tdx"), (401, Some("UNKNOWN_TEE".into())));
    assert_eq!(auth("0.4.0", "sample"), (401, Some("UNKNOWN_TEE".into())));
    assert_eq!(auth("0.1.0", "snp"), (401, Some("PROTOCOL_VERSION".into())));
    assert_eq!(auth("1.0.0", "snp"), (401, Some("PROTOCOL_VERSION".into())));
}

#[test]
fn long_bodies_are_refused_declared_or_not() {
    let case = Case::new();
    let running = case.start();
    for (path, limit) in [
        ("/kbs/v0/auth", MAX_REQUEST_LEN),
        ("/kbs/v0/attest", MAX_ATTESTATION_LEN),
    ] {
        let reply = running.ask("POST", path, None, &vec![b' '; limit + 1]);
        assert_eq!((reply.status, reply.code()), (413, "BODY_TOO_LARGE".into()));
        let mut stream = TcpStream::connect(running.address).unwrap();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: b\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        let chunk = format!("{:x}\r\n{}\r\n", limit, " ".repeat(limit));
        let _ = stream.write_all(chunk.as_bytes());
        let _ = stream.write_all(b"1\r\n \r\n0\r\n\r\n");
        assert_eq!(read_reply(&mut stream).status, 413);
    }
    let head = format!("GET /{} HTTP/1.1\r\nHost: b\r\n\r\n", "x".repeat(64 * 1024));
    let mut stream = TcpStream::connect(running.address).unwrap();
    let _ = stream.write_all(head.as_bytes());
    assert!((400..500).contains(&read_reply(&mut stream).status));
}

#[test]
fn other_paths_and_methods_lead_nowhere() {
    let case = Case::new();
    let running = case.start();
    for (method, path, status) in [
        ("GET", "/", 404),
        ("GET", "/kbs/v0/auth", 405),
        ("POST", "/kbs/v0/token", 404),
        ("POST", "/kbs/v0/resource/default/key/disk", 405),
        ("DELETE", "/kbs/v0/resource/default/key/disk", 405),
        ("GET", "/kbs/v1/resource/default/key/disk", 404),
        ("GET", "/kbs/v0/resource/default/key/disk", 401),
        ("GET", "/kbs/v0/../v0/resource/default/key/disk", 404),
    ] {
        let reply = running.ask(method, path, None, b"");
        assert_eq!(reply.status, status, "{method} {path}");
    }
    let mut client = running.client();
    client.attest(&mut Emulated::default()).unwrap();
    let (session, _) = running.open();
    for path in [
        "default/key",
        "default/key/disk/more",
        "..%2f/key/disk",
        "a/b/.c",
    ] {
        assert_eq!(running.resource(&session, path).status, 401, "{path}");
    }
}

#[test]
fn a_thousand_sessions_and_no_more() {
    let case = Case::new();
    let running = case.start();
    for _ in 0..1000 {
        running.open();
    }
    let body = casemate_attest::broker::protocol::Request::message().to_string();
    let reply = running.ask("POST", "/kbs/v0/auth", None, body.as_bytes());
    assert_eq!(
        (reply.status, reply.code()),
        (503, "TOO_MANY_SESSIONS".into())
    );
    running.clock.0.store(60, Ordering::SeqCst);
    running.open();
}

#[test]
fn connections_are_counted_and_one_that_waits_holds_up_no_other() {
    let case = Case::new();
    case.configure("[limits]\nconnections = 2\n");
    let running = case.start();
    let idle = TcpStream::connect(running.address).unwrap();
    let mut half = TcpStream::connect(running.address).unwrap();
    half.write_all(b"POST /kbs/v0/auth HTTP/1.1\r\nHost: b\r\nContent-Length: 100\r\n\r\n{")
        .unwrap();
    // Both were accepted in their order before the third.
    let mut third = TcpStream::connect(running.address).unwrap();
    let _ = third.write_all(b"GET / HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n");
    assert_eq!(read_reply(&mut third).status, 0);
    drop(idle);
    // The place is free as soon as the broker has seen the end.
    let mut reply = running.ask("GET", "/", None, b"");
    for _ in 0..10_000 {
        if reply.status != 0 {
            break;
        }
        std::thread::yield_now();
        reply = running.ask("GET", "/", None, b"");
    }
    assert_eq!(reply.status, 404);
    drop(half);
}

#[test]
fn tls_is_spoken_and_plain_http_to_it_is_not() {
    let case = Case::new();
    let made = rcgen::generate_simple_self_signed(["broker.example".to_owned()]).unwrap();
    case.write("tls.crt", &made.cert.pem());
    case.write("tls.key", &made.signing_key.serialize_pem());
    case.configure("[tls]\ncertificate = \"tls.crt\"\nkey = \"tls.key\"\n");
    let running = case.start();
    let mut roots = rustls::RootCertStore::empty();
    let der = rustls_pki_types::CertificateDer::from_pem_slice(made.cert.pem().as_bytes());
    roots.add(der.unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = "broker.example".try_into().unwrap();
    let session = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let stream = TcpStream::connect(running.address).unwrap();
    let mut stream = rustls::StreamOwned::new(session, stream);
    let body = casemate_attest::broker::protocol::Request::message().to_string();
    let head = format!(
        "POST /kbs/v0/auth HTTP/1.1\r\nHost: b\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let reply = read_reply(&mut stream);
    assert_eq!(reply.status, 200);
    assert!(reply.head.contains("; secure"), "{}", reply.head);
    let plain = running.ask("GET", "/", None, b"");
    assert_eq!(plain.status, 0);
}

#[test]
fn what_is_under_way_ends_at_a_shutdown() {
    let case = Case::new();
    let mut running = case.start();
    let body = casemate_attest::broker::protocol::Request::message().to_string();
    let (first, second) = body.split_at(5);
    let head = format!(
        "POST /kbs/v0/auth HTTP/1.1\r\nHost: b\r\nContent-Length: {}\r\n\r\n{first}",
        body.len()
    );
    let mut stream = TcpStream::connect(running.address).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    // An answer on a later connection: the earlier one has been accepted.
    running.open();
    running.end.take().unwrap().send(()).unwrap();
    stream.write_all(second.as_bytes()).unwrap();
    assert_eq!(read_reply(&mut stream).status, 200);
    running.finish();
    assert!(TcpStream::connect(running.address).is_err());
}
