//! Page batches: any bytes are entries within their bounds or a refusal; no entry claims bytes that are not its own; and
//! what was split joins to what it was.
#![no_main]

use casemate_crypto_migrate::wire::batch::{Entries, MAX_ENTRIES, join, split};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut copy = bytes.to_vec();
    let mut walked = 0;
    if let Ok(mut entries) = Entries::parse(&mut copy) {
        let headers = entries.remaining_headers();
        while let Ok(Some(entry)) = entries.next_entry() {
            assert_eq!(entry.header.encode(), entry.header_bytes);
            assert_eq!(entry.sealed.len(), entry.header.body_length() + 16);
            assert!(entry.header.count >= 1 && entry.header.count <= entry.header.kind.max_count());
            assert_eq!(headers.get(walked), Some(&entry.header));
            walked += 1;
        }
    }
    assert!(walked <= MAX_ENTRIES);
    if let Ok(parts) = split(bytes) {
        assert_eq!(parts.len(), walked);
        assert_eq!(join(&parts), bytes);
    }
});
