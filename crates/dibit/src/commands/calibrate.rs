use super::{cpu, go_on, interrupt_flag, schemes};
use crate::args::CalibrateArgs;
use crate::output::{STDOUT, bar, check_writable, note};
use crate::{Outcome, source, text};
use anyhow::{Context, Result, bail};
use dibit_cache::{CacheLayout, Scheme};
use dibit_calibrate::{Artefact, CalibrationError, Options, Progress, calibrate};
use dibit_model::Pretrained;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Tokens of a sequence, where the user does not say and the model is made for so many.
const CONTEXT: usize = 2048;

pub fn run(args: &CalibrateArgs) -> Result<Outcome> {
    let scheme = Scheme::load(&args.kv)?;
    if !scheme.is_calibrated() {
        return Err(CalibrationError::NotNeeded(args.kv.clone()).into());
    }
    let text = text::read_documents(&args.text)?;
    check_place(args)?;
    let pretrained = source::load(&args.run.model)?;
    CacheLayout::new(&scheme, pretrained.config.cache_shape())?;
    let ids = pretrained.tokenizer.encode(&text, false)?;
    let cpu = cpu(args.run.threads, &args.run.isa)?;
    let state = state_path(&args.out);
    let options = Options {
        context: args.context.unwrap_or(CONTEXT.min(pretrained.config.max_position_embeddings)),
        tokens: Some(args.tokens),
        seed: args.seed,
        state: Some(state.clone()),
    };
    let interrupted = interrupt_flag(true)?;
    let bar = bar(0);
    let mut begun = false;
    let artefact = calibrate(&cpu, &pretrained, &scheme, &ids, &options, |progress| {
        if !std::mem::replace(&mut begun, true) {
            announce(progress, options.context, &state);
        }
        bar.set_length(progress.sequences as u64);
        bar.set_position(progress.done as u64);
        bar.set_message(format!("sequences of {} tokens", options.context));
        go_on(&interrupted)
    })?;
    bar.finish_and_clear();
    let Some(artefact) = artefact else {
        note(&format!("stopped; the same command goes on from {}", state.display()));
        return Ok(Outcome::Interrupted);
    };
    artefact.save(&args.out)?;
    if state.exists() {
        std::fs::remove_file(&state).with_context(|| format!("cannot remove {}", state.display()))?;
    }
    writeln!(
        std::io::stdout(),
        "{}: {} for {} from {}",
        args.out.display(),
        scheme.name,
        pretrained.name,
        artefact.source
    )
    .context(STDOUT)?;
    Ok(Outcome::Done)
}

/// Checks that the file can be written, and that nothing is lost by it.
fn check_place(args: &CalibrateArgs) -> Result<()> {
    let out = &args.out;
    check_writable(out)?;
    if out.exists() && !out.is_file() {
        bail!("cannot write {}: it is not a file, and a calibration must be one", out.display());
    }
    let same = |a: &Path, b: &Path| Some(a.canonicalize().ok()? == b.canonicalize().ok()?);
    if same(out, &args.text) == Some(true) {
        bail!("cannot write {}: it is the text; choose another place for the calibration", out.display());
    }
    Ok(())
}

/// Says what is about to run.
fn announce(progress: Progress, context: usize, state: &Path) {
    let Progress { done, sequences } = progress;
    match done {
        0 => note(&format!("running {sequences} sequences of {context} tokens")),
        _ => note(&format!("going on from {}: {done} of {sequences} sequences are done", state.display())),
    }
}

/// Where a calibration keeps its state while it runs.
fn state_path(out: &Path) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(".partial");
    PathBuf::from(name)
}

/// Loads schemes and gives each that needs one its calibration from `files`.
pub fn calibrated_schemes(names: &[String], files: &[PathBuf], pretrained: &Pretrained) -> Result<Vec<Scheme>> {
    let mut schemes = schemes(names)?;
    if !files.is_empty() && !schemes.iter().any(Scheme::is_calibrated) {
        bail!("none of the schemes {} needs a calibration; leave --calibration out", names.join(", "));
    }
    for scheme in schemes.iter_mut().filter(|scheme| scheme.is_calibrated()) {
        attach(scheme, files, pretrained)?;
    }
    Ok(schemes)
}

/// Gives a scheme the calibration among `files` that was made for it; none where there are no files.
pub fn attach(scheme: &mut Scheme, files: &[PathBuf], pretrained: &Pretrained) -> Result<()> {
    if !scheme.is_calibrated() && !files.is_empty() {
        return Err(CalibrationError::NotNeeded(scheme.origin.clone()).into());
    }
    let mut reasons = Vec::new();
    for file in files {
        match Artefact::attach(file, pretrained, scheme) {
            Ok(()) => return Ok(()),
            Err(error) => reasons.push(anyhow::Error::from(error)),
        }
    }
    match reasons.len() {
        0 => Ok(()),
        1 => Err(reasons.remove(0)),
        _ => {
            let reasons: Vec<String> = reasons.iter().map(|reason| format!("\n  {reason:#}")).collect();
            bail!("no calibration suits scheme {}:{}", scheme.name, reasons.concat())
        }
    }
}
