//! Kernels that were compiled when this program was built, for machines without NVRTC.

use crate::source::Source;

include!(concat!(env!("OUT_DIR"), "/embedded.rs"));

/// PTX of a file compiled with these macros for an architecture that the GPU can run, with a 0 behind it.
pub(crate) fn ptx(source: Source, macros: &[(&'static str, i64)], capability: u32) -> Option<Vec<u8>> {
    let name = name(source.file, macros);
    let fits = |own: &&(&str, u32, &[u8])| own.0 == name && own.1 <= capability;
    let (_, _, text) = EMBEDDED.iter().filter(fits).max_by_key(|own| own.1)?;
    Some([text, &[0][..]].concat())
}

/// A name for a file compiled with these macros.
pub(crate) fn name(file: &str, macros: &[(&'static str, i64)]) -> String {
    let macros: Vec<String> = macros.iter().map(|(name, value)| format!("-{}-{value}", name.to_lowercase())).collect();
    format!("{}{}", file.trim_end_matches(".cu"), macros.concat())
}
