//! Frames of the migration stream: any bytes are a frame within its type's bounds or a refusal; what parses is written the
//! same; and a message of any type is decoded or refused. So is the preamble of a further connection.
#![no_main]

use casemate_crypto_migrate::preamble::{PREAMBLE_SIZE, Ticket};
use casemate_crypto_migrate::transcript::Manifest;
use casemate_crypto_migrate::wire::messages::{
    Abort, AcceptBody, Begin, Commit, Confirm, Join, Joined, Message, OfferBody, Probe, ProbeAck, RoundAck,
    RoundEnd, Running, Signed, State, Verified,
};
use casemate_crypto_migrate::wire::{Frame, FrameKind};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    preamble(bytes);
    let Ok(frame) = Frame::parse(bytes) else {
        return;
    };
    assert!(frame.payload.len() <= frame.kind.max_length());
    assert_eq!(frame.encode().unwrap(), bytes);
    let payload = frame.payload.as_slice();
    match frame.kind {
        FrameKind::Offer => signed::<OfferBody>(payload),
        FrameKind::Accept => signed::<AcceptBody>(payload),
        FrameKind::Confirm => message::<Confirm>(payload),
        FrameKind::Join => message::<Join>(payload),
        FrameKind::Joined => message::<Joined>(payload),
        FrameKind::Probe => message::<Probe>(payload),
        FrameKind::ProbeAck => message::<ProbeAck>(payload),
        FrameKind::Begin => message::<Begin>(payload),
        FrameKind::RoundEnd => message::<RoundEnd>(payload),
        FrameKind::RoundAck => message::<RoundAck>(payload),
        FrameKind::State => message::<State>(payload),
        FrameKind::Manifest => message::<Manifest>(payload),
        FrameKind::Verified => message::<Verified>(payload),
        FrameKind::Commit => message::<Commit>(payload),
        FrameKind::Running => message::<Running>(payload),
        FrameKind::Refuse | FrameKind::Abort => {
            if let Ok(abort) = Abort::decode(payload) {
                let told = abort.bounded().encode().unwrap();
                assert!(told.len() + 16 <= FrameKind::Abort.max_length());
            }
        }
        FrameKind::PageBatch => {}
    }
});

/// Read as the first bytes of a connection: a ticket between its borders, or nothing.
fn preamble(bytes: &[u8]) {
    let mut rest = bytes;
    let read = Ticket::read(&mut rest);
    if let Some(first) = bytes.first_chunk::<PREAMBLE_SIZE>() {
        assert_eq!(read.as_ref().ok(), Ticket::parse(first).as_ref());
        assert_eq!(rest.len(), bytes.len() - PREAMBLE_SIZE);
    } else {
        assert!(read.is_err());
    }
    if let Ok(ticket) = read {
        assert!(bytes.starts_with(&ticket.encode()));
    }
}

/// What decodes is written in no more bytes than it came in.
fn message<M: Message>(payload: &[u8]) {
    if let Ok(message) = M::decode(payload) {
        assert!(message.encode().unwrap().len() <= payload.len());
    }
}

fn signed<B: for<'de> serde::Deserialize<'de>>(payload: &[u8]) {
    if let Ok(signed) = postcard::from_bytes::<Signed>(payload) {
        let _ = postcard::from_bytes::<B>(&signed.body);
    }
}
