//! The stable codes of decisions.

use serde::{Deserialize, Serialize};

macro_rules! codes {
    ($($(#[$doc:meta])* $code:ident = $name:literal,)*) => {
        /// The stable code of a decision; peers and records carry it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[non_exhaustive]
        pub enum Code {
            $($(#[$doc])* #[serde(rename = $name)] $code,)*
        }

        impl Code {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$code,)*];

            /// The code as it is written.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$code => $name,)* }
            }
        }
    };
}

codes! {
    /// Every rule allows it.
    Allowed = "allowed",
    /// The secure processor is emulated, and the policy does not say `allow_emulated = true`.
    EmulatedNotAllowed = "emulated-not-allowed",
    /// The guest policy lets the host debug the guest.
    DebugAllowed = "debug-allowed",
    /// The guest policy does not fit the technology.
    GuestPolicyMismatch = "guest-policy-mismatch",
    /// Guests of this technology cannot be moved by any Linux.
    TechnologyCannotMigrate = "technology-cannot-migrate",
    /// Guests of this technology cannot be copied.
    TechnologyCannotClone = "technology-cannot-clone",
    /// The guest has not proven what it is.
    NotProven = "not-proven",
    /// The technology is not in `technologies.allowed`.
    TechnologyNotAllowed = "technology-not-allowed",
    /// More vCPUs than `limits.max_vcpus`, or none.
    TooManyVcpus = "too-many-vcpus",
    /// More memory than `limits.max_memory_mib`, or none.
    TooMuchMemory = "too-much-memory",
    /// `migration.outgoing` is not true.
    OutgoingNotAllowed = "outgoing-not-allowed",
    /// `migration.incoming` is not true.
    IncomingNotAllowed = "incoming-not-allowed",
    /// No `[[peer]]` has this name or identity.
    PeerUnknown = "peer-unknown",
    /// The TLS connection was not terminated by whom the peer's path says.
    PeerPathMismatch = "peer-path-mismatch",
    /// The TLS session has a cipher suite or group that is not listed.
    SessionNotAllowed = "session-not-allowed",
    /// A disk is not among `[[incoming_disk]]`, or is asked for twice.
    DiskNotAllowed = "disk-not-allowed",
    /// A network is not among `[[incoming_net]]`.
    NetNotAllowed = "net-not-allowed",
    /// A file is in none of `files.folders`.
    FileNotAllowed = "file-not-allowed",
    /// A policy that fewer signed than must have.
    PolicyUnsigned = "unsigned",
    /// A policy that is older than, or contradicts, the one in force.
    PolicyOlder = "older-version",
    /// The policy in force is not valid now.
    PolicyNotValid = "not-valid-now",
    /// Nobody of the policy asks.
    PersonUnknown = "person-unknown",
    /// The person's role, or what the person may do within it, does not include this.
    RoleNotAllowed = "role-not-allowed",
    /// The person may not act on this guest.
    GuestNotTheirs = "guest-not-theirs",
    /// A second person has not agreed.
    ApprovalMissing = "approval-missing",
    /// No `[[guest]]` names this guest.
    GuestUnlisted = "guest-unlisted",
    /// A rule needs what nobody has verified.
    ClaimMissing = "claim-missing",
    /// The launch digest is not listed, and nobody listed vouches for it.
    LaunchNotAllowed = "launch-not-allowed",
    /// A part of the TCB is below its minimum, or the product has none.
    TcbTooOld = "tcb-too-old",
    /// A bit of the guest policy is not as the owner wants it.
    GuestPolicyNotAllowed = "guest-policy-not-allowed",
    /// The evidence comes from a less privileged level than allowed.
    VmplNotAllowed = "vmpl-not-allowed",
    /// The evidence is old, or answers no nonce.
    EvidenceStale = "evidence-stale",
    /// The guest may not be at this site.
    SiteNotAllowed = "site-not-allowed",
    /// The guest may not come from, or go to, this peer.
    PeerNotAllowed = "peer-not-allowed",
    /// The guest may not move in this way.
    MoveNotAllowed = "move-not-allowed",
    /// The guest's replica may not be kept like this.
    ReplicaNotAllowed = "replica-not-allowed",
    /// The secure processor's firmware is too old.
    FirmwareTooOld = "firmware-too-old",
    /// Less of the sandbox is in force than must be.
    SandboxTooWeak = "sandbox-too-weak",
    /// The Rego policy did not answer `true`.
    RegoRefused = "rego-refused",
}
