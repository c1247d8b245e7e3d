//! `evidence-verify BUNDLE KEY [NOTE]`: verifies a Casemate evidence bundle with nothing but the log's public key, and that
//! it extends a checkpoint kept from before.
//!
//! Written from the format's description (policy/src/bundle/mod.rs, RFC 6962, c2sp.org/signed-note) without Casemate's code.
#![expect(
    clippy::indexing_slicing,
    reason = "of JSON, where what is missing is null, and within lengths that were checked"
)]

use std::collections::BTreeMap;
use std::process::ExitCode;

use data_encoding::{BASE64, HEXLOWER};
use ed25519_dalek::{Signature, VerifyingKey};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

type Hash = [u8; 32];
type Members = BTreeMap<String, Vec<u8>>;
type Roots = Vec<(u64, Hash)>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = run(&arguments);
    match &result {
        Ok(found) => println!("{found}"),
        Err(why) => eprintln!("refused: {why}"),
    }
    ExitCode::from(u8::from(result.is_err()))
}

fn run(arguments: &[String]) -> Result<String, String> {
    let (bundle, key, held) = match arguments {
        [bundle, key] => (bundle, key, None),
        [bundle, key, held] => (bundle, key, Some(std::fs::read_to_string(held).map_err(err)?)),
        _ => return Err("usage: evidence-verify BUNDLE KEYFILE [KEPT CHECKPOINT]".to_owned()),
    };
    let key = std::fs::read_to_string(key).map_err(err)?;
    verify(&std::fs::read(bundle).map_err(err)?, key.trim(), held.as_deref())
}

fn verify(bundle: &[u8], trusted: &str, held: Option<&str>) -> Result<String, String> {
    let members = untar(bundle)?;
    let manifest = json(member(&members, "manifest.json")?)?;
    refuse_if(manifest["format"] != "casemate-evidence-bundle 1", "another format")?;
    check_digests(&members, &manifest)?;
    let keys = keys(&json(member(&members, "keys.json")?)?)?;
    refuse_if(!keys.iter().any(|key| key == trusted), "none of its keys is the given one")?;
    let checkpoint = open(member(&members, "checkpoint")?, keys.last().ok_or("no key")?)?;
    let same = manifest["origin"] == checkpoint.origin.as_str() && manifest["size"] == checkpoint.size;
    refuse_if(!same, "the manifest is of another checkpoint")?;
    let by_any =
        |note: &str| keys.iter().find_map(|key| open(note, key).ok()).ok_or("not a checkpoint by the log's keys");
    let held = held.map(by_any).transpose()?;
    let mut roots = vec![(checkpoint.size, checkpoint.root)];
    for line in member(&members, "consistency.jsonl")?.split_terminator('\n') {
        let line = json(line)?;
        let old = by_any(line["checkpoint"].as_str().ok_or("no checkpoint")?)?;
        let proven = consistent(&old, &checkpoint, &hashes(&line["proof"])?);
        refuse_if(!proven, &format!("not consistent with the checkpoint over {}", old.size))?;
        roots.push((old.size, old.root));
    }
    let records = member(&members, "records.jsonl")?;
    let count = match manifest["kind"].as_str() {
        Some("range") => {
            let base = json(member(&members, "base.json")?)?;
            refuse_if(manifest["first"] != base["size"], "the manifest is of another base")?;
            check_range(&base, &checkpoint, records, held.as_ref().map(|held| held.size), &mut roots)?
        }
        Some("selection") => check_selection(&members, &checkpoint, records)?,
        _ => return Err("an unknown kind".into()),
    };
    refuse_if(manifest["records"] != count, "another number of records than the manifest says")?;
    check_policies(&manifest, records)?;
    let extends = held.is_none_or(|held| roots.contains(&(held.size, held.root)));
    refuse_if(!extends, "it does not extend the kept checkpoint")?;
    Ok(format!("verified: {count} records of {} under a checkpoint over {}", checkpoint.origin, checkpoint.size))
}

/// ustar, plain files only.
fn untar(bytes: &[u8]) -> Result<Members, String> {
    let mut members = Members::new();
    let mut rest = bytes;
    while let Some((header, after)) = rest.split_at_checked(512) {
        if header.iter().all(|byte| *byte == 0) {
            refuse_if(after != [0; 512], "something behind the end")?;
            return Ok(members);
        }
        let field = |from: usize, to: usize| -> Result<&str, String> {
            let raw = header.get(from..to).unwrap_or_default().split(|byte| *byte == 0).next();
            std::str::from_utf8(raw.unwrap_or_default()).map_err(err)
        };
        let plain = header.get(156) == Some(&b'0') && field(345, 500)?.is_empty();
        refuse_if(!plain, "not a plain file")?;
        let octal = |text: &str| usize::from_str_radix(text.trim(), 8).map_err(err);
        let sum = |from: usize, to: usize| header[from..to].iter().map(|byte| usize::from(*byte)).sum::<usize>();
        let sum = format!("{:07o}\0", sum(0, 148) + 8 * 32 + sum(156, 512));
        refuse_if(header[148..156] != *sum.as_bytes(), "a header's sum is wrong")?;
        let size = octal(field(124, 136)?)?;
        let content = after.get(..size).ok_or("a member is cut off")?;
        refuse_if(members.insert(field(0, 100)?.to_owned(), content.to_vec()).is_some(), "a member twice")?;
        let (padding, next) = after[size..].split_at_checked(size.wrapping_neg() % 512).ok_or("the end is cut off")?;
        refuse_if(padding.iter().any(|byte| *byte != 0), "something between the members")?;
        rest = next;
    }
    Err("no end".into())
}

fn check_digests(members: &Members, manifest: &Value) -> Result<(), String> {
    let listed = manifest["files"].as_object().ok_or("no list of files")?;
    refuse_if(listed.len() + 1 != members.len(), "other members than the manifest lists")?;
    for (name, digest) in listed {
        let found: Hash = Sha256::digest(member(members, name)?).into();
        refuse_if(*digest != HEXLOWER.encode(&found), &format!("{name} is not the one in the manifest"))?;
    }
    Ok(())
}

/// The log's keys, each but the first named in a record that the one before signed.
fn keys(value: &Value) -> Result<Vec<String>, String> {
    let newest = value["key"].as_str().ok_or("no key")?;
    let rotations = value["rotations"].as_array().ok_or("no rotations")?;
    let mut keys: Vec<String> = Vec::new();
    for rotation in rotations {
        let line = rotation["record"].as_str().ok_or("no record")?;
        let record = json(line)?;
        let named = |name: &str| record["detail"][name].as_str().unwrap_or_default().to_owned();
        let old = keys.last().cloned().unwrap_or_else(|| named("old_key"));
        let checkpoint = open(rotation["checkpoint"].as_str().ok_or("no checkpoint")?, &old)?;
        let seq = record["seq"].as_u64().ok_or("no place")?;
        let right = record["actor"] == "ledger"
            && record["action"] == "rotate-key"
            && checkpoint.size.checked_sub(1) == Some(seq);
        refuse_if(
            !right || !included(&leaf(line), seq, &checkpoint, &hashes(&rotation["proof"])?),
            "a change of keys is not proven",
        )?;
        if keys.is_empty() {
            keys.push(old);
        }
        keys.push(named("new_key"));
    }
    if keys.is_empty() {
        keys.push(newest.to_owned());
    }
    refuse_if(keys.last().is_none_or(|key| key != newest), "the newest key is another")?;
    Ok(keys)
}

struct Checkpoint {
    origin: String,
    size: u64,
    root: Hash,
}

/// A signed note whose text is a checkpoint, by this key (`name+id+base64`).
fn open(note: &str, key: &str) -> Result<Checkpoint, String> {
    let (name, rest) = key.split_once('+').ok_or("no verifier key")?;
    let (id, public) = rest.split_once('+').ok_or("no verifier key")?;
    let public = decode64(public)?;
    let (kind, public) = public.split_first().ok_or("an empty key")?;
    let hash = Sha256::new().chain_update(format!("{name}\n")).chain_update([*kind]).chain_update(public);
    let computed: Hash = hash.finalize().into();
    let computed = computed.first_chunk::<4>().ok_or("no id")?;
    refuse_if(*kind != 1 || HEXLOWER.encode(computed) != id, "the key's id is wrong")?;
    let public: Hash = public.try_into().map_err(|_| "the key's length is wrong")?;
    let public = VerifyingKey::from_bytes(&public).map_err(err)?;
    let (body, signatures) = note.rsplit_once("\n\n").ok_or("no signatures")?;
    let body = format!("{body}\n");
    let mut signed = false;
    for line in signatures.split_terminator('\n') {
        let (signer, blob) =
            line.strip_prefix("— ").and_then(|line| line.split_once(' ')).ok_or("no signature line")?;
        let blob = decode64(blob)?;
        if let (true, Some((own, signature))) = (signer == name, blob.split_first_chunk::<4>())
            && own == computed
        {
            let signature = Signature::from_slice(signature).map_err(err)?;
            public.verify_strict(body.as_bytes(), &signature).map_err(|_| "a signature is wrong")?;
            signed = true;
        }
    }
    let (origin, rest) = body.split_once('\n').ok_or("no checkpoint")?;
    let (size, rest) = rest.split_once('\n').ok_or("no checkpoint")?;
    let root = rest.split_terminator('\n').next().ok_or("no checkpoint")?;
    refuse_if(!signed || origin != name, "not signed by the key")?;
    Ok(Checkpoint {
        origin: origin.to_owned(),
        size: size.parse().map_err(|_| "no size")?,
        root: decode64(root)?.try_into().map_err(|_| "no root")?,
    })
}

/// The root of the tree that has the base's peaks and then the records' leaves must be the checkpoint's.
fn check_range(
    base: &Value,
    to: &Checkpoint,
    records: &str,
    at: Option<u64>,
    roots: &mut Roots,
) -> Result<u64, String> {
    let (mut peaks, mut size) = (hashes(&base["peaks"])?, base["size"].as_u64().ok_or("no base")?);
    refuse_if(peaks.len() != size.count_ones() as usize, "the base is no tree's edge")?;
    let first = size;
    for line in records.split_terminator('\n') {
        refuse_if(json(line)?["seq"] != size, &format!("record {size} is missing or out of place"))?;
        let mut peak = leaf(line);
        for _ in 0..size.trailing_ones() {
            peak = node(&peaks.pop().ok_or("no peak")?, &peak);
        }
        peaks.push(peak);
        size += 1;
        roots.extend(root(&peaks).filter(|_| at == Some(size)).map(|root| (size, root)));
    }
    refuse_if((size, root(&peaks)) != (to.size, Some(to.root)), "the records are not those that were signed")?;
    Ok(size - first)
}

fn root(peaks: &[Hash]) -> Option<Hash> {
    peaks.iter().copied().rev().reduce(|right, left| node(&left, &right))
}

fn check_selection(members: &Members, checkpoint: &Checkpoint, records: &str) -> Result<u64, String> {
    let proofs = member(members, "proofs.jsonl")?;
    let (records, proofs): (Vec<&str>, Vec<&str>) =
        (records.split_terminator('\n').collect(), proofs.split_terminator('\n').collect());
    refuse_if(records.len() != proofs.len(), "not a proof for each record")?;
    for (line, proof) in records.iter().zip(proofs) {
        let (record, proof) = (json(line)?, json(proof)?);
        let seq = record["seq"].as_u64().ok_or("no place")?;
        refuse_if(
            proof["seq"] != seq || !included(&leaf(line), seq, checkpoint, &hashes(&proof["proof"])?),
            &format!("record {seq} is not proven"),
        )?;
    }
    Ok(records.len() as u64)
}

fn check_policies(manifest: &Value, records: &str) -> Result<(), String> {
    let mut seen = Vec::new();
    for line in records.split_terminator('\n') {
        let record = json(line)?;
        let name = match record["action"].as_str() {
            Some("start") => "policy",
            Some("policy-load") => "digest",
            _ => continue,
        };
        if record["detail"][name].is_string() {
            seen.push(serde_json::json!({ "digest": record["detail"][name], "seq": record["seq"] }));
        }
    }
    if manifest["policies"] == Value::from(seen) { Ok(()) } else { Err("other policies than the records name".into()) }
}

/// The root that an inclusion proof gives: RFC 6962, 2.1.1, read backwards.
fn included(leaf: &Hash, index: u64, tree: &Checkpoint, proof: &[Hash]) -> bool {
    fn root(leaf: &Hash, index: u64, size: u64, proof: &[Hash]) -> Option<Hash> {
        if size == 1 {
            return proof.is_empty().then_some(*leaf);
        }
        let (middle, (other, rest)) = (split(size), proof.split_last()?);
        Some(if index < middle {
            node(&root(leaf, index, middle, rest)?, other)
        } else {
            node(other, &root(leaf, index - middle, size - middle, rest)?)
        })
    }
    index < tree.size && root(leaf, index, tree.size, proof) == Some(tree.root)
}

/// The two roots that a consistency proof gives: RFC 6962, 2.1.2, read backwards.
fn consistent(old: &Checkpoint, new: &Checkpoint, proof: &[Hash]) -> bool {
    fn roots(old: u64, new: u64, known: Option<Hash>, proof: &[Hash]) -> Option<(Hash, Hash)> {
        if old == new {
            return match (known, proof) {
                (Some(root), []) => Some((root, root)),
                (None, [root]) => Some((*root, *root)),
                _ => None,
            };
        }
        let (middle, (other, rest)) = (split(new), proof.split_last()?);
        Some(if old <= middle {
            let (before, after) = roots(old, middle, known, rest)?;
            (before, node(&after, other))
        } else {
            let (before, after) = roots(old - middle, new - middle, None, rest)?;
            (node(other, &before), node(other, &after))
        })
    }
    let valid = 0 < old.size && old.size <= new.size;
    valid && roots(old.size, new.size, Some(old.root), proof) == Some((old.root, new.root))
}

/// The largest power of two smaller than a size above 1.
fn split(size: u64) -> u64 {
    1 << (63 - (size - 1).leading_zeros())
}

fn leaf(line: &str) -> Hash {
    Sha256::new().chain_update([0]).chain_update(line).finalize().into()
}

fn node(left: &Hash, right: &Hash) -> Hash {
    Sha256::new().chain_update([1]).chain_update(left).chain_update(right).finalize().into()
}

fn err(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn refuse_if(wrong: bool, why: &str) -> Result<(), String> {
    if wrong { Err(why.to_owned()) } else { Ok(()) }
}

fn member<'a>(members: &'a Members, name: &str) -> Result<&'a str, String> {
    let bytes = members.get(name).ok_or_else(|| format!("{name} is missing"))?;
    std::str::from_utf8(bytes).map_err(err)
}

fn json(text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(err)
}

fn hashes(value: &Value) -> Result<Vec<Hash>, String> {
    let hash = |value: &Value| -> Option<Hash> { HEXLOWER.decode(value.as_str()?.as_bytes()).ok()?.try_into().ok() };
    let list = value.as_array().ok_or("no hashes")?;
    list.iter().map(|value| hash(value).ok_or_else(|| "no hash".to_owned())).collect()
}

fn decode64(text: &str) -> Result<Vec<u8>, String> {
    BASE64.decode(text.as_bytes()).map_err(err)
}
