//! What passes between an SNP guest and the software secure processor: what is refused, and what
//! keys a guest can derive.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod snp_common;

use casemate_attest::processor::FirmwareError;
use casemate_attest::processor::snp::forge::Authority;
use casemate_attest::processor::snp::{
    GuestChannel, KeyRequest, KeySelect, MESSAGE_HEADER_LEN, MessageError, MessageType,
    Personality, SnpLaunchFinish, SnpProcessor,
};
use casemate_attest::product::Product;
use snp_common::{
    FINISH, Owner, START, channel, key, load, processor, running, running_with, started,
};

const DATA: [u8; 64] = [0xda; 64];

#[test]
fn a_message_counts_once() {
    let mut processor = processor(Product::Genoa);
    let (handle, secrets) = running(&mut processor);
    let mut guest = channel(&secrets);
    let first = guest.report_request(&DATA, 0, KeySelect::Any).unwrap();
    let reply = processor.guest_request(handle, &first).unwrap();
    // Repeated.
    let refused = Err(FirmwareError::InvalidParam);
    assert_eq!(processor.guest_request(handle, &first), refused);
    let one = guest.report(&reply).unwrap();
    // The guest does not take the old reply either.
    assert_eq!(guest.report(&reply), Err(MessageError::NotTheReply));

    let second = guest.report_request(&DATA, 0, KeySelect::Any).unwrap();
    let mut ahead = channel(&secrets);
    // A guest that runs ahead of the firmware, its replies made up from the real channel's.
    assert_eq!(ahead.report(&reply).unwrap(), one);
    let again = processor.guest_request(handle, &second).unwrap();
    ahead.report(&again).unwrap();
    let third = ahead.report_request(&DATA, 0, KeySelect::Any).unwrap();
    let restarted = {
        let mut other = snp_common::processor(Product::Genoa);
        let handle = started(&mut other, START);
        load(&mut other, handle);
        other.launch_finish(handle, &FINISH).unwrap();
        other.guest_request(handle, &third)
    };
    // To a guest that has said nothing yet, the third is skipped ahead.
    assert_eq!(restarted, refused);
    processor.guest_request(handle, &third).unwrap();
    assert_eq!(processor.guest_request(handle, &second), refused);

    // Every VMPCK counts for itself.
    for vmpck in 1..4 {
        let mut guest = GuestChannel::new(&secrets, vmpck).unwrap();
        let request = guest.report_request(&DATA, 3, KeySelect::Any).unwrap();
        let reply = processor.guest_request(handle, &request).unwrap();
        guest.report(&reply).unwrap();
    }
    assert!(GuestChannel::new(&secrets, 4).is_err());
}

#[test]
fn a_changed_message_is_refused_and_the_right_one_still_counts() {
    let mut processor = processor(Product::Milan);
    let (handle, secrets) = running(&mut processor);
    let mut guest = channel(&secrets);
    let request = guest.report_request(&DATA, 0, KeySelect::Any).unwrap();
    for at in 0..request.len() {
        let mut changed = request.clone();
        changed[at] ^= 0x40;
        let error = processor.guest_request(handle, &changed).unwrap_err();
        let expected = match at {
            0x00..0x10 | 0x34 | 0x35 | 0x60.. => FirmwareError::BadMeasurement,
            0x36 => {
                let needed = 0x60 + (96 ^ 0x40);
                // 96 ^ 0x40 is shorter, so the message is there and its tag is wrong.
                assert!(needed < request.len());
                FirmwareError::BadMeasurement
            }
            _ => FirmwareError::InvalidParam,
        };
        assert_eq!(error, expected, "{at:#x}");
    }
    for cut in [0, 0x5f, 0x60, request.len() - 1] {
        assert!(matches!(
            processor.guest_request(handle, &request[..cut]),
            Err(FirmwareError::InvalidLength { .. })
        ));
    }
    // Another guest's key, and another VMPCK of the same guest.
    let (_, others) = running(&mut processor);
    let foreign = channel(&others)
        .report_request(&DATA, 0, KeySelect::Any)
        .unwrap();
    let refused = Err(FirmwareError::BadMeasurement);
    assert_eq!(processor.guest_request(handle, &foreign), refused);
    let mut relabelled = request.clone();
    relabelled[0x3c] = 1;
    assert_eq!(processor.guest_request(handle, &relabelled), refused);

    let reply = processor.guest_request(handle, &request).unwrap();
    for at in 0..reply.len() {
        let mut changed = reply.clone();
        changed[at] ^= 0x40;
        assert_eq!(
            guest.report(&changed),
            Err(MessageError::NotTheReply),
            "{at:#x}"
        );
    }
    // The host hands the request back as if it were the reply.
    assert_eq!(guest.report(&request), Err(MessageError::NotTheReply));
    guest.report(&reply).unwrap();
}

#[test]
fn what_a_request_may_not_say_is_answered_with_a_status() {
    let mut processor = processor(Product::Milan);
    let (handle, secrets) = running(&mut processor);
    let mut guest = GuestChannel::new(&secrets, 2).unwrap();
    let mut ask = |msg_type, version, payload: &[u8]| {
        let request = guest.request(msg_type, version, payload).unwrap();
        let reply = processor.guest_request(handle, &request).unwrap();
        match msg_type {
            MessageType::ReportRequest => guest.report(&reply).map(drop),
            _ => guest.key(&reply).map(drop),
        }
    };
    let report = |vmpl: u8, select: u8| {
        let mut payload = [0; 96];
        payload[64] = vmpl;
        payload[68] = select;
        payload
    };
    let invalid = Err(MessageError::Status(0x16));
    use MessageType::{KeyRequest as Key, ReportRequest as Ask};
    assert_eq!(ask(Ask, 1, &report(2, 0)), Ok(()));
    assert_eq!(ask(Ask, 1, &report(3, 1)), Ok(()));
    assert_eq!(ask(Ask, 1, &report(1, 0)), invalid, "above its VMPCK");
    assert_eq!(ask(Ask, 1, &report(4, 0)), invalid);
    assert_eq!(ask(Ask, 1, &report(2, 3)), invalid);
    assert_eq!(ask(Ask, 2, &report(2, 0)), invalid);
    assert_eq!(ask(Ask, 1, &report(2, 0)[..95]), invalid);
    assert_eq!(ask(Ask, 1, &[]), invalid);
    let mut reserved = report(2, 0);
    reserved[95] = 1;
    assert_eq!(ask(Ask, 1, &reserved), invalid);
    assert_eq!(
        ask(Ask, 1, &report(2, 2)),
        Err(MessageError::Status(0x27)),
        "no VLEK"
    );

    let mut key = [0; 40];
    key[16] = 2;
    assert_eq!(ask(Key, 1, &key[..32]), Ok(()));
    assert_eq!(ask(Key, 2, &key), Ok(()));
    assert_eq!(ask(Key, 1, &key), invalid);
    assert_eq!(ask(Key, 2, &key[..32]), invalid);
    assert_eq!(ask(Key, 3, &key), invalid);
    for (at, value) in [(0, 6), (4, 1), (8, 0x40), (16, 1), (20, 1), (26, 1)] {
        let mut changed = key;
        changed[at] = value;
        assert_eq!(ask(Key, 1, &changed[..32]), invalid, "{at}");
    }
    // After all that the channel still works.
    assert_eq!(ask(Ask, 1, &report(2, 0)), Ok(()));
}

#[test]
fn messages_of_other_kinds_are_refused_as_commands() {
    let mut processor = processor(Product::Milan);
    let (handle, secrets) = running(&mut processor);
    let guest = channel(&secrets);
    for response in [MessageType::KeyResponse, MessageType::ReportResponse] {
        let request = guest.request(response, 1, &[0; 96]).unwrap();
        assert_eq!(
            processor.guest_request(handle, &request),
            Err(FirmwareError::Unsupported)
        );
    }
    assert!(
        guest
            .request(MessageType::KeyRequest, 1, &vec![0; 1 << 16])
            .is_err()
    );
    let long = guest
        .request(MessageType::KeyRequest, 1, &[0; 4096])
        .unwrap();
    assert_eq!(long.len(), MESSAGE_HEADER_LEN + 4096);
    assert_eq!(
        processor.guest_request(handle, &long),
        Err(FirmwareError::InvalidParam)
    );
}

#[test]
fn derived_keys_come_back_for_the_same_guest_and_for_no_other() {
    let mut processor = processor(Product::Genoa);
    let owner = Owner::new();
    let digest = {
        let handle = started(&mut processor, START);
        load(&mut processor, handle);
        let digest = processor.launch_finish(handle, &FINISH).unwrap();
        processor.decommission(handle).unwrap();
        *digest.as_bytes()
    };
    let signed = owner.sign(&digest, START.policy);
    let (first, secrets) = running_with(&mut processor, &signed.finish(true));
    let mut guest = channel(&secrets);
    let committed = Personality::genoa().firmware.tcb;
    let everything = KeyRequest {
        fields: 0x7f,
        guest_svn: 7,
        tcb: committed.to_raw(Product::Genoa).unwrap().0,
        launch_mitigations: Some(0xb),
        ..KeyRequest::default()
    };
    let requests = [
        KeyRequest::default(),
        KeyRequest {
            from_vmrk: true,
            ..KeyRequest::default()
        },
        KeyRequest {
            vmpl: 1,
            ..KeyRequest::default()
        },
        everything,
        KeyRequest {
            fields: 0x3f,
            ..everything
        },
        KeyRequest {
            fields: 0x08,
            ..KeyRequest::default()
        },
        KeyRequest {
            guest_svn: 6,
            ..everything
        },
        KeyRequest {
            launch_mitigations: Some(0x3),
            ..everything
        },
        KeyRequest {
            tcb: [9, 0, 0, 0, 0, 0, 27, 84],
            ..everything
        },
    ];
    let mut keys = |handle, guest: &mut GuestChannel| {
        requests.map(|request| key(&mut processor, handle, guest, &request).unwrap())
    };
    let ours = keys(first, &mut guest);
    for (n, one) in ours.iter().enumerate() {
        assert!(!ours[..n].contains(one), "{n}");
    }
    assert_eq!(keys(first, &mut guest), ours);

    // The same image launched again; then one without an ID block.
    let (again, secrets) = running_with(&mut processor, &signed.finish(true));
    let mut other = channel(&secrets);
    for (n, request) in requests.iter().enumerate() {
        let same = key(&mut processor, again, &mut other, request).unwrap() == ours[n];
        assert_eq!(same, !request.from_vmrk, "{n}");
    }
    let (plain, secrets) = running(&mut processor);
    let mut other = channel(&secrets);
    let family = KeyRequest {
        fields: 0x04,
        ..KeyRequest::default()
    };
    let named = key(&mut processor, first, &mut guest, &family).unwrap();
    assert_ne!(
        key(&mut processor, plain, &mut other, &family).unwrap(),
        named
    );

    // More than the guest and the platform have.
    let invalid = Err(MessageError::Status(0x16));
    for request in [
        KeyRequest {
            guest_svn: 8,
            ..everything
        },
        KeyRequest {
            tcb: [11, 0, 0, 0, 0, 0, 27, 84],
            ..everything
        },
        KeyRequest {
            tcb: [10, 0, 0, 0, 0, 0, 27, 85],
            ..everything
        },
        KeyRequest {
            launch_mitigations: Some(0x4),
            ..everything
        },
    ] {
        assert_eq!(key(&mut processor, first, &mut guest, &request), invalid);
    }
}

#[test]
fn another_chip_derives_other_keys() {
    let keys = [Authority::shared(), Authority::other()].map(|authority| {
        let identity = authority.identity_again();
        let mut processor = SnpProcessor::new(identity, Personality::milan()).unwrap();
        processor.init().unwrap();
        let (handle, secrets) = running(&mut processor);
        key(
            &mut processor,
            handle,
            &mut channel(&secrets),
            &KeyRequest::default(),
        )
        .unwrap()
    });
    assert_ne!(keys[0], keys[1]);
}

#[test]
fn a_guest_without_the_vcek_gets_nothing_from_it() {
    let mut processor = processor(Product::Milan);
    let finish = SnpLaunchFinish {
        vcek_disabled: true,
        ..FINISH
    };
    let (handle, secrets) = running_with(&mut processor, &finish);
    assert!(processor.guest(handle).unwrap().status().vcek_disabled);
    let mut guest = channel(&secrets);
    for select in [KeySelect::Any, KeySelect::Vcek] {
        let request = guest.report_request(&DATA, 0, select).unwrap();
        let reply = processor.guest_request(handle, &request).unwrap();
        assert_eq!(guest.report(&reply), Err(MessageError::Status(0x27)));
        let request = KeyRequest {
            key: select,
            ..KeyRequest::default()
        };
        assert_eq!(
            key(&mut processor, handle, &mut guest, &request),
            Err(MessageError::Status(0x27))
        );
    }
    let vmrk = KeyRequest {
        from_vmrk: true,
        ..KeyRequest::default()
    };
    key(&mut processor, handle, &mut guest, &vmrk).unwrap();
}
