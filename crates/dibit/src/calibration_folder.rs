//! The user's folder of calibrations, in which those of every model are found again.

use anyhow::{Context, Result};
use dibit_cache::Scheme;
use dibit_calibrate::{Artefact, CalibrationError, Fingerprint};
use dibit_model::Pretrained;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The variable that names the folder.
pub const VARIABLE: &str = "DIBIT_CACHE_DIR";

/// The folder; `None` where the system knows no folder for caches.
pub fn folder() -> Option<PathBuf> {
    match std::env::var_os(VARIABLE).filter(|folder| !folder.is_empty()) {
        Some(folder) => Some(folder.into()),
        None => Some(dirs::cache_dir()?.join("dibit").join("calibrations")),
    }
}

/// Where the calibration of a scheme and a model lies, or is to lie.
pub fn place(scheme: &Scheme, pretrained: &Pretrained) -> Result<PathBuf> {
    let folder = folder().with_context(|| format!("there is no folder for caches; name one with {VARIABLE}"))?;
    let [_, name] = Fingerprint::new(pretrained, scheme).file_name(&scheme.name);
    Ok(folder.join(name))
}

/// Makes the folder that a file is to lie in.
pub fn make_folder(file: &Path) -> Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))
}

/// Calibrations in the folder that may be this scheme's and this model's, the one in the model's own format first. A
/// damaged one is left out, which is said.
pub fn candidates(scheme: &Scheme, pretrained: &Pretrained) -> Vec<(PathBuf, Artefact)> {
    let Some(folder) = folder() else { return Vec::new() };
    let [start, own] = Fingerprint::new(pretrained, scheme).file_name(&scheme.name);
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) => {
            // Where there is no folder there are none; who wants to write there is told.
            if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) {
                tracing::warn!("cannot read the calibrations in {}: {error}; they are ignored", folder.display());
            }
            return Vec::new();
        }
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> =
        names.filter(|name| name.starts_with(&start) && name.ends_with(".safetensors")).collect();
    names.sort_by_key(|name| (*name != own, name.clone()));
    let read = |name: String| {
        let path = folder.join(name);
        match Artefact::load(&path) {
            Ok(artefact) => Some((path, artefact)),
            // Another process took it away just now.
            Err(CalibrationError::Read { source, .. }) if source.kind() == ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!("{:#}; it is ignored", anyhow::Error::from(error));
                None
            }
        }
    };
    names.into_iter().filter_map(read).collect()
}
