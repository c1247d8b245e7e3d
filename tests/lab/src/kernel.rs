//! What the lab takes out of a Debian kernel package: the uncompressed kernel, and modules in load order.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Stdio,
};

use crate::{
    command::start_error,
    error::{Error, OnFile, Result},
    paths::read,
    tools::Tools,
};

/// An unpacked kernel package.
pub struct KernelPackage {
    /// The kernel's release, as `uname -r` would print it.
    pub release: String,
    /// The bzImage.
    pub image: PathBuf,
    modules: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

/// A module, uncompressed.
pub struct Module {
    /// Its name with underscores.
    pub name: String,
    /// The ELF file.
    pub content: Vec<u8>,
}

impl KernelPackage {
    /// Find image and modules below the directory a package was unpacked to.
    pub fn open(root: &Path) -> Result<Self> {
        let all = root.join("lib/modules");
        let mut releases = fs::read_dir(&all)
            .on("list", &all)?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let release = releases
            .next()
            .ok_or_else(|| damaged(&all, "no kernel release in it"))?;
        let dir = all.join(&release);
        let mut modules = BTreeMap::new();
        collect_modules(&dir.join("kernel"), &mut modules)?;
        let builtin = read(&dir.join("modules.builtin"))?;
        let builtin = String::from_utf8_lossy(&builtin)
            .lines()
            .filter_map(|line| module_name(Path::new(line)))
            .collect();
        Ok(Self {
            image: root.join("boot").join(format!("vmlinuz-{release}")),
            release,
            modules,
            builtin,
        })
    }

    /// The modules `wanted` and all they depend on, each after its dependencies; what is built in is left out.
    pub fn modules(&self, wanted: &[&str], tools: &Tools) -> Result<Vec<Module>> {
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for name in wanted {
            self.visit(name, &mut seen, &mut order, tools)?;
        }
        Ok(order)
    }

    /// The uncompressed kernel inside the bzImage (Documentation/arch/x86/boot.rst, `payload_offset`).
    pub fn vmlinux(&self, tools: &Tools) -> Result<Vec<u8>> {
        let image = read(&self.image)?;
        let payload = bzimage_payload(&image)
            .ok_or_else(|| damaged(&self.image, "not a bzImage with a payload"))?;
        // The build appends the uncompressed size to the compressed stream.
        let stream = payload
            .get(..payload.len().saturating_sub(4))
            .unwrap_or_default();
        let vmlinux = match payload {
            [0x28, 0xb5, 0x2f, 0xfd, ..] => decompress("zstd", stream, tools)?,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => decompress("xz", stream, tools)?,
            [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => {
                lz4_blocks(blocks).ok_or_else(|| damaged(&self.image, "payload is damaged LZ4"))?
            }
            _ => return Err(damaged(&self.image, "payload is neither zstd, xz nor LZ4")),
        };
        if !vmlinux.starts_with(b"\x7fELF") {
            return Err(damaged(&self.image, "payload is not an ELF kernel"));
        }
        Ok(vmlinux)
    }

    fn visit(
        &self,
        name: &str,
        seen: &mut BTreeSet<String>,
        order: &mut Vec<Module>,
        tools: &Tools,
    ) -> Result<()> {
        let name = name.replace('-', "_");
        if self.builtin.contains(&name) || !seen.insert(name.clone()) {
            return Ok(());
        }
        let path = self
            .modules
            .get(&name)
            .ok_or_else(|| damaged(&self.image, &format!("kernel has no module {name}")))?;
        let content = read(path)?;
        let content = match path.extension().and_then(OsStr::to_str) {
            Some("xz") => decompress("xz", &content, tools)?,
            Some("zst") => decompress("zstd", &content, tools)?,
            _ => content,
        };
        for needed in dependencies(&content) {
            self.visit(&needed, seen, order, tools)?;
        }
        order.push(Module { name, content });
        Ok(())
    }
}

fn collect_modules(dir: &Path, into: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).on("list", dir)? {
        let path = entry.on("list", dir)?.path();
        if path.is_dir() {
            collect_modules(&path, into)?;
        } else if let Some(name) = module_name(&path) {
            into.insert(name, path);
        }
    }
    Ok(())
}

/// `…/kvm-amd.ko.xz` → `kvm_amd`.
fn module_name(path: &Path) -> Option<String> {
    let (stem, _) = path.file_name()?.to_str()?.split_once(".ko")?;
    Some(stem.replace('-', "_"))
}

/// The `depends=` entry of a module's `.modinfo` (NUL-separated text).
fn dependencies(module: &[u8]) -> Vec<String> {
    let entry = module
        .split(|byte| *byte == 0)
        .find_map(|text| text.strip_prefix(b"depends="));
    let entry = String::from_utf8_lossy(entry.unwrap_or_default());
    entry
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

fn bzimage_payload(image: &[u8]) -> Option<&[u8]> {
    let field =
        |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize);
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup_sectors = usize::from(*image.get(0x1f1)?).max(1);
    let start = (setup_sectors + 1) * 512 + field(0x248)?;
    image.get(start..start.checked_add(field(0x24c)?)?)
}

/// The blocks of LZ4's legacy frame: a length, and so many bytes that become at most 8 MiB. Behind the last one stands
/// the size of the whole, which the build appends.
fn lz4_blocks(mut blocks: &[u8]) -> Option<Vec<u8>> {
    let mut all = Vec::new();
    while let Some((length, rest)) = blocks.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        if rest.is_empty() {
            return (length == all.len()).then_some(all);
        }
        let (block, rest) = rest.split_at_checked(length)?;
        all.extend(lz4_flex::block::decompress(block, LZ4_BLOCK).ok()?);
        blocks = rest;
    }
    None
}

/// Most that a block becomes.
const LZ4_BLOCK: usize = 8 << 20;

fn decompress(program: &str, data: &[u8], tools: &Tools) -> Result<Vec<u8>> {
    let mut command = tools.command(program);
    command
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = command
        .spawn()
        .map_err(|source| start_error(&command, source))?;
    let mut input = child.stdin.take();
    let result = std::thread::scope(|scope| {
        // A decompressor that stops early closes its input; its exit status tells.
        scope.spawn(move || input.as_mut().map(|pipe| pipe.write_all(data)));
        child.wait_with_output()
    });
    let output = result.map_err(|source| start_error(&command, source))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(Error::Command {
        command: format!("{program} -dc"),
        status: output.status.to_string(),
        output: String::new(),
    })
}

fn damaged(path: &Path, why: &str) -> Error {
    Error::Kernel {
        path: path.display().to_string(),
        why: why.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_names_and_dependencies() {
        assert_eq!(
            module_name(Path::new("kernel/arch/x86/kvm/kvm-amd.ko.xz")).as_deref(),
            Some("kvm_amd")
        );
        assert_eq!(module_name(Path::new("modules.order")), None);
        assert_eq!(
            dependencies(b"\x7fELF\0license=GPL\0depends=kvm,irqbypass\0name=x\0"),
            ["kvm", "irqbypass"]
        );
        assert!(dependencies(b"\0depends=\0").is_empty());
    }

    #[test]
    fn lz4_blocks_follow_one_another_up_to_the_size_of_all() {
        let parts = [vec![7u8; 10_000], b"the end".to_vec()];
        let mut frame = Vec::new();
        for part in &parts {
            let block = lz4_flex::block::compress(part);
            frame.extend_from_slice(&(block.len() as u32).to_le_bytes());
            frame.extend(block);
        }
        let whole = parts.concat();
        frame.extend_from_slice(&(whole.len() as u32).to_le_bytes());
        assert_eq!(lz4_blocks(&frame), Some(whole));
        for damaged in [&frame[..frame.len() - 1], &frame[..20], &[], &frame[4..]] {
            assert_eq!(lz4_blocks(damaged), None);
        }
    }

    #[test]
    fn a_payload_outside_the_image_is_refused() {
        let mut image = vec![0; 4096];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x1f1] = 1;
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&8u32.to_le_bytes());
        assert_eq!(bzimage_payload(&image).map(<[u8]>::len), Some(8));
        image[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(bzimage_payload(&image), None);
        assert_eq!(bzimage_payload(b"MZ"), None);
    }
}
