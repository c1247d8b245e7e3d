//! `cargo bench-boot`: Casemate's boot beside QEMU's, both inside one lab.

use std::{fs, path::Path, time::Duration};

use crate::{
    backend::Backend,
    command::output,
    cpio::Archive,
    error::{Error, OnFile, Result},
    guest_image,
    paths::{Paths, read, write_whole},
    prepare::prepare,
    run::{Request, run},
    say,
    tasks::build,
    tools::Tools,
};

/// Get what is missing, build, and measure; returns the exit status.
pub fn bench(paths: &Paths, runs: u32, json: bool) -> Result<i32> {
    // QEMU comes from the lab's packages, also where the machine itself has hardware virtualisation.
    prepare(paths, false)?;
    let packages = [
        "casemate",
        "casemate-guest",
        "casemate-agent",
        "casemate-bench",
    ];
    let code = build(paths, &packages)?;
    if code != 0 {
        return Ok(code);
    }
    guest_image::make(paths)?;
    let program = paths.release.join("casemate-bench-boot");
    write_initrd(paths, &program)?;
    let initrd = paths.bench_initrd();
    say(&format!("booting {runs} times each"));
    beside_qemu(paths, &program, &initrd, runs, json)
}

/// Runs `program` with Casemate, QEMU, the guests' kernel and `initrd`, in the lab or here.
pub fn beside_qemu(
    paths: &Paths,
    program: &Path,
    initrd: &Path,
    runs: u32,
    json: bool,
) -> Result<i32> {
    let mut request = Request::new(paths, Vec::new())?;
    let backend = Backend::choose()?;
    let qemu = match backend {
        Backend::Lab => qemu_in_lab(paths, &mut request)?,
        Backend::Native | Backend::Off => qemu_here(paths),
    };
    let text = |path: &Path| path.display().to_string();
    request.args = vec![text(program), "--qemu".into(), qemu.join(",")];
    let files = [
        ("--casemate", paths.release.join("casemate")),
        ("--kernel", paths.guest_vmlinux()),
        ("--initrd", initrd.to_path_buf()),
    ];
    for (option, path) in files {
        request.args.extend([option.to_owned(), text(&path)]);
        request.payload.push(text(&path));
    }
    request.args.extend(["--runs".into(), runs.to_string()]);
    request.args.extend(json.then(|| "--json".to_owned()));
    // The lab is nobody's machine: it is set up as `casemate doctor` advises.
    let in_lab = backend == Backend::Lab;
    request
        .args
        .extend(in_lab.then(|| "--huge-pages".to_owned()));
    request.timeout = request.timeout.max(TIMEOUT);
    request.retries = RETRIES;
    run(paths, &request)
}

fn write_initrd(paths: &Paths, init: &Path) -> Result<()> {
    let mut archive = Archive::default();
    archive.directory("dev");
    archive.device("dev/console", 0o600, (5, 1));
    archive.file("init", 0o755, &read(init)?);
    write_whole(&paths.bench_initrd(), &archive.finish())
}

/// The lab has no libraries: QEMU takes its own along, and is started by their loader.
fn qemu_in_lab(paths: &Paths, request: &mut Request) -> Result<Vec<String>> {
    let tools = Tools::at(&paths.tools());
    let program = paths.tools().join("usr/bin/qemu-system-x86_64");
    let program = fs::canonicalize(&program).on("find", &program)?;
    let listed = output(tools.command("ldd").arg(&program))?;
    let mut loader = None;
    for library in libraries(&listed) {
        let name = Path::new(library)
            .file_name()
            .and_then(|name| name.to_str());
        let name = name.ok_or_else(|| Error::Packages(format!("ldd says {library}")))?;
        let at = format!("{PLACE}/lib/{name}");
        if name.starts_with("ld-linux") {
            loader = Some(at.clone());
        }
        request.payload.push(format!("{library}={at}"));
    }
    let loader = loader.ok_or_else(|| Error::Packages("QEMU has no loader".into()))?;
    let at = format!("{PLACE}/qemu");
    request.payload.push(format!("{}={at}", program.display()));
    for (folder, file) in FIRMWARE {
        let source = paths.tools().join(folder).join(file);
        request
            .payload
            .push(format!("{}={PLACE}/share/{file}", source.display()));
    }
    let command = [
        &loader,
        "--library-path",
        &format!("{PLACE}/lib"),
        &at,
        "-L",
        &format!("{PLACE}/share"),
    ];
    Ok(command.map(str::to_owned).to_vec())
}

fn qemu_here(paths: &Paths) -> Vec<String> {
    let command = Tools::at(&paths.tools()).qemu();
    let arguments = command.get_args().map(|text| text.display().to_string());
    std::iter::once(command.get_program().display().to_string())
        .chain(arguments)
        .collect()
}

/// The files in what `ldd` says: `name => /path (0x…)`, or `/path (0x…)`.
fn libraries(listed: &str) -> Vec<&str> {
    listed
        .lines()
        .filter_map(|line| {
            let file = line.split_once("=>").map_or(line, |(_, file)| file);
            file.split_whitespace().next()
        })
        .filter(|file| file.starts_with('/'))
        .collect()
}

/// Where QEMU lies in the lab.
const PLACE: &str = "/bench";
/// What q35 and microvm load.
const FIRMWARE: [(&str, &str); 6] = [
    ("usr/share/seabios", "bios-256k.bin"),
    ("usr/share/seabios", "bios-microvm.bin"),
    ("usr/share/qemu", "linuxboot_dma.bin"),
    ("usr/share/qemu", "pvh.bin"),
    ("usr/share/qemu", "kvmvapic.bin"),
    ("usr/share/qemu", "qboot.rom"),
];
const TIMEOUT: Duration = Duration::from_secs(600);
const RETRIES: u32 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_in_what_ldd_says() {
        let listed = "\tlinux-vdso.so.1 (0x7ff)\n\tlibz.so.1 => /lib/libz.so.1 (0x7f)\n\t/lib64/ld-linux-x86-64.so.2 (0x7f)\n";
        assert_eq!(
            libraries(listed),
            ["/lib/libz.so.1", "/lib64/ld-linux-x86-64.so.2"]
        );
    }
}
