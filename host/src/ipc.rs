//! Message channels between our own roles: Unix sequenced packets, typed bodies, file descriptors beside them.
//!
//! A channel end may sit in a process that a guest or a peer has broken into. So every message is bounded,
//! parsed once, and never decides a length or a path on the other side.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    recvmsg, sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// One end of a channel. Messages keep their borders; a message is at most [`MAX_MESSAGE`] bytes and
/// [`MAX_HANDLES`] descriptors.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

/// A message received, with the descriptors that came beside it.
#[derive(Debug)]
pub struct Received<T> {
    /// The typed body.
    pub body: T,
    /// Descriptors, in the order sent; closed on exec.
    pub handles: Vec<OwnedFd>,
}

impl Channel {
    /// Makes a connected pair; both ends are closed on exec.
    pub fn pair() -> Result<(Self, Self), IpcError> {
        let (a, b) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        Ok((Self { socket: a }, Self { socket: b }))
    }

    /// Takes over a descriptor that is already a connected sequenced-packet socket.
    pub fn from_fd(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Gives the descriptor back, to hand it to another process.
    pub fn into_fd(self) -> OwnedFd {
        self.socket
    }

    /// Sends one message.
    pub fn send<T: Serialize>(&self, body: &T) -> Result<(), IpcError> {
        self.send_with(body, &[])
    }

    /// Sends one message with descriptors beside it.
    pub fn send_with<T: Serialize>(
        &self,
        body: &T,
        handles: &[BorrowedFd<'_>],
    ) -> Result<(), IpcError> {
        let bytes = postcard::to_stdvec(body).map_err(IpcError::Encode)?;
        if bytes.len() > MAX_MESSAGE || handles.len() > MAX_HANDLES {
            return Err(IpcError::TooLarge {
                bytes: bytes.len(),
                handles: handles.len(),
            });
        }
        let raw: Vec<RawFd> = handles.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        let iov = [IoSlice::new(&bytes)];
        loop {
            match sendmsg::<UnixAddr>(
                self.socket.as_raw_fd(),
                &iov,
                control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            ) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(IpcError::Closed),
                Err(e) => return Err(IpcError::Socket(e)),
            }
        }
    }

    /// Waits for one message; `None` waits for ever.
    pub fn recv<T: DeserializeOwned>(
        &self,
        deadline: Option<Duration>,
    ) -> Result<Received<T>, IpcError> {
        if let Some(limit) = deadline {
            self.wait(limit)?;
        }
        let mut buffer = vec![0u8; MAX_MESSAGE];
        let mut space = nix::cmsg_space!([RawFd; MAX_HANDLES]);
        let mut iov = [IoSliceMut::new(&mut buffer)];
        let message = loop {
            match recvmsg::<UnixAddr>(
                self.socket.as_raw_fd(),
                &mut iov,
                Some(&mut space),
                MsgFlags::MSG_CMSG_CLOEXEC,
            ) {
                Ok(message) => break message,
                Err(Errno::EINTR) => {}
                Err(Errno::ECONNRESET) => return Err(IpcError::Closed),
                Err(e) => return Err(IpcError::Socket(e)),
            }
        };
        let mut handles = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = control {
                handles.extend(raw.into_iter().map(own));
            }
        }
        let (length, flags) = (message.bytes, message.flags);
        if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
            return Err(IpcError::Truncated);
        }
        if length == 0 {
            return Err(IpcError::Closed);
        }
        let bytes = buffer.get(..length).ok_or(IpcError::Truncated)?;
        let (body, rest) = postcard::take_from_bytes(bytes).map_err(IpcError::Decode)?;
        if !rest.is_empty() {
            return Err(IpcError::TrailingBytes(rest.len()));
        }
        Ok(Received { body, handles })
    }

    fn wait(&self, limit: Duration) -> Result<(), IpcError> {
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut fds, timeout) {
                Ok(0) => return Err(IpcError::Deadline(limit)),
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(IpcError::Socket(e)),
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What can go wrong on a channel.
#[derive(Debug, thiserror::Error)]
pub enum IpcError {
    /// The other role ended or closed its end.
    #[error("the other process closed the channel")]
    Closed,
    /// Nothing arrived in time.
    #[error("no message within {0:?}")]
    Deadline(Duration),
    /// A message was larger than the bounds of a channel.
    #[error("message of {bytes} bytes and {handles} descriptors is larger than a channel takes")]
    TooLarge {
        /// Encoded size.
        bytes: usize,
        /// Number of descriptors.
        handles: usize,
    },
    /// The kernel cut a message or its descriptors.
    #[error("message was cut")]
    Truncated,
    /// Bytes were left behind the body.
    #[error("{0} bytes behind the message")]
    TrailingBytes(usize),
    /// The body could not be written.
    #[error("message cannot be encoded")]
    Encode(#[source] postcard::Error),
    /// The body is not what the protocol says.
    #[error("message cannot be decoded")]
    Decode(#[source] postcard::Error),
    /// The socket failed.
    #[error("channel failed: {0}")]
    Socket(#[from] Errno),
}

#[expect(
    unsafe_code,
    reason = "the kernel hands descriptors over as bare numbers"
)]
fn own(raw: RawFd) -> OwnedFd {
    // SAFETY: the number came from SCM_RIGHTS of a message just received, so it is open and nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

/// Largest encoded body, in bytes; larger things travel in shared memory.
pub const MAX_MESSAGE: usize = 128 * 1024;
/// Most descriptors beside one message.
pub const MAX_HANDLES: usize = 48;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_and_its_descriptor_arrive() {
        let (a, b) = Channel::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        a.send_with(&("hello".to_owned(), 7u32), &[file.as_fd()])
            .unwrap();
        let got: Received<(String, u32)> = b.recv(Some(Duration::from_secs(1))).unwrap();
        assert_eq!(got.body, ("hello".to_owned(), 7));
        assert_eq!(got.handles.len(), 1);
    }

    #[test]
    fn a_closed_end_is_told_apart_from_silence() {
        let (a, b) = Channel::pair().unwrap();
        let silent = b.recv::<u32>(Some(Duration::from_millis(10))).unwrap_err();
        assert!(matches!(silent, IpcError::Deadline(_)), "{silent}");
        drop(a);
        assert!(matches!(b.recv::<u32>(None).unwrap_err(), IpcError::Closed));
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let (a, b) = Channel::pair().unwrap();
        a.send(&(1u8, 2u8)).unwrap();
        assert!(matches!(
            b.recv::<u8>(None).unwrap_err(),
            IpcError::TrailingBytes(1)
        ));
    }

    #[test]
    fn an_oversized_message_is_refused_before_it_is_sent() {
        let (a, _b) = Channel::pair().unwrap();
        let error = a.send(&vec![0u8; MAX_MESSAGE + 1]).unwrap_err();
        assert!(matches!(error, IpcError::TooLarge { .. }));
    }
}
