//! Takes compiled kernels into the program where DIBIT_PTX names their folder: files `NAME.smNN.ptx`, which the example
//! `compile_kernels` writes.

use std::fmt::Write;
use std::path::PathBuf;

fn main() {
    println!("cargo::rerun-if-env-changed=DIBIT_PTX");
    let mut list = String::from("static EMBEDDED: &[(&str, u32, &[u8])] = &[\n");
    if let Some(folder) = std::env::var_os("DIBIT_PTX").map(PathBuf::from) {
        println!("cargo::rerun-if-changed={}", folder.display());
        let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("DIBIT_PTX: {error}"));
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
        paths.sort();
        for path in paths.iter().filter(|path| path.extension().is_some_and(|own| own == "ptx")) {
            let stem = path.file_stem().and_then(|stem| stem.to_str()).expect("a name");
            let (name, capability) = stem.rsplit_once(".sm").expect("NAME.smNN.ptx");
            let path = path.canonicalize().expect("a file");
            writeln!(list, "    ({name:?}, {capability}, include_bytes!({path:?})),").expect("memory");
        }
    }
    list.push_str("];\n");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    std::fs::write(out.join("embedded.rs"), list).expect("the build folder can be written");
}
