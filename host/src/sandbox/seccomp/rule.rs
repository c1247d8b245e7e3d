//! What a filter is made of: allow rules with their reasons, and how they become a BPF program.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::{Mutex, PoisonError};

use ring::digest::{SHA256, digest};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

/// One system call that is allowed, and when. Several rules for one call are alternatives.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Number of the call.
    pub call: i64,
    /// Its name as libc writes it (`SYS_read`).
    pub name: &'static str,
    /// Conditions that must all hold.
    pub when: &'static [Cond],
    /// What the role needs it for.
    pub why: &'static str,
}

/// A condition on the lower 32 bits of an argument; none of the flags, commands and levels constrained here has
/// more.
#[derive(Clone, Copy, Debug)]
pub enum Cond {
    /// The argument is one of these.
    Among(u8, &'static [u64]),
    /// The argument, masked, is one of these.
    Masked(u8, u64, &'static [u64]),
    /// The argument is the id of this very process.
    OwnPid(u8),
    /// The argument is one of this process's rings, see [`allow_ring`](super::allow_ring). Without one, the rule allows
    /// nothing.
    Ring(u8),
}

/// A compiled filter.
#[derive(Clone, Debug)]
pub struct Program {
    pub(super) bpf: BpfProgram,
    /// SHA-256 over the BPF instructions, in memory order, hexadecimal.
    pub sha256: String,
}

/// Compiles `rules`; whatever matches none of them meets `otherwise`.
pub(super) fn compile(
    rules: &[&Rule],
    otherwise: SeccompAction,
) -> Result<Program, seccompiler::BackendError> {
    let mut chains: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut unconditional = Vec::new();
    for rule in rules {
        if rule.when.is_empty() {
            unconditional.push(rule.call);
        }
        // A call without alternatives gets no chain: an empty one would let everything through.
        for alternative in alternatives(rule.when)? {
            let chain = chains.entry(rule.call).or_default();
            chain.push(SeccompRule::new(alternative)?);
        }
    }
    for call in unconditional {
        chains.insert(call, Vec::new());
    }
    let filter = SeccompFilter::new(chains, otherwise, SeccompAction::Allow, TargetArch::x86_64)?;
    let mut bpf = without_clone3();
    bpf.extend(BpfProgram::try_from(filter)?);
    let sha256 = hash(&bpf);
    Ok(Program { bpf, sha256 })
}

/// See [`allow_ring`](super::allow_ring).
pub(super) fn allow_ring(ring: RawFd) {
    // No descriptor is below zero.
    let ring = u64::from(ring.unsigned_abs());
    RINGS
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(ring);
}

/// The rings that there are.
pub(super) fn rings() -> Vec<u64> {
    RINGS.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

static RINGS: Mutex<Vec<u64>> = Mutex::new(Vec::new());

/// All combinations of the conditions' values.
fn alternatives(when: &[Cond]) -> Result<Vec<Vec<SeccompCondition>>, seccompiler::BackendError> {
    if when.is_empty() {
        return Ok(Vec::new());
    }
    let mut all: Vec<Vec<SeccompCondition>> = vec![Vec::new()];
    for cond in when {
        let pid = [u64::from(std::process::id())];
        let rings = rings();
        let (arg, op, values): (u8, SeccompCmpOp, &[u64]) = match cond {
            Cond::Among(arg, values) => (*arg, SeccompCmpOp::Eq, values),
            Cond::Masked(arg, mask, values) => (*arg, SeccompCmpOp::MaskedEq(*mask), values),
            Cond::OwnPid(arg) => (*arg, SeccompCmpOp::Eq, &pid),
            Cond::Ring(arg) => (*arg, SeccompCmpOp::Eq, &rings),
        };
        let mut extended = Vec::new();
        for prefix in &all {
            for &value in values {
                let mut conditions = prefix.clone();
                conditions.push(SeccompCondition::new(
                    arg,
                    SeccompCmpArgLen::Dword,
                    op.clone(),
                    value,
                )?);
                extended.push(conditions);
            }
        }
        all = extended;
    }
    Ok(all)
}

/// `clone3` has its flags in memory, where a filter cannot see them: it does not exist here (ENOSYS), so that glibc
/// falls back to `clone`. Put before the compiled filter, whose jumps are all relative.
fn without_clone3() -> BpfProgram {
    let number_offset = 0;
    vec![
        instruction(LOAD_WORD, 0, 0, number_offset),
        instruction(JUMP_IF_EQUAL, 0, 1, CLONE3),
        instruction(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
    ]
}

fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

fn hash(bpf: &BpfProgram) -> String {
    let mut bytes = Vec::with_capacity(bpf.len() * 8);
    for i in bpf {
        bytes.extend(i.code.to_ne_bytes());
        bytes.extend([i.jt, i.jf]);
        bytes.extend(i.k.to_ne_bytes());
    }
    hex::encode(digest(&SHA256, &bytes))
}

/// A rule from the name of libc's constant.
macro_rules! permit {
    ($name:ident, $why:literal) => {
        permit!($name, [], $why)
    };
    ($name:ident, [$($when:expr),*], $why:literal) => {
        $crate::sandbox::seccomp::Rule {
            call: libc::$name,
            name: stringify!($name),
            when: &[$($when),*],
            why: $why,
        }
    };
}
pub(super) use permit;

// linux/bpf_common.h: BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
const LOAD_WORD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
const CLONE3: u32 = libc::SYS_clone3 as u32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_multiply_out() {
        let when = [Cond::Among(1, &[1, 2, 3]), Cond::Masked(2, 4, &[0, 4])];
        assert_eq!(alternatives(&when).unwrap().len(), 6);
    }

    #[test]
    fn a_rule_about_rings_allows_nothing_where_there_is_none() {
        let other = permit!(SYS_read, "test");
        let ring = permit!(SYS_io_uring_enter, [Cond::Ring(0)], "test");
        let hash = |rules: &[&Rule]| compile(rules, SeccompAction::KillProcess).unwrap().sha256;
        let none = hash(&[&other]);
        assert_eq!(hash(&[&other, &ring]), none);
        allow_ring(77);
        let there = hash(&[&other, &ring]);
        assert_ne!(there, none);
        let exact = permit!(SYS_io_uring_enter, [Cond::Among(0, &[77])], "test");
        assert_eq!(there, hash(&[&other, &exact]));
    }

    #[test]
    fn the_hash_tells_filters_apart() {
        let read = permit!(SYS_read, "test");
        let write = permit!(SYS_write, "test");
        let hash = |rules: &[&Rule]| compile(rules, SeccompAction::KillProcess).unwrap().sha256;
        assert_eq!(hash(&[&read]), hash(&[&read]));
        assert_ne!(hash(&[&read]), hash(&[&write]));
        assert_ne!(hash(&[&read]), hash(&[&read, &write]));
    }
}
