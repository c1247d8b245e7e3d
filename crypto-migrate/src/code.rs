//! The stable codes of everything that a peer, a relay or the wire can cause.

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// A stable code; its text is part of the product's interface and never changes its meaning.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Code { $($(#[$doc])* $name,)* }

        impl Code {
            /// Every code, for documentation and for parsing.
            pub const ALL: &'static [Code] = &[$(Code::$name,)*];

            /// The code as it is written in logs, errors and on the wire.
            pub fn as_str(self) -> &'static str {
                match self { $(Code::$name => $text,)* }
            }
        }
    };
}

codes! {
    /// The certificate's SAN and SPKI are not in the allow-list.
    PeerNotAllowed = "PEER_NOT_ALLOWED",
    /// The certificate does not chain to the site's authority, has expired, or lacks the usage.
    CertificateInvalid = "CERTIFICATE_INVALID",
    /// The TLS handshake or a TLS record failed.
    TlsFailed = "TLS_FAILED",
    /// The peer ended TLS with an alert.
    TlsRefusedByPeer = "TLS_REFUSED_BY_PEER",
    /// The peer does not speak this protocol (ALPN).
    AlpnMismatch = "ALPN_MISMATCH",
    /// Somebody else terminates the TLS of a direct path.
    ChannelBindingMismatch = "CHANNEL_BINDING_MISMATCH",
    /// The two ends' policies name different paths.
    PathMismatch = "PATH_MISMATCH",
    /// The peer speaks another version of the protocol.
    VersionUnsupported = "VERSION_UNSUPPORTED",
    /// A field of the offer is out of bounds.
    OfferInvalid = "OFFER_INVALID",
    /// The transcript's signature does not verify.
    SignatureInvalid = "SIGNATURE_INVALID",
    /// The two ends derived different keys (wrong owner key, or a changed transcript).
    KeyConfirmation = "KEY_CONFIRMATION",
    /// A length exceeds the maximum of its frame type.
    FrameTooLarge = "FRAME_TOO_LARGE",
    /// No frame type of this protocol.
    FrameUnknown = "FRAME_UNKNOWN",
    /// The content of a frame does not parse.
    FrameMalformed = "FRAME_MALFORMED",
    /// A frame that has no place in this phase.
    FrameUnexpected = "FRAME_UNEXPECTED",
    /// A control frame was sent again.
    FrameReplayed = "FRAME_REPLAYED",
    /// A frame of the sequence is missing.
    SequenceGap = "SEQUENCE_GAP",
    /// The seal of a control frame does not open.
    ControlAuthentication = "CONTROL_AUTHENTICATION",
    /// The seal of a page does not open.
    PageAuthentication = "PAGE_AUTHENTICATION",
    /// A page was sent again.
    PageReplayed = "PAGE_REPLAYED",
    /// A page of the sequence is missing.
    PageMissing = "PAGE_MISSING",
    /// Pages of a batch changed places.
    PageReordered = "PAGE_REORDERED",
    /// A page of an older round was put in place of a newer one.
    PageRolledBack = "PAGE_ROLLED_BACK",
    /// A page came twice in one round, under two sequence numbers.
    PageDuplicated = "PAGE_DUPLICATED",
    /// A page outside the offered memory.
    PageOutOfRange = "PAGE_OUT_OF_RANGE",
    /// A page or a round end claims a round that has not begun.
    RoundMismatch = "ROUND_MISMATCH",
    /// A page or frame of another session, VM or stream.
    SessionMismatch = "SESSION_MISMATCH",
    /// The stream, or a batch, ended before what it had announced.
    StreamTruncated = "STREAM_TRUNCATED",
    /// The two ends do not hold the same pages and state.
    ManifestMismatch = "MANIFEST_MISMATCH",
    /// A further connection whose TLS another peer terminates than that of the first.
    JoinPeer = "JOIN_PEER",
    /// A further connection of another session.
    JoinSession = "JOIN_SESSION",
    /// A further connection under a stream number that was not agreed on.
    JoinOutOfRange = "JOIN_OUT_OF_RANGE",
    /// The join of a further connection was sent again.
    JoinReplayed = "JOIN_REPLAYED",
    /// A further connection under the number of a stream that has joined.
    JoinDoubled = "JOIN_DOUBLED",
    /// The proof of a further connection is not of this session, stream and TLS connection.
    JoinAuthentication = "JOIN_AUTHENTICATION",
    /// A further connection could not be made, or did not join in time.
    JoinLate = "JOIN_LATE",
    /// The machine state exceeds its maximum.
    StateTooLarge = "STATE_TOO_LARGE",
    /// A key has made as many seals as it may.
    SealLimit = "SEAL_LIMIT",
    /// The peer was silent, or too slow, for longer than the phase allows.
    PeerTimeout = "PEER_TIMEOUT",
    /// The connection failed below TLS.
    TransportFailed = "TRANSPORT_FAILED",
    /// The operator cancelled.
    Cancelled = "CANCELLED",
    /// The move took longer than it was allowed to.
    TimeLimit = "TIME_LIMIT",
    /// The guest's side of this host failed.
    GuestFailed = "GUEST_FAILED",
    /// The destination could not run the guest after the commit; it holds nothing.
    ActivationFailed = "ACTIVATION_FAILED",
    /// The commit was sent and not answered: ask the destination who owns the guest.
    InDoubt = "IN_DOUBT",
    /// This host's identity is not usable.
    IdentityUnusable = "IDENTITY_UNUSABLE",
    /// Local policy refuses the offer.
    PolicyRefused = "POLICY_REFUSED",
    /// A primitive failed on this host.
    Internal = "INTERNAL",
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<crate::crypto::CryptoError> for Code {
    fn from(error: crate::crypto::CryptoError) -> Self {
        match error {
            crate::crypto::CryptoError::SealLimit => Code::SealLimit,
            crate::crypto::CryptoError::SigningKey => Code::IdentityUnusable,
            _ => Code::Internal,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_well_formed() {
        let mut seen = std::collections::BTreeSet::new();
        for code in Code::ALL {
            assert!(
                code.as_str()
                    .bytes()
                    .all(|b| b.is_ascii_uppercase() || b == b'_')
            );
            assert!(seen.insert(code.as_str()), "{code} twice");
        }
    }
}
