//! Links the agent stripped: it travels in guests' initial memory, where every byte is measured.
fn main() {
    println!("cargo:rustc-link-arg-bins=-s");
    println!("cargo:rerun-if-changed=build.rs");
}
