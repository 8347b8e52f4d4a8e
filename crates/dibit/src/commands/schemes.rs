//! Which schemes a command runs, with their calibrations.

use super::by_itself::{self, Made};
use super::schemes;
use crate::args::{BEST, CacheArgs, Calibrate, UNCALIBRATED};
use crate::{bundled, calibration_folder};
use anyhow::{Context, Error, Result, anyhow, bail};
use dibit_cache::{CalibratedScheme, Scheme};
use dibit_calibrate::{Artefact, CalibrationError, Fingerprint};
use dibit_device::Train;
use dibit_model::Pretrained;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Where a model's directory holds calibrations.
const DIRECTORY: &str = "calibration";

/// A scheme that a command runs.
pub struct Chosen {
    pub scheme: CalibratedScheme,
    /// Its calibration, where it has one.
    pub calibration: Option<Found>,
}

/// A calibration that a scheme got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The file, or what stands for one.
    place: String,
    /// The name of the model's key.
    key: String,
}

impl Found {
    pub fn new(place: impl Into<String>, artefact: &Artefact) -> Self {
        Found { place: place.into(), key: artefact.fingerprint.model.name() }
    }

    pub fn to_json(&self) -> Value {
        json!({"file": self.place, "key": self.key})
    }
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} (key {})", self.place, self.key)
    }
}

/// Refuses a name that means nothing, before a model is loaded.
pub fn check(args: &CacheArgs) -> Result<()> {
    args.kv.as_deref().map(Scheme::load).transpose()?;
    Ok(())
}

/// The scheme of a cache, by its name or by default. Where it has no calibration, one is made if `--calibrate` allows it.
/// `made_up` weights get none.
pub fn chosen<D: Train>(
    device: &Arc<D>,
    args: &CacheArgs,
    pretrained: &Pretrained,
    made_up: bool,
    interrupted: &AtomicBool,
) -> Result<Chosen> {
    if !args.calibration.is_empty() {
        return named(args, pretrained);
    }
    let mut scheme = CalibratedScheme::load(args.kv.as_deref().unwrap_or(BEST))?;
    let found = find(&mut scheme, pretrained)?;
    if found.is_some() || !scheme.takes_calibration() {
        return Ok(Chosen { scheme, calibration: found });
    }
    let wanted = match args.calibrate {
        // A scheme that was asked for is run, or refused.
        Calibrate::Auto if args.kv.is_some() || made_up => Calibrate::Never,
        wanted => wanted,
    };
    let reason = match by_itself::make(device, pretrained, &mut scheme, wanted, interrupted)? {
        Made::Done(found) => return Ok(Chosen { scheme, calibration: Some(found) }),
        Made::Not(reason) => reason,
    };
    match args.kv {
        Some(_) if scheme.is_calibrated() => Err(missing(&scheme, pretrained)),
        Some(_) => Ok(Chosen { scheme, calibration: None }),
        None => {
            tracing::info!(
                "no calibration of scheme {BEST} for this model{reason}: running with {UNCALIBRATED}, which costs more \
                 accuracy; `{}` makes one",
                command(&scheme, pretrained)
            );
            let mut scheme = CalibratedScheme::load(UNCALIBRATED)?;
            let calibration = find(&mut scheme, pretrained)?;
            Ok(Chosen { scheme, calibration })
        }
    }
}

/// The scheme of a cache with the calibration that the user names. Where only the calibration is named, the scheme is the
/// one that it was made for.
fn named(args: &CacheArgs, pretrained: &Pretrained) -> Result<Chosen> {
    let name = args.kv.as_deref().unwrap_or(BEST);
    let mut scheme = CalibratedScheme::load(name)?;
    if !scheme.takes_calibration() {
        return Err(CalibrationError::NotNeeded(scheme.scheme.origin).into());
    }
    let refused = match attach_named(&mut scheme, &args.calibration, pretrained) {
        Ok((_, found)) => return Ok(Chosen { scheme, calibration: Some(found) }),
        Err(refused) => refused,
    };
    for name in Scheme::built_in().filter(|_| args.kv.is_none()) {
        let mut scheme = CalibratedScheme::load(name)?;
        if !scheme.takes_calibration() {
            continue;
        }
        if let Ok((_, found)) = attach_named(&mut scheme, &args.calibration, pretrained) {
            return Ok(Chosen { scheme, calibration: Some(found) });
        }
    }
    Err(refused)
}

/// The command that makes the calibration of a scheme and a model.
pub fn command(scheme: &Scheme, pretrained: &Pretrained) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-+:@%,=".contains(c);
    let quoted = |text: &str| match text.chars().all(plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', "'\\''")),
    };
    let model = match pretrained.name.as_str() {
        bundled::NAME => String::new(),
        model => format!(" --model {}", quoted(model)),
    };
    format!("dibit calibrate --kv {}{model}", quoted(&scheme.origin))
}

/// The error for a scheme that cannot do without a calibration.
fn missing(scheme: &Scheme, pretrained: &Pretrained) -> Error {
    let (name, command) = (&scheme.origin, command(scheme, pretrained));
    anyhow!(
        "scheme {name} needs a calibration of this model; make one with `{command}`, or name its file with --calibration"
    )
}

/// Loads schemes and gives each its calibration among `files`, where it takes one.
pub fn calibrated_schemes(
    names: &[String],
    files: &[PathBuf],
    pretrained: &Pretrained,
) -> Result<Vec<CalibratedScheme>> {
    let mut schemes: Vec<CalibratedScheme> = schemes(names)?.into_iter().map(CalibratedScheme::from).collect();
    if !files.is_empty() && !schemes.iter().any(|scheme| scheme.takes_calibration()) {
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

/// Gives one of several schemes the calibration among `files` that was made for it. Files may be others', so that the
/// calibration that is found without them is taken where none of them suits. That is told as an error even so, and so is
/// a scheme that gets none and needs one. Returns which file it was.
pub fn attach_one(scheme: &mut CalibratedScheme, files: &[PathBuf], pretrained: &Pretrained) -> Result<Option<usize>> {
    let mut refused = None;
    if !files.is_empty() {
        match attach_named(scheme, files, pretrained) {
            Ok((file, _)) => return Ok(Some(file)),
            Err(error) => refused = Some(error),
        }
    }
    let found = find(scheme, pretrained)?;
    if let Some(found) = &found {
        tracing::info!("{}: calibration {found}", scheme.name);
    }
    match refused {
        Some(refused) => Err(refused),
        None if found.is_none() && scheme.is_calibrated() => Err(missing(scheme, pretrained)),
        None => Ok(None),
    }
}

/// Gives a scheme the calibration among `files` that was made for it; returns which it was.
fn attach_named(scheme: &mut CalibratedScheme, files: &[PathBuf], pretrained: &Pretrained) -> Result<(usize, Found)> {
    let mut reasons = Vec::new();
    for (index, file) in files.iter().enumerate() {
        let artefact = Artefact::load(file);
        let found = artefact.as_ref().ok().map(|artefact| Found::new(file.display().to_string(), artefact));
        match (artefact.and_then(|artefact| artefact.give(file, pretrained, scheme)), found) {
            (Ok(()), Some(found)) => return Ok((index, found)),
            (Ok(()), None) => {}
            (Err(error), _) => reasons.push(with_command(error, scheme, pretrained)),
        }
    }
    if reasons.len() == 1 {
        return Err(reasons.remove(0));
    }
    let reasons: Vec<String> = reasons.iter().map(|reason| format!("\n  {reason:#}")).collect();
    bail!("no calibration suits scheme {}:{}", scheme.name, reasons.concat())
}

/// The error of a calibration, with the very command that makes another one where it is outdated.
fn with_command(error: CalibrationError, scheme: &Scheme, pretrained: &Pretrained) -> Error {
    let CalibrationError::Version { path, found, .. } = &error else { return error.into() };
    let (path, command) = (path.display(), command(scheme, pretrained));
    anyhow!("{path} is of version {found} of calibrations, which is not read any more; `{command}` makes a new one")
}

/// Gives a scheme that takes one the calibration that is found by itself: one that comes with the model, else one in the
/// user's folder.
pub fn find(scheme: &mut CalibratedScheme, pretrained: &Pretrained) -> Result<Option<Found>> {
    if !scheme.takes_calibration() {
        return Ok(None);
    }
    let made_for = Fingerprint::new(pretrained, scheme).scheme();
    for (path, artefact) in shipped(&pretrained.name)? {
        let artefact = match artefact {
            Err(error @ CalibrationError::Version { .. }) => {
                // Older versions say other things of a scheme, so that a file's name counts too.
                let named = path.file_stem().is_some_and(|stem| *stem == *scheme.name);
                if named || matches!(&error, CalibrationError::Version { scheme, .. } if *scheme == made_for) {
                    tracing::warn!("{:#}", with_command(error, scheme, pretrained));
                }
                continue;
            }
            other => other?,
        };
        let place = if pretrained.name == bundled::NAME { "bundled".into() } else { path.display().to_string() };
        let found = Found::new(place, &artefact);
        match artefact.give(&path, pretrained, scheme) {
            Ok(()) => return Ok(Some(found)),
            Err(error @ CalibrationError::Mismatch { what: "model", .. }) => {
                tracing::warn!("{error:#}; it is ignored");
            }
            // Another scheme's.
            Err(CalibrationError::Mismatch { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    for (path, artefact) in calibration_folder::candidates(scheme, pretrained) {
        let found = Found::new(path.display().to_string(), &artefact);
        match artefact.give(&path, pretrained, scheme) {
            Ok(()) => return Ok(Some(found)),
            // Another model's of the same shape.
            Err(CalibrationError::Mismatch { .. }) => {}
            Err(error) => tracing::warn!("{:#}; it is ignored", Error::from(error)),
        }
    }
    Ok(None)
}

/// A file, and what was read of it.
type Read = (PathBuf, Result<Artefact, CalibrationError>);

/// Calibrations that come with a model: those of the bundled one are part of the program, others lie in its directory.
fn shipped(model: &str) -> Result<Vec<Read>> {
    if model == bundled::NAME {
        let parse = |(name, bytes): &(&str, &[u8])| {
            let name = PathBuf::from(name);
            (name.clone(), Artefact::parse(bytes, &name))
        };
        return Ok(bundled::CALIBRATIONS.iter().map(parse).collect());
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
    Ok(paths.into_iter().map(|path| (path.clone(), Artefact::load(&path))).collect())
}
