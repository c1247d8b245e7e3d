//! A small guest of the 32-bit entry point, packed as a bzImage.

/// A bzImage with the guest at the 32-bit entry point, and one that breaks at the 64-bit one.
pub fn kernel() -> Vec<u8> {
    packed(KERNEL)
}

/// The same without its `wrmsr`.
#[allow(dead_code, reason = "each test binary uses its own part")]
pub fn kernel_that_does_not_tell() -> Vec<u8> {
    let mut code = KERNEL.to_vec();
    let at = code
        .windows(2)
        .position(|pair| pair == [0x0f, 0x30])
        .unwrap();
    code[at..at + 2].fill(0x90);
    packed(&code)
}

fn packed(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0u8; 1024];
    let mut set = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    set(0x1f1, &[1]); // setup_sects
    set(0x1fe, &[0x55, 0xaa]); // boot_flag
    set(0x201, &[0x6a]); // jump: the header ends at 0x26c
    set(0x202, b"HdrS");
    set(0x206, &0x020fu16.to_le_bytes()); // version
    set(0x211, &[1]); // loadflags: LOADED_HIGH
    set(0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    set(0x230, &0x20_0000u32.to_le_bytes()); // kernel_alignment
    set(0x234, &[1]); // relocatable_kernel
    set(0x236, &1u16.to_le_bytes()); // xloadflags: XLF_KERNEL_64
    set(0x238, &2047u32.to_le_bytes()); // cmdline_size
    set(0x258, &0x100_0000u64.to_le_bytes()); // pref_address
    set(0x260, &0x10_0000u32.to_le_bytes()); // init_size
    image.extend_from_slice(code);
    image.resize(1024 + 0x200, 0);
    image.extend_from_slice(&[0x0f, 0x0b]); // ud2
    image
}

/// ```text
///         mov edx, 0x3f8 ; mov esi, 0xfff004 ; mov ecx, [esi-4] ; test ecx, ecx ; jz cpuid
/// secret: mov al, [esi] ; out dx, al ; inc esi ; dec ecx ; jnz secret
/// cpuid:  mov al, 10 ; out dx, al ; mov eax, 0x8000001f ; xor ecx, ecx ; cpuid ; and ebx, 63
///         mov ecx, 0x4b564d08 ; mov eax, 1 ; xor edx, edx ; wrmsr ; xor eax, eax ; rdmsr
///         mov edx, 0x3f8 ; add al, '0' ; out dx, al ; mov al, bl ; out dx, al ; mov al, 10 ; out dx, al
///         xor ebx, ebx
/// outer:  inc ebx ; movzx eax, bl ; shl eax, 12 ; add eax, 0x2000000 ; mov [eax], ebx
///         test bl, bl ; jnz outer
///         mov ecx, 28
/// digit:  mov eax, ebx ; shr eax, cl ; and eax, 15 ; add al, 'a' ; out dx, al ; sub ecx, 4 ; jns digit
///         mov al, 10 ; out dx, al ; jmp outer
/// ```
const KERNEL: &[u8] = &[
    0xba, 0xf8, 0x03, 0x00, 0x00, 0xbe, 0x04, 0xf0, 0xff, 0x00, 0x8b, 0x4e, 0xfc, 0x85, 0xc9, 0x74,
    0x07, 0x8a, 0x06, 0xee, 0x46, 0x49, 0x75, 0xf9, 0xb0, 0x0a, 0xee, 0xb8, 0x1f, 0x00, 0x00, 0x80,
    0x31, 0xc9, 0x0f, 0xa2, 0x83, 0xe3, 0x3f, 0xb9, 0x08, 0x4d, 0x56, 0x4b, 0xb8, 0x01, 0x00, 0x00,
    0x00, 0x31, 0xd2, 0x0f, 0x30, 0x31, 0xc0, 0x0f, 0x32, 0xba, 0xf8, 0x03, 0x00, 0x00, 0x04, 0x30,
    0xee, 0x88, 0xd8, 0xee, 0xb0, 0x0a, 0xee, 0x31, 0xdb, 0x43, 0x0f, 0xb6, 0xc3, 0xc1, 0xe0, 0x0c,
    0x05, 0x00, 0x00, 0x00, 0x02, 0x89, 0x18, 0x84, 0xdb, 0x75, 0xee, 0xb9, 0x1c, 0x00, 0x00, 0x00,
    0x89, 0xd8, 0xd3, 0xe8, 0x83, 0xe0, 0x0f, 0x04, 0x61, 0xee, 0x83, 0xe9, 0x04, 0x79, 0xf1, 0xb0,
    0x0a, 0xee, 0xeb, 0xd5,
];

const _: () = assert!(KERNEL.len() < 512, "the 64-bit entry point is behind it");
