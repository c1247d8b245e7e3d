//! What a test asks of the host under the double that starts one jailed VMM and hands on what agent and mover say.

use casemate::machine::plan::MachinePlan;
use casemate::vmm::protocol::{MoverReply, MoverRequest, RoleError, VmmReply, VmmRequest};
use serde::{Deserialize, Serialize};

/// One order.
#[derive(Debug, Serialize, Deserialize)]
pub enum Order {
    /// Starts the VMM in its jail and prepares it.
    Prepare {
        /// What to build.
        plan: Box<MachinePlan>,
        /// Kernel image, for a launch.
        kernel: Option<Vec<u8>>,
        /// ASK ‖ ARK of the platform.
        #[serde(with = "serde_bytes")]
        amd: Vec<u8>,
        /// User of the jail.
        uid: u32,
    },
    /// A request of the agent.
    Vmm(VmmRequest),
    /// Attaches a mover.
    AttachMover,
    /// A request of the mover.
    Mover(MoverRequest),
    /// Bytes to the start of the exchange memory.
    WriteExchange(#[serde(with = "serde_bytes")] Vec<u8>),
    /// So many bytes from its start.
    ReadExchange(u64),
    /// The guest's output so far.
    Console,
    /// Ends the VMM and waits for it.
    End,
}

/// What came of an order.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// Nothing more to say.
    Done,
    /// The VMM's answer to its agent.
    Vmm(VmmReply),
    /// The VMM's answer to its mover.
    Mover(MoverReply),
    /// Bytes: exchange memory, output.
    Bytes(#[serde(with = "serde_bytes")] Vec<u8>),
}

/// The report, or why there is none.
pub type Outcome = Result<Report, RoleError>;
