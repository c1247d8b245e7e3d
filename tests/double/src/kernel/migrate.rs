//! `KVM_MEMORY_ENCRYPT_OP`: sending and receiving a guest, with the checks of Linux 6.12 in its order.

use casemate_attest::legacy::{LegacyChain, PacketHeader};
use casemate_attest::processor::FirmwareError;
use nix::errno::Errno;

use super::fields::Fields;
use super::launch::{BLOB_MAX, Op, aligned, blob, certificate, parse_policy, parse_session};
use super::vm::Vm;
use super::{Kernel, Outcome, Refusal};
use crate::memory::PAGE;

impl Kernel {
    /// `sev_send_start`.
    pub(super) fn send_start(&mut self, vm: &mut Vm, op: &Op) -> Outcome {
        let mut start = Fields::read(op.caller, op.data, 72)?;
        let guest = vm.guest();
        let (session, length) = (start.u64(56), start.u32(64));
        if length == 0 {
            // A query: the firmware refuses, and says how much it needs.
            start.set(64, &SESSION.to_le_bytes());
            start.write_back()?;
            self.require_device(op.caller, vm.device)?;
            return self.firmware("SEND_START", |processor| {
                processor.guest(guest)?;
                Err(FirmwareError::InvalidLength { needed: SESSION })
            });
        }
        if start.u64(8) == 0 || start.u32(16) == 0 || session == 0 || length > BLOB_MAX {
            return Err(Errno::EINVAL.into());
        }
        let pdh = blob(op.caller, start.u64(8), start.u32(16))?;
        let platform = blob(op.caller, start.u64(24), start.u32(32))?;
        let amd = blob(op.caller, start.u64(40), start.u32(48))?;
        if [4, 20, 36, 52, 68].iter().any(|at| !start.is_zero(*at, 4)) {
            self.complain("SEND_START", "padding is not zero");
        }
        self.require_device(op.caller, vm.device)?;
        let sent = self.firmware("SEND_START", |processor| {
            processor.guest(guest)?;
            if length < SESSION {
                return Err(FirmwareError::InvalidLength { needed: SESSION });
            }
            let target = LegacyChain::parse(&pdh, &platform, &amd)
                .map_err(|_| FirmwareError::InvalidCertificate)?;
            processor.send_start(guest, &target)
        })?;
        op.caller.write(session, &sent.session.to_bytes())?;
        start.set(0, &u32::from(sent.policy).to_le_bytes());
        start.set(64, &SESSION.to_le_bytes());
        Ok(start.write_back()?)
    }

    /// `sev_send_update_data`: one page at most, and not across two.
    pub(super) fn send_update(&mut self, vm: &mut Vm, op: &Op) -> Outcome {
        let mut send = Fields::read(op.caller, op.data, 48)?;
        let guest = vm.guest();
        let (header, header_length) = (send.u64(0), send.u32(8));
        let (page, page_length) = (send.u64(16), send.u32(24));
        let (packet, packet_length) = (send.u64(32), send.u32(40));
        if packet_length == 0 || header_length == 0 {
            send.set(8, &HEADER.to_le_bytes());
            send.set(40, &(PAGE as u32).to_le_bytes());
            send.write_back()?;
            self.require_device(op.caller, vm.device)?;
            return self.firmware("SEND_UPDATE_DATA", |processor| {
                processor.guest(guest)?;
                Err(FirmwareError::InvalidLength { needed: HEADER })
            });
        }
        if packet == 0 || page == 0 || page_length == 0 || header == 0 {
            return Err(Errno::EINVAL.into());
        }
        in_one_page(page, page_length)?;
        vm.pin_for_a_while(op.caller, page - page % PAGE, PAGE, false)?;
        self.padding("SEND_UPDATE_DATA", &send);
        if !vm.registered(page, u64::from(page_length)) {
            self.complain("SEND_UPDATE_DATA", "memory was not registered first");
        }
        self.require_device(op.caller, vm.device)?;
        aligned(page)?;
        let plain = op.caller.read(page, page_length as usize)?;
        let (sealed_header, sealed) = self.firmware("SEND_UPDATE_DATA", |processor| {
            let guest = processor.guest(guest)?;
            if header_length < HEADER || packet_length < page_length {
                return Err(FirmwareError::InvalidLength { needed: HEADER });
            }
            guest.send_update_data(&plain)
        })?;
        // The kernel copies its whole buffers, zeroes behind what the firmware wrote.
        op.caller.write(packet, &padded(sealed, packet_length))?;
        let sealed_header = sealed_header.to_bytes().to_vec();
        Ok(op
            .caller
            .write(header, &padded(sealed_header, header_length))?)
    }

    /// `sev_receive_start`.
    pub(super) fn receive_start(&mut self, vm: &mut Vm, op: &Op) -> Outcome {
        let mut start = Fields::read(op.caller, op.data, 40)?;
        let (pdh, session) = (
            (start.u64(8), start.u32(16)),
            (start.u64(24), start.u32(32)),
        );
        if pdh.0 == 0 || pdh.1 == 0 || session.0 == 0 || session.1 == 0 {
            return Err(Errno::EINVAL.into());
        }
        let pdh = blob(op.caller, pdh.0, pdh.1)?;
        let session = blob(op.caller, session.0, session.1)?;
        if !start.is_zero(20, 4) || !start.is_zero(36, 4) {
            self.complain("RECEIVE_START", "padding is not zero");
        }
        if vm.handle.is_some() {
            self.complain("RECEIVE_START", "the machine has its guest already");
        }
        self.require_device(op.caller, op.device)?;
        let (shared, policy, asid) = (start.u32(0), start.u32(4), vm.asid);
        let handle = self.firmware("RECEIVE_START", |processor| {
            if shared != 0 {
                return Err(FirmwareError::InvalidGuest);
            }
            let policy = parse_policy(policy)?;
            processor.receive_start(policy, &certificate(&pdh)?, &parse_session(&session)?)
        })?;
        self.bind(vm, op, handle, asid)?;
        vm.received = true;
        start.set(0, &handle.0.to_le_bytes());
        Ok(start.write_back()?)
    }

    /// `sev_receive_update_data`: one page at most, and not across two.
    pub(super) fn receive_update(&mut self, vm: &mut Vm, op: &Op) -> Outcome {
        let receive = Fields::read(op.caller, op.data, 48)?;
        let (header, header_length) = (receive.u64(0), receive.u32(8));
        let (page, page_length) = (receive.u64(16), receive.u32(24));
        let (packet, packet_length) = (receive.u64(32), receive.u32(40));
        if [header, page, packet].contains(&0)
            || [header_length, page_length, packet_length].contains(&0)
        {
            return Err(Errno::EINVAL.into());
        }
        in_one_page(page, page_length)?;
        let header = blob(op.caller, header, header_length)?;
        let packet = blob(op.caller, packet, packet_length)?;
        vm.pin_for_a_while(op.caller, page - page % PAGE, PAGE, true)?;
        self.padding("RECEIVE_UPDATE_DATA", &receive);
        if !vm.registered(page, u64::from(page_length)) {
            self.complain("RECEIVE_UPDATE_DATA", "memory was not registered first");
        }
        self.require_device(op.caller, vm.device)?;
        aligned(page)?;
        let mut plain = op.caller.read(page, page_length as usize)?;
        let guest = vm.guest();
        self.firmware("RECEIVE_UPDATE_DATA", |processor| {
            let header = PacketHeader::from_bytes(&header)?;
            let guest = processor.guest(guest)?;
            guest.receive_update_data(&header, &packet, &mut plain)
        })?;
        Ok(op.caller.write(page, &plain)?)
    }

    fn padding(&mut self, name: &str, packet: &Fields) {
        if [12, 28, 44].iter().any(|at| !packet.is_zero(*at, 4)) {
            self.complain(name, "padding is not zero");
        }
    }
}

fn in_one_page(address: u64, length: u32) -> Result<(), Refusal> {
    if address % PAGE + u64::from(length) > PAGE {
        return Err(Errno::EINVAL.into());
    }
    Ok(())
}

fn padded(mut bytes: Vec<u8>, length: u32) -> Vec<u8> {
    bytes.resize(length as usize, 0);
    bytes
}

const SESSION: u32 = 128;
const HEADER: u32 = 52;
