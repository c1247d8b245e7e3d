//! Vault's KV v2 API as a second store, against a local server that speaks the part of it that is used.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;

use serde_json::json;

use super::*;
use crate::broker::admin::StoreAdmin;
use crate::broker::config::{Encoding, VaultConfig};
use crate::broker::vault::VaultStore;

const TOKEN: &str = "hvs.token";

/// Speaks KV v2 for the mount `kv`, or answers everything as it is told.
struct FakeVault {
    address: SocketAddr,
    kept: Arc<Mutex<Kv>>,
}

#[derive(Default)]
struct Kv {
    secrets: BTreeMap<String, Value>,
    told: Option<(u16, String)>,
    silent: bool,
    asked: Vec<String>,
}

impl FakeVault {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let kept = Arc::new(Mutex::new(Kv::default()));
        let shared = kept.clone();
        std::thread::spawn(move || {
            let mut open = Vec::new();
            for stream in listener.incoming().map_while(Result::ok) {
                if shared.lock().unwrap().silent {
                    open.push(stream);
                } else {
                    answer(stream, &shared);
                }
            }
        });
        Self { address, kept }
    }

    fn config(&self, folder: &Path) -> VaultConfig {
        VaultConfig {
            address: format!("http://{}", self.address),
            mount: "kv".into(),
            prefix: "casemate".into(),
            token_file: folder.join("token"),
            namespace: Some("team".into()),
            ca: None,
            field: "value".into(),
            encoding: Encoding::Base64,
            timeout_s: 1,
        }
    }

    fn tell(&self, status: u16, body: &str) {
        self.kept.lock().unwrap().told = Some((status, body.into()));
    }
}

fn answer(stream: TcpStream, kv: &Mutex<Kv>) {
    let mut reader = BufReader::new(stream);
    let (mut head, mut line) = (String::new(), String::new());
    while reader.read_line(&mut line).is_ok_and(|read| read > 2) {
        head.push_str(&line);
        line.clear();
    }
    let lower = head.to_ascii_lowercase();
    let length = lower.split("content-length: ").nth(1);
    let length = length.and_then(|rest| rest.lines().next()?.trim().parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body).unwrap();
    let mut kv = kv.lock().unwrap();
    let request = head.lines().next().unwrap().to_owned();
    kv.asked.push(request.clone());
    let told = kv.told.clone();
    let authorised =
        lower.contains("x-vault-token: hvs.token") && lower.contains("x-vault-namespace: team");
    let (status, text) = match told {
        Some(told) => told,
        None if !authorised => (403, json!({ "errors": ["permission denied"] }).to_string()),
        None => kv2(&mut kv.secrets, &request, &body),
    };
    let answer = format!(
        "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{text}",
        text.len()
    );
    let _ = reader.get_mut().write_all(answer.as_bytes());
}

fn kv2(secrets: &mut BTreeMap<String, Value>, request: &str, body: &[u8]) -> (u16, String) {
    let none = (404, json!({ "errors": [] }).to_string());
    let mut words = request.split(' ');
    let (method, target) = (words.next().unwrap(), words.next().unwrap());
    let Some(rest) = target.strip_prefix("/v1/kv/") else {
        return none;
    };
    let (kind, path) = rest.split_once('/').unwrap();
    match (method, kind) {
        ("POST", "data") => {
            let sent: Value = serde_json::from_slice(body).unwrap();
            secrets.insert(path.into(), sent["data"].clone());
            (200, json!({ "data": { "version": 1 } }).to_string())
        }
        ("GET", "data") => match secrets.get(path) {
            Some(data) => {
                let metadata = json!({ "version": 1, "destroyed": false });
                (
                    200,
                    json!({ "data": { "data": data, "metadata": metadata } }).to_string(),
                )
            }
            None => none,
        },
        ("DELETE", "metadata") => {
            secrets.remove(path);
            (204, String::new())
        }
        ("GET", "metadata") => {
            let folder = path.strip_suffix("?list=true").unwrap();
            let mut keys: Vec<String> = secrets
                .keys()
                .filter_map(|key| key.strip_prefix(folder))
                .map(|rest| match rest.split_once('/') {
                    Some((name, _)) => format!("{name}/"),
                    None => rest.to_owned(),
                })
                .collect();
            keys.dedup();
            if keys.is_empty() {
                return none;
            }
            (200, json!({ "data": { "keys": keys } }).to_string())
        }
        _ => (405, String::new()),
    }
}

fn token(folder: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    let path = folder.join("token");
    std::fs::write(&path, format!("{TOKEN}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn vault() -> (FakeVault, VaultStore, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    token(folder.path(), 0o600);
    let vault = FakeVault::start();
    let store = VaultStore::new(vault.config(folder.path())).unwrap();
    (vault, store, folder)
}

fn failed(store: &VaultStore) -> String {
    use casemate_attest::broker::ResourceStore;
    store.get(&path(DISK)).unwrap_err().to_string()
}

#[test]
fn secrets_come_and_go() {
    use casemate_attest::broker::ResourceStore;
    let (vault, store, _folder) = vault();
    assert!(store.get(&path(DISK)).unwrap().is_none());
    assert!(store.list().unwrap().is_empty());
    store.put(&path(DISK), b"\x00\xff").unwrap();
    store.put(&path("b/key/x"), SECRET).unwrap();
    assert_eq!(
        store.get(&path(DISK)).unwrap().unwrap().as_slice(),
        b"\x00\xff"
    );
    assert_eq!(store.list().unwrap(), ["b/key/x", DISK]);
    assert!(store.remove(&path(DISK)).unwrap());
    assert!(!store.remove(&path(DISK)).unwrap());
    assert_eq!(store.list().unwrap(), ["b/key/x"]);
    let kept = vault.kept.lock().unwrap();
    assert!(kept.asked[0].starts_with("GET /v1/kv/data/casemate/default/key/disk HTTP/1.1"));
    assert_eq!(
        kept.secrets["casemate/b/key/x"],
        json!({ "value": "dGhlIGRpc2sncyBrZXk=" })
    );
}

#[test]
fn text_is_kept_as_it_is() {
    use casemate_attest::broker::ResourceStore;
    let folder = tempfile::tempdir().unwrap();
    token(folder.path(), 0o400);
    let vault = FakeVault::start();
    let mut config = vault.config(folder.path());
    config.encoding = Encoding::Text;
    let store = VaultStore::new(config).unwrap();
    store.put(&path(DISK), b"pass phrase").unwrap();
    assert_eq!(
        store.get(&path(DISK)).unwrap().unwrap().as_slice(),
        b"pass phrase"
    );
    assert!(store.put(&path(DISK), b"\xff").is_err());
}

#[test]
fn what_vault_refuses_or_breaks_is_no_secret() {
    use casemate_attest::broker::ResourceStore;
    let (vault, store, folder) = vault();
    store.put(&path(DISK), SECRET).unwrap();
    vault.tell(403, "{\"errors\":[\"permission denied\"]}");
    assert!(failed(&store).contains("403"));
    vault.tell(500, "{\"errors\":[\"storage is down\\u001b\"]}");
    assert!(failed(&store).contains("500") && failed(&store).contains("storage is down"));
    assert!(!failed(&store).contains('\u{1b}'));
    vault.tell(503, "sealed");
    assert!(failed(&store).contains("503"));
    vault.tell(307, "");
    assert!(failed(&store).contains("307"));
    for body in [
        "",
        "{",
        "[]",
        "{\"data\":1}",
        "{\"data\":{\"data\":{}}}",
        "{\"data\":{\"data\":{\"value\":7}}}",
        "{\"data\":{\"data\":{\"value\":\"%%\"}}}",
    ] {
        vault.tell(200, body);
        assert!(failed(&store).contains("cannot be read"), "{body}");
    }
    vault.tell(200, &" ".repeat(3 << 20));
    failed(&store);
    // A deleted version: Vault's metadata and no data.
    for (status, body) in [
        (404, "{\"data\":{\"data\":null}}"),
        (200, "{\"data\":{\"data\":null}}"),
    ] {
        vault.tell(status, body);
        assert!(store.get(&path(DISK)).unwrap().is_none());
    }
    vault.kept.lock().unwrap().told = None;
    assert!(store.get(&path(DISK)).unwrap().is_some());
    token(folder.path(), 0o644);
    assert!(failed(&store).contains("0600"));
    std::fs::remove_file(folder.path().join("token")).unwrap();
    assert!(failed(&store).contains("token"));
}

#[test]
fn a_vault_that_does_not_answer_is_given_up() {
    let (vault, store, _folder) = vault();
    vault.kept.lock().unwrap().silent = true;
    assert!(failed(&store).contains("did not answer"));
    let mut config = vault.config(Path::new("."));
    // A port that was just freed: nobody listens.
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    config.address = format!("http://{free}");
    let folder = tempfile::tempdir().unwrap();
    token(folder.path(), 0o600);
    config.token_file = folder.path().join("token");
    assert!(failed(&VaultStore::new(config).unwrap()).contains("did not answer"));
}

#[test]
fn a_token_does_not_travel_in_clear_nor_elsewhere() {
    let vault = FakeVault::start();
    for address in [
        "http://10.0.0.1:8200",
        "http://localhost:8200",
        "ftp://127.0.0.1",
        "127.0.0.1:8200",
        "",
        "http://127.0.0.1:8200/v1",
        "http://[::2]:8200",
        "http://user@10.0.0.1/",
    ] {
        let mut config = vault.config(Path::new("."));
        config.address = address.into();
        assert!(VaultStore::new(config).is_err(), "{address}");
    }
    for (mount, prefix) in [
        ("", ""),
        ("kv/../sys", ""),
        ("kv", "a/../b"),
        ("kv", "/a"),
        ("k v", ""),
    ] {
        let mut config = vault.config(Path::new("."));
        (config.mount, config.prefix) = (mount.into(), prefix.into());
        assert!(VaultStore::new(config).is_err(), "{mount} {prefix}");
    }
}

#[test]
fn a_broker_releases_what_vault_keeps() {
    let case = Case::new();
    let vault = FakeVault::start();
    token(case.folder.path(), 0o600);
    let text = String::from_utf8(read(&case.folder.path().join("broker.toml"))).unwrap();
    let store = "store = { file = \"secrets.sealed\", key = \"store.key\" }";
    let address = vault.address;
    let kv = format!(
        "vault = {{ address = \"http://{address}\", mount = \"kv\", prefix = \"casemate\", \
         token_file = \"token\", namespace = \"team\" }}"
    );
    case.write("broker.toml", &text.replace(store, &kv));
    let store = open_store(&mut case.config()).unwrap();
    store.put(&path(DISK), b"kept in Vault").unwrap();
    let running = case.start();
    let mut client = running.client();
    client.attest(&mut Emulated::default()).unwrap();
    assert_eq!(
        client.resource(&path(DISK)).unwrap().as_slice(),
        b"kept in Vault"
    );
    vault.tell(503, "{\"errors\":[\"Vault is sealed\"]}");
    let refused = client.resource(&path(DISK)).unwrap_err();
    assert!(refused.passes(), "{refused}");
    assert!(!refused.to_string().contains("sealed"));
}
