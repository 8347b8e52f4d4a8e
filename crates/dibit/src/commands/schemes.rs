//! Which schemes a command runs, with their calibrations.

use super::schemes;
use crate::args::CacheArgs;
use crate::bundled;
use anyhow::{Context, Result, bail};
use dibit_cache::Scheme;
use dibit_calibrate::{Artefact, CalibrationError};
use dibit_model::Pretrained;
use std::path::{Path, PathBuf};

/// The scheme that is used where the user names none: it costs least accuracy at its bits, and needs a calibration.
const BEST: &str = "dibit";

/// The one in its place where there is no calibration.
const WITHOUT_CALIBRATION: &str = "kvlinc";

/// Where a model's directory holds calibrations.
const DIRECTORY: &str = "calibration";

/// Refuses a name that means nothing, before a model is loaded.
pub fn check(args: &CacheArgs) -> Result<()> {
    args.kv.as_deref().map(Scheme::load).transpose()?;
    Ok(())
}

/// The scheme of a cache, by its name or by default.
pub fn chosen(args: &CacheArgs, pretrained: &Pretrained) -> Result<Scheme> {
    if let Some(name) = &args.kv {
        let mut scheme = Scheme::load(name)?;
        attach(&mut scheme, &args.calibration, pretrained)?;
        return Ok(scheme);
    }
    let mut best = Scheme::load(BEST)?;
    let mut other = Scheme::load(WITHOUT_CALIBRATION)?;
    if !args.calibration.is_empty() {
        // Of the two, the one that a file was made for.
        let Err(refused) = attach_named(&mut best, &args.calibration, pretrained) else { return Ok(best) };
        attach_named(&mut other, &args.calibration, pretrained).map_err(|_| refused)?;
        return Ok(other);
    }
    attach_shipped(&mut best, pretrained)?;
    if best.calibration.is_some() {
        return Ok(best);
    }
    attach_shipped(&mut other, pretrained)?;
    tracing::info!(
        "--kv {WITHOUT_CALIBRATION}: this model has no calibration of scheme {BEST}, which is the better one; \
         `dibit calibrate --kv {BEST}` makes it"
    );
    Ok(other)
}

/// Loads schemes and gives each its calibration among `files`, where it takes one.
pub fn calibrated_schemes(names: &[String], files: &[PathBuf], pretrained: &Pretrained) -> Result<Vec<Scheme>> {
    let mut schemes = schemes(names)?;
    if !files.is_empty() && !schemes.iter().any(Scheme::takes_calibration) {
        bail!("none of the schemes {} needs a calibration; leave --calibration out", names.join(", "));
    }
    let mut used = vec![false; files.len()];
    let mut without = Vec::new();
    for scheme in schemes.iter_mut().filter(|scheme| scheme.takes_calibration()) {
        match attach_one(scheme, files, pretrained) {
            Ok(file) => used.iter_mut().enumerate().for_each(|(index, used)| *used |= file == Some(index)),
            Err(error) if scheme.is_calibrated() && scheme.calibration.is_none() => return Err(error),
            Err(error) => without.push(error),
        }
    }
    // A scheme that can do without a calibration does so where every file is another scheme's.
    match without.into_iter().next() {
        Some(error) if used.contains(&false) => Err(error),
        _ => Ok(schemes),
    }
}

/// Gives a scheme the calibration among `files` that was made for it; the one that comes with the model, if there is one,
/// where there are no files.
fn attach(scheme: &mut Scheme, files: &[PathBuf], pretrained: &Pretrained) -> Result<()> {
    if !scheme.takes_calibration() && !files.is_empty() {
        return Err(CalibrationError::NotNeeded(scheme.origin.clone()).into());
    }
    match files {
        [] => attach_shipped(scheme, pretrained),
        files => attach_named(scheme, files, pretrained).map(drop),
    }
}

/// The same for one of several schemes: files may be others', so that the calibration that comes with the model is taken
/// where none of them suits. That is told as an error even so. Returns which file it was.
pub fn attach_one(scheme: &mut Scheme, files: &[PathBuf], pretrained: &Pretrained) -> Result<Option<usize>> {
    if !files.is_empty() {
        match attach_named(scheme, files, pretrained) {
            Ok(file) => return Ok(Some(file)),
            Err(refused) => attach_shipped(scheme, pretrained).and(Err(refused))?,
        }
    }
    attach_shipped(scheme, pretrained)?;
    Ok(None)
}

/// Gives a scheme the calibration among `files` that was made for it; returns which it was.
fn attach_named(scheme: &mut Scheme, files: &[PathBuf], pretrained: &Pretrained) -> Result<usize> {
    let mut reasons = Vec::new();
    for (index, file) in files.iter().enumerate() {
        match Artefact::attach(file, pretrained, scheme) {
            Ok(()) => return Ok(index),
            Err(error) => reasons.push(anyhow::Error::from(error)),
        }
    }
    if reasons.len() == 1 {
        return Err(reasons.remove(0));
    }
    let reasons: Vec<String> = reasons.iter().map(|reason| format!("\n  {reason:#}")).collect();
    bail!("no calibration suits scheme {}:{}", scheme.name, reasons.concat())
}

/// Gives a scheme the calibration that comes with the model, where one was made for it.
fn attach_shipped(scheme: &mut Scheme, pretrained: &Pretrained) -> Result<()> {
    for artefact in shipped(&pretrained.name)? {
        let (name, artefact) = artefact;
        match artefact.give(&name, pretrained, scheme) {
            Ok(()) => return Ok(()),
            // Another scheme's.
            Err(CalibrationError::Mismatch { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Calibrations that come with a model: those of the bundled one are part of the program, others lie in its directory.
fn shipped(model: &str) -> Result<Vec<(PathBuf, Artefact)>> {
    if model == bundled::NAME {
        let parsed = bundled::CALIBRATIONS.iter().map(|(name, bytes)| {
            let name = PathBuf::from(name);
            Ok((name.clone(), Artefact::parse(bytes, &name)?))
        });
        return parsed.collect();
    }
    let directory = Path::new(model).join(DIRECTORY);
    if !directory.is_dir() {
        return Ok(Vec::new());
    }
    let problem = || format!("cannot read the calibrations in {}", directory.display());
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(&directory).with_context(problem)? {
        paths.push(entry.with_context(problem)?.path());
    }
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    paths.sort();
    paths.into_iter().map(|path| Ok((path.clone(), Artefact::load(&path)?))).collect()
}
