//! Links the program stripped: it is the guest's init as well, and unpacking it is part of what is measured.
fn main() {
    println!("cargo:rustc-link-arg-bins=-s");
    println!("cargo:rerun-if-changed=build.rs");
}
