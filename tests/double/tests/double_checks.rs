//! The double itself: it refuses what Linux refuses, and notices what Linux lets pass.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests end where they fail"
)]

mod common;

use casemate_double::DoubleError;
use casemate_double::protocol::{Ask, Wrong};
use common::{SEV, SEV_ES, Vmm, site_a};
use kvm_bindings as kvm;
use nix::errno::Errno;

/// A structure of little-endian 32-bit words.
fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Address and length as two words and one, then padding.
fn span(address: u64, length: u32, padding: u32) -> [u32; 4] {
    [address as u32, (address >> 32) as u32, length, padding]
}

fn host(vmm: &mut Vmm, gpa: u64) -> u64 {
    let bytes = vmm.bytes(&Ask::HostAddress { gpa });
    u64::from_le_bytes(bytes.try_into().unwrap())
}

/// Errno and firmware code of a command past the code under test.
fn raw(vmm: &mut Vmm, id: u32, sev_fd: u32, data: Vec<u8>) -> (Errno, u32) {
    let answer = vmm.bytes(&Ask::Raw {
        id,
        pad0: 0,
        sev_fd,
        data,
    });
    let word = |at: usize| i32::from_le_bytes(answer[at..at + 4].try_into().unwrap());
    (Errno::from_raw(word(0)), word(4).cast_unsigned())
}

const DONE: (Errno, u32) = (Errno::UnknownErrno, 0);
const EINVAL: (Errno, u32) = (Errno::EINVAL, 0);
const EBADF: (Errno, u32) = (Errno::EBADF, 0);

/// The child's descriptor of /dev/sev: the machine's commands work with no other.
fn sev_fd(vmm: &mut Vmm) -> u32 {
    let start = words(&[0, SEV, 0, 0, 0, 0, 0, 0, 0, 0]);
    let found = (3..32).find(|fd| {
        raw(
            vmm,
            kvm::sev_cmd_id_KVM_SEV_LAUNCH_START,
            *fd,
            start.clone(),
        ) == DONE
    });
    found.expect("one descriptor is /dev/sev")
}

#[test]
fn order_and_descriptor_are_watched() {
    let mut vmm = Vmm::start(&site_a());
    vmm.attach(SEV);
    // INIT2 has been given; once more, or the older one, is refused.
    let init2 = kvm::sev_cmd_id_KVM_SEV_INIT2;
    assert_eq!(raw(&mut vmm, init2, 0, vec![0; 48]), EINVAL);
    assert_eq!(
        raw(&mut vmm, kvm::sev_cmd_id_KVM_SEV_INIT, 0, vec![]),
        EINVAL
    );
    // Before a start the kernel has no descriptor to ask the firmware by.
    for (id, length) in [
        (kvm::sev_cmd_id_KVM_SEV_LAUNCH_FINISH, 0),
        (kvm::sev_cmd_id_KVM_SEV_GUEST_STATUS, 12),
        (kvm::sev_cmd_id_KVM_SEV_SEND_CANCEL, 0),
        (kvm::sev_cmd_id_KVM_SEV_RECEIVE_FINISH, 0),
    ] {
        assert_eq!(raw(&mut vmm, id, 0, vec![0; length]), EBADF, "{id}");
    }
    let fd = sev_fd(&mut vmm);
    // The firmware's own order, from here on.
    for id in [
        kvm::sev_cmd_id_KVM_SEV_LAUNCH_FINISH,
        kvm::sev_cmd_id_KVM_SEV_SEND_FINISH,
        kvm::sev_cmd_id_KVM_SEV_SEND_CANCEL,
        kvm::sev_cmd_id_KVM_SEV_RECEIVE_FINISH,
    ] {
        assert_eq!(raw(&mut vmm, id, fd, vec![]), (Errno::EIO, 2), "{id}");
    }
    // Numbers without a meaning, and those that Linux has no code for.
    for id in [10, 14, 17, 19, 23, 103, u32::MAX] {
        assert_eq!(raw(&mut vmm, id, fd, vec![0; 64]).0, Errno::EINVAL, "{id}");
    }
    vmm.close();
    vmm.finish();
}

#[test]
fn lengths_and_addresses_are_watched() {
    let mut vmm = Vmm::start(&site_a());
    vmm.attach(SEV);
    let fd = sev_fd(&mut vmm);
    let page = host(&mut vmm, 0x1000);
    let update = kvm::sev_cmd_id_KVM_SEV_LAUNCH_UPDATE_DATA;
    let mut give = |id, data: &[u32]| raw(&mut vmm, id, fd, words(data));
    assert_eq!(give(update, &span(page, 0, 0)), EINVAL);
    assert_eq!(give(update, &span(u64::MAX - 15, 32, 0)), EINVAL);
    assert_eq!(
        give(update, &span(4096, 4096, 0)).0,
        Errno::ENOMEM,
        "unmapped"
    );
    assert_eq!(give(update, &span(page + 8, 16, 0)), (Errno::EIO, 9));
    assert_eq!(give(update, &span(page, 17, 0)), (Errno::EIO, 4));
    let vmsa = kvm::sev_cmd_id_KVM_SEV_LAUNCH_UPDATE_VMSA;
    assert_eq!(give(vmsa, &[]).0, Errno::ENOTTY, "a SEV guest");

    // A query has the length for its answer.
    let measure = kvm::sev_cmd_id_KVM_SEV_LAUNCH_MEASURE;
    assert_eq!(give(measure, &span(page, 0x4001, 0)), EINVAL);
    assert_eq!(give(measure, &span(page, 47, 0)), (Errno::EIO, 4));
    assert_eq!(give(measure, &span(0, 0, 0)), (Errno::EIO, 4));
    let answer = vmm.bytes(&Ask::Raw {
        id: measure,
        pad0: 0,
        sev_fd: fd,
        data: vec![0; 16],
    });
    assert_eq!(answer[16..20], 48u32.to_le_bytes());

    // One page at most, and not across two.
    let mut give = |id, data: &[u32]| raw(&mut vmm, id, fd, words(data));
    let parts =
        |header, guest, packet| [span(page, header, 0), guest, span(page, packet, 0)].concat();
    for (id, guest) in [
        (
            kvm::sev_cmd_id_KVM_SEV_SEND_UPDATE_DATA,
            span(page + 16, 4096, 0),
        ),
        (
            kvm::sev_cmd_id_KVM_SEV_SEND_UPDATE_DATA,
            span(page, 4097, 0),
        ),
        (
            kvm::sev_cmd_id_KVM_SEV_RECEIVE_UPDATE_DATA,
            span(page + 16, 4096, 0),
        ),
        (
            kvm::sev_cmd_id_KVM_SEV_RECEIVE_UPDATE_DATA,
            span(0, 4096, 0),
        ),
    ] {
        assert_eq!(give(id, &parts(52, guest, 4096)), EINVAL, "{id}");
    }
    let receive = kvm::sev_cmd_id_KVM_SEV_RECEIVE_UPDATE_DATA;
    assert_eq!(give(receive, &parts(0, span(page, 4096, 0), 4096)), EINVAL);
    assert_eq!(
        give(receive, &parts(52, span(page, 4096, 0), 0x4001)),
        EINVAL
    );
    let start = kvm::sev_cmd_id_KVM_SEV_RECEIVE_START;
    assert_eq!(give(start, &[0; 10]), EINVAL, "no certificate");
    // And a structure that is nowhere.
    let nowhere = vmm.bytes(&Ask::Raw {
        id: update,
        pad0: 0,
        sev_fd: fd,
        data: vec![],
    });
    assert_eq!(nowhere[..4], (Errno::EFAULT as i32).to_le_bytes());
    vmm.close();
    // The addresses above are those of another mapping of the memory than the one that was registered.
    let Err(DoubleError::Complaints(complaints)) = vmm.double.finish() else {
        panic!("no complaint");
    };
    let expected = "LAUNCH_UPDATE_DATA: memory was not registered first";
    assert_eq!(complaints, [expected; 2]);
}

#[test]
fn what_linux_lets_pass_is_a_complaint() {
    let complaint = |act: &dyn Fn(&mut Vmm)| {
        let mut vmm = Vmm::start(&site_a());
        vmm.attach(SEV);
        act(&mut vmm);
        match vmm.double.finish() {
            Err(DoubleError::Complaints(complaints)) => complaints.join("\n"),
            other => panic!("{other:?}"),
        }
    };
    let padding = complaint(&|vmm| {
        vmm.bytes(&Ask::Raw {
            id: kvm::sev_cmd_id_KVM_SEV_GUEST_STATUS,
            pad0: 1,
            sev_fd: 0,
            data: vec![0; 12],
        });
    });
    assert!(padding.contains("struct kvm_sev_cmd"), "{padding}");
    let padding = complaint(&|vmm| {
        let page = host(vmm, 0x1000);
        raw(
            vmm,
            kvm::sev_cmd_id_KVM_SEV_LAUNCH_UPDATE_DATA,
            0,
            words(&span(page, 16, 1)),
        );
    });
    assert!(padding.contains("LAUNCH_UPDATE_DATA: padding"), "{padding}");
    let twice = complaint(&|vmm| {
        let fd = sev_fd(vmm);
        let start = words(&[0, SEV, 0, 0, 0, 0, 0, 0, 0, 0]);
        let id = kvm::sev_cmd_id_KVM_SEV_LAUNCH_START;
        // The firmware's own answer: the machine's ASID is its first guest's.
        assert_eq!(raw(vmm, id, fd, start), (Errno::EIO, 12));
    });
    assert!(twice.contains("its guest already"), "{twice}");
    let rest = complaint(&|vmm| {
        vmm.double
            .fail("SEND_START", 1, casemate_double::Fault::Firmware(1));
    });
    assert!(rest.contains("has not happened"), "{rest}");
}

#[test]
fn a_plain_machine_is_the_real_kernels_and_a_wrong_one_is_not_sev() {
    let mut vmm = Vmm::start(&site_a());
    assert!(vmm.attach_as(SEV_ES, Some(Wrong::VcpuFirst)).is_err());
    let log = vmm.double.log();
    let refused = "KVM_SEV_INIT2 -> EINVAL".to_owned();
    assert!(log.contains(&refused), "{log:#?}");
    assert_eq!(vmm.double.guests(), 0);
    vmm.finish();
}
