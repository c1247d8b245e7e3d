//! Writes initramfs archives in the kernel's "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst).

/// An archive under construction.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Add a directory; parents first.
    pub fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[]);
    }

    /// Add a regular file with these permission bits.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        self.entry(path, REGULAR | permissions, (0, 0), content);
    }

    /// Add a character device node.
    pub fn device(&mut self, path: &str, permissions: u32, number: (u32, u32)) {
        self.entry(path, CHARACTER | permissions, number, &[]);
    }

    /// Close the archive; its length is a multiple of 512.
    pub fn finish(mut self) -> Vec<u8> {
        self.entries = u32::MAX; // the trailer is entry 0
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries = self.entries.wrapping_add(1);
        let links = if mode & DIRECTORY != 0 { 2 } else { 1 };
        // Owner 0:0 and time 0 throughout: the same content always gives the same bytes, and so the same launch digest.
        let fields = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            content.len() as u32,
            0,
            0,
            device.0,
            device.1,
            path.len() as u32 + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_format() {
        let mut archive = Archive::default();
        archive.directory("dev");
        archive.file("init", 0o755, b"hello");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 512, 0);
        let text = String::from_utf8_lossy(&bytes);
        // magic, ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        assert!(text.starts_with("07070100000001000041ed00000000000000000000000200000000"));
        let file = text.find("07070100000002").unwrap();
        assert_eq!(file % 4, 0);
        assert_eq!(&text[file + 54..file + 62], "00000005");
        assert_eq!(&text[file + 110..file + 115], "init\0");
        assert_eq!(&text[file + 116..file + 121], "hello");
        assert!(text.contains("TRAILER!!!"));
    }
}
