//! The guest's owner: a folder of its own, commands of its own, and no trust in the host.

use std::fs;
use std::path::{Path, PathBuf};

use crate::answers::{Platform, Release};
use crate::error::{E2eError, OnFile, Result};
use crate::site::Site;

/// An owner with a secret.
pub struct Owner {
    folder: PathBuf,
    secret: String,
}

/// A session with one platform.
pub struct Session {
    keys: PathBuf,
    platform: PathBuf,
    root: Option<String>,
    /// The half that the host gets: no key in it.
    pub for_host: PathBuf,
}

impl Owner {
    /// Makes the folder and a random secret.
    pub fn new(folder: &Path) -> Result<Self> {
        use ring::rand::SecureRandom as _;
        fs::create_dir_all(folder).on("create", folder)?;
        let mut random = [0u8; 24];
        ring::rand::SystemRandom::new()
            .fill(&mut random)
            .map_err(|_| E2eError::Answer("the kernel gives no random bytes".into()))?;
        let secret = format!("owner-secret-{}", hex::encode(random));
        let path = folder.join("secret");
        fs::write(&path, &secret).on("write", &path)?;
        Ok(Self {
            folder: folder.to_owned(),
            secret,
        })
    }

    /// The secret.
    pub fn secret(&self) -> &str {
        &self.secret
    }

    /// What the guest prints once it has the secret.
    pub fn secret_sha256(&self) -> String {
        hex::encode(ring::digest::digest(
            &ring::digest::SHA256,
            self.secret.as_bytes(),
        ))
    }

    /// Verifies the platform of `site` and makes a session for one launch of `description` there.
    pub fn session(&self, site: &Site, name: &str, description: &Path) -> Result<Session> {
        let place = self.folder.join(name);
        let session = Session {
            keys: place.join("keys"),
            platform: place.join("platform"),
            root: trusted_root(site)?,
            for_host: place.join("for-host"),
        };
        site.done(&["platform", "export", "--out", text(&session.platform)?])?;
        let mut words = vec![
            "owner",
            "session",
            "--platform",
            text(&session.platform)?,
            "--description",
        ];
        words.extend([text(description)?, "--out", text(&session.keys)?]);
        session.trust(&mut words);
        site.done(&words)?;
        fs::create_dir_all(&session.for_host).on("create", &session.for_host)?;
        for file in ["owner.cert", "session.bin"] {
            fs::copy(session.keys.join(file), session.for_host.join(file))
                .on("copy", &session.keys.join(file))?;
        }
        Ok(session)
    }

    /// Compares the launch's measurement with the description's and releases the secret if they agree; returns the
    /// exit status and the verdict.
    pub fn release(
        &self,
        site: &Site,
        session: &Session,
        guest: &str,
        description: &Path,
    ) -> Result<(i32, Release)> {
        let secret = self.folder.join("secret");
        let mut words = vec![
            "owner",
            "release",
            guest,
            "--description",
            text(description)?,
        ];
        words.extend([
            "--session",
            text(&session.keys)?,
            "--platform",
            text(&session.platform)?,
        ]);
        words.extend(["--secret", text(&secret)?]);
        session.trust(&mut words);
        let said = site.casemate(&words)?;
        let release = serde_json::from_str(&said.stdout).map_err(|_| E2eError::Command {
            command: words.join(" "),
            status: said.status,
            said: said.stderr.clone(),
        })?;
        Ok((said.status, release))
    }
}

impl Session {
    fn trust<'a>(&'a self, words: &mut Vec<&'a str>) {
        words.extend(self.root.iter().flat_map(|root| ["--allow-emulated", root]));
    }
}

/// The root of an emulated platform, which an owner must name; AMD's own is built in.
fn trusted_root(site: &Site) -> Result<Option<String>> {
    let platform: Platform = site.ask(&["platform", "show"])?;
    Ok(platform
        .emulated
        .then(|| format!("sha256:{}", platform.root_sha256)))
}

/// A path as a command's argument.
pub fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .ok_or_else(|| E2eError::Answer(format!("{} is not UTF-8", path.display())))
}
