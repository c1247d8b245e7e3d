//! A second opinion in Rego, which may only restrict (cargo feature `rego`).
//!
//! The policy sees the inquiry as `input`, in the schema that `REGO.md` fixes, and is asked for one rule. Only the answer
//! `true` lets a decision stand: `false`, anything else, undefined, an error, and running out of steps refuse. The engine
//! is built without network, clock and randomness; a policy that names a builtin which could take long in one step is
//! refused when it is read.

use std::sync::Arc;

use regorus::languages::rego::compiler::Compiler;
use regorus::rvm::program::Program;
use regorus::rvm::vm::RegoVM;
use regorus::{Engine, Value};
use serde_json::{Value as Json, json};

use crate::claims::Inquiry;
use crate::evaluate::{Code, Decision, Reason};
use crate::types::{Fingerprint, Technology};

/// A Rego policy that has been read.
pub struct RegoPolicy {
    program: Arc<Program>,
    dialect: Dialect,
    digest: Fingerprint,
}

/// Whose input a policy was written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// `package casemate`, rule `allow`.
    Casemate,
    /// `package policy`, rule `allow`, as Trustee's resource policies are; Rego of version 1 or 0.
    Trustee,
}

impl RegoPolicy {
    /// Reads a policy of at most [`MAX_REGO`] bytes; `file` only names it in errors.
    pub fn parse(file: &str, text: &str, dialect: Dialect) -> Result<Self, RegoError> {
        let invalid = |problem: String| RegoError::Invalid {
            file: file.to_owned(),
            problem,
        };
        if text.len() > MAX_REGO {
            return Err(invalid(format!("longer than {MAX_REGO} bytes")));
        }
        let rule = dialect.rule();
        let program = match (compile(file, text, rule, false), dialect) {
            (Err(_), Dialect::Trustee) => compile(file, text, rule, true),
            (first, _) => first,
        };
        let program = program.map_err(invalid)?;
        let builtins = program.builtin_info_table.iter();
        if let Some(slow) = builtins.clone().find(|b| SLOW.contains(&b.name.as_str())) {
            return Err(invalid(format!(
                "`{}` can take any time in one step; do without it",
                slow.name
            )));
        }
        Ok(Self {
            program,
            dialect,
            digest: Fingerprint::of(text.as_bytes()),
        })
    }

    /// SHA-256 of the text, for the ledger.
    pub fn digest(&self) -> Fingerprint {
        self.digest
    }

    /// The typed policy's decision, and one rule more. What it refused stays refused.
    pub fn restrict(&self, inquiry: &Inquiry, decision: Decision) -> Decision {
        let answer = self.ask(inquiry);
        let mut reasons = decision.reasons;
        reasons.push(Reason {
            rule: "rego",
            wanted: format!("{} == true", self.dialect.rule()),
            found: match &answer {
                Ok(answer) => answer.clone(),
                Err(problem) => problem.chars().take(SHOWN).collect(),
            },
            allows: answer.as_deref() == Ok("true"),
            code: Code::RegoRefused,
            remedy: "see the Rego policy; what is undefined or fails refuses",
        });
        Decision::of(reasons)
    }

    fn ask(&self, inquiry: &Inquiry) -> Result<String, String> {
        let value = |json: Json| {
            Value::from_json_str(&json.to_string()).map_err(|e| format!("the input: {e}"))
        };
        let (input, data) = match self.dialect {
            Dialect::Casemate => (input(inquiry), json!({})),
            Dialect::Trustee => (trustee_input(inquiry), trustee_data(inquiry)),
        };
        let mut vm = RegoVM::new();
        vm.set_max_instructions(MAX_STEPS);
        vm.load_program(Arc::clone(&self.program));
        vm.set_data(value(data)?).map_err(|e| e.to_string())?;
        vm.set_input(value(input)?);
        let answer = vm.execute().map_err(|e| e.to_string())?;
        Ok(match answer {
            Value::Bool(true) => "true".to_owned(),
            Value::Undefined => "undefined".to_owned(),
            other => {
                let text = other.to_string();
                // A text that reads `true` is not the answer.
                format!("not true: {}", text.chars().take(SHOWN).collect::<String>())
            }
        })
    }
}

impl Dialect {
    const fn rule(self) -> &'static str {
        match self {
            Self::Casemate => "data.casemate.allow",
            Self::Trustee => "data.policy.allow",
        }
    }
}

/// What a policy in [`Dialect::Casemate`] sees. Every claim has its key; one that nobody made is `null`.
pub fn input(inquiry: &Inquiry) -> Json {
    let mut action = json!({ "name": inquiry.action.name() });
    if let (Json::Object(to), Ok(Json::Object(from))) =
        (&mut action, serde_json::to_value(&inquiry.action))
    {
        let inner = from.into_iter().next().map(|(_, inner)| inner);
        if let Some(Json::Object(fields)) = inner {
            to.extend(fields.into_iter().filter(|(key, _)| key != "name"));
        }
    }
    let (guest, host) = (&inquiry.guest, &inquiry.host);
    json!({
        "schema": 1,
        "clock": inquiry.clock,
        "clock_unix": inquiry.clock.unix(),
        "actor": inquiry.actor,
        "approvals": inquiry.approvals,
        "object": inquiry.object,
        "action": action,
        "guest": {
            "launch_digest": guest.launch_digest,
            "launch_signers": guest.launch_signers,
            "product": guest.product,
            "tcb": guest.tcb,
            "policy_bits": guest.policy_bits,
            "vmpl": guest.vmpl,
            "nonce_matches": guest.nonce_matches,
            "evidence_age_s": guest.evidence_age_s,
        },
        "host": {
            "landlock_abi": host.landlock_abi,
            "sandbox": host.sandbox,
            "firmware": host.firmware,
        },
        "session": inquiry.session,
    })
}

/// What a policy in [`Dialect::Trustee`] sees: the claims of an EAR with one submodule `cpu0`. A claim that nobody made
/// has no key, as with Trustee.
fn trustee_input(inquiry: &Inquiry) -> Json {
    let guest = &inquiry.guest;
    let mut snp = serde_json::Map::new();
    if let Some(digest) = &guest.launch_digest {
        snp.insert("measurement".to_owned(), json!(digest));
    }
    if let Some(tcb) = guest.tcb {
        snp.insert("reported_tcb_bootloader".to_owned(), json!(tcb.boot_loader));
        snp.insert("reported_tcb_tee".to_owned(), json!(tcb.tee));
        snp.insert("reported_tcb_snp".to_owned(), json!(tcb.snp));
        snp.insert("reported_tcb_microcode".to_owned(), json!(tcb.microcode));
        if let Some(fmc) = tcb.fmc {
            snp.insert("reported_tcb_fmc".to_owned(), json!(fmc));
        }
    }
    if let Some(bits) = guest.policy_bits {
        snp.insert("policy_abi_minor".to_owned(), json!(bits & 0xff));
        snp.insert("policy_abi_major".to_owned(), json!(bits >> 8 & 0xff));
        for (name, bit) in POLICY_BITS {
            snp.insert(name.to_owned(), json!(bits >> bit & 1 == 1));
        }
    }
    let (technology, emulated) = inquiry
        .action
        .technology()
        .unwrap_or((Technology::None, false));
    let tee = match technology {
        Technology::SevSnp => "snp",
        Technology::Sev | Technology::SevEs => "sev",
        Technology::None => "none",
    };
    // The typed policy stands before this one, so what comes here is affirmed if it was attested at all.
    let attested = matches!(
        inquiry.action,
        crate::Action::Attest { verified: true, .. }
            | crate::Action::ReleaseSecret {
                measurement_matches: true,
                ..
            }
    );
    let status = if attested { "affirming" } else { "none" };
    json!({
        "submods": { "cpu0": {
            "ear.status": status,
            "ear.veraison.annotated-evidence": { tee: snp },
        } },
        "tee": tee,
        "casemate": { "emulated": emulated, "object": inquiry.object, "action": inquiry.action.name() },
    })
}

/// Trustee names what is asked for by a path of three parts.
fn trustee_data(inquiry: &Inquiry) -> Json {
    let path = format!("casemate/{}/{}", inquiry.action.name(), inquiry.object);
    json!({ "plugin": "resource", "resource-path": path })
}

fn compile(file: &str, text: &str, rule: &str, old: bool) -> Result<Arc<Program>, String> {
    let mut engine = Engine::new();
    engine.set_rego_v0(old);
    engine
        .add_policy(file.to_owned(), text.to_owned())
        .map_err(|e| e.to_string())?;
    let compiled = engine
        .compile_with_entrypoint(&rule.into())
        .map_err(|e| e.to_string())?;
    Compiler::compile_from_policy(&compiled, &[rule]).map_err(|e| e.to_string())
}

/// Why a Rego policy is not read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegoError {
    /// Not one that can be used.
    #[error("{file}: {problem}")]
    Invalid {
        /// The file.
        file: String,
        /// What is wrong.
        problem: String,
    },
}

/// Guest policy bits by the names that Trustee gives them; SNP ABI specification (56860), GUEST_POLICY.
const POLICY_BITS: [(&str, u32); 4] = [
    ("policy_smt_allowed", 16),
    ("policy_migrate_ma", 18),
    ("policy_debug_allowed", 19),
    ("policy_single_socket", 20),
];
/// Builtins whose one step makes as much as their arguments say.
const SLOW: [&str; 4] = [
    "numbers.range",
    "numbers.range_step",
    "strings.render_template",
    "bits.lsh",
];
/// Instructions of one decision.
const MAX_STEPS: usize = 100_000;
/// The largest policy, in bytes.
pub const MAX_REGO: usize = 256 << 10;
/// Characters of an answer in a reason.
const SHOWN: usize = 200;
