//! A calibration that a command makes by itself, where it needs one and there is none.

use super::calibrate::{Job, Told};
use super::go_on;
use super::schemes::{Found, command};
use crate::args::Calibrate;
use crate::calibration_folder;
use crate::output::{bar, duration, note};
use anyhow::Result;
use dibit_cache::{CalibratedScheme, Scheme};
use dibit_calibrate::{Artefact, Progress, calibrate};
use dibit_device::Train;
use dibit_model::Pretrained;
use dibit_runner::ExactPass;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The longest that a command calibrates for unasked.
const LIMIT: Duration = Duration::from_secs(120);

/// Tokens that are timed before anything longer runs.
const PROBE_TOKENS: usize = 16;

/// Times that they are timed, at most.
const PROBES: usize = 5;

/// Time that is enough to tell how long something takes.
const ENOUGH: Duration = Duration::from_secs(1);

/// So much longer a few tokens may take each than those of a long sequence, whose weights are read once for all of them.
const PROBE_FACTOR: f64 = 4.0;

/// What became of it.
pub enum Made {
    /// The scheme has it.
    Done(Found),
    /// There is none; why, as the end of a sentence.
    Not(String),
}

/// Why a run was broken off.
enum Stop {
    TooLong(Duration),
    Interrupted,
}

/// Makes the calibration of a scheme, gives it to it, and keeps it in the user's folder.
///
/// `Auto` gives up where it takes longer than [`LIMIT`], and where it fails; `Now` does neither. Ctrl-C skips it.
pub fn make<D: Train>(
    device: &Arc<D>,
    pretrained: &Pretrained,
    scheme: &mut CalibratedScheme,
    wanted: Calibrate,
    interrupted: &AtomicBool,
) -> Result<Made> {
    let artefact = match (wanted, run(device, pretrained, scheme, wanted, interrupted)) {
        (_, Ok(Ok(artefact))) => artefact,
        (_, Ok(Err(reason))) => return Ok(Made::Not(reason)),
        (Calibrate::Now, Err(error)) => return Err(error),
        (_, Err(error)) => return Ok(Made::Not(format!(", and making one failed ({error:#})"))),
    };
    let place = keep(scheme, pretrained, &artefact);
    let found = Found::new(place.clone(), &artefact);
    artefact.give(Path::new(&place), pretrained, scheme)?;
    Ok(Made::Done(found))
}

/// Runs it; the inner error is why there is none.
fn run<D: Train>(
    device: &Arc<D>,
    pretrained: &Pretrained,
    scheme: &Scheme,
    wanted: Calibrate,
    interrupted: &AtomicBool,
) -> Result<Result<Artefact, String>> {
    if wanted == Calibrate::Never {
        return Ok(Err(String::new()));
    }
    let too_long = |least: &str, time: Duration| {
        format!(", and making one would take {least} {} (`--calibrate now` does so)", duration(time))
    };
    let job = Job::of_bundled_text(pretrained, scheme)?;
    if wanted == Calibrate::Auto {
        let tokens = job.tokens(scheme, pretrained) as f64;
        let least = probe(device, pretrained, &job)?.mul_f64(tokens / PROBE_FACTOR);
        if least > LIMIT {
            return Ok(Err(too_long("more than", least)));
        }
    }
    let (bar, mut told) = (bar(0), Told::default());
    let (mut first, mut stop, mut said): (Option<Instant>, Option<Stop>, bool) = (None, None, false);
    let artefact = calibrate(device, pretrained, scheme, &job.text, &job.options, |progress| {
        let started = *first.get_or_insert_with(Instant::now);
        if go_on(interrupted).is_break() {
            stop = Some(Stop::Interrupted);
            return ControlFlow::Break(());
        }
        let beginning = format!("no calibration of scheme {} for this model yet: making one", scheme.name);
        if !said && scheme.linear().is_some() {
            // How long training takes shows when it has begun.
            said = true;
            note(&format!("{beginning}; Ctrl-C skips it"));
        }
        if !said && let Some(estimate) = whole(progress, started.elapsed()) {
            said = true;
            if wanted == Calibrate::Auto && estimate > LIMIT {
                stop = Some(Stop::TooLong(estimate));
                return ControlFlow::Break(());
            }
            note(&format!("{beginning} takes about {}; Ctrl-C skips it", duration(estimate)));
        }
        if said {
            told.tell(progress, &job.options, &bar);
        }
        ControlFlow::Continue(())
    });
    bar.finish_and_clear();
    let artefact = artefact?;
    // A signal while this ran was for this.
    interrupted.store(false, Ordering::Relaxed);
    match (artefact, stop) {
        (Some(artefact), _) => Ok(Ok(artefact)),
        (None, Some(Stop::TooLong(estimate))) => Ok(Err(too_long("about", estimate))),
        (None, _) => Ok(Err(", and making one was skipped".to_owned())),
    }
}

/// How long the whole takes, once enough of it was run to tell.
fn whole(progress: Progress, elapsed: Duration) -> Option<Duration> {
    let Progress { done, sequences, .. } = progress;
    let enough = done > 0 && (elapsed >= ENOUGH || 20 * done >= sequences);
    enough.then(|| elapsed.mul_f64(sequences as f64 / done as f64))
}

/// How long a token takes, by short sequences.
fn probe<D: Train>(device: &Arc<D>, pretrained: &Pretrained, job: &Job) -> Result<Duration> {
    let ids: Vec<u32> = job.text.documents.iter().flatten().copied().take(PROBE_TOKENS).collect();
    let mut pass = ExactPass::new(device, &pretrained.config, &pretrained.weights, ids.len())?;
    let (start, mut best) = (Instant::now(), Duration::MAX);
    // The first run also brings the weights in.
    for run in 0..PROBES {
        if run > 1 && start.elapsed() >= ENOUGH {
            break;
        }
        let start = Instant::now();
        pass.run(&ids, &mut |_| {})?;
        best = best.min(start.elapsed());
    }
    Ok(best.div_f64(ids.len().max(1) as f64))
}

/// Keeps a calibration in the user's folder, and returns where it is. Where it cannot be written, that is said, and it is
/// used from memory.
fn keep(scheme: &Scheme, pretrained: &Pretrained, artefact: &Artefact) -> String {
    let kept = calibration_folder::place(scheme, pretrained).and_then(|path| {
        calibration_folder::make_folder(&path)?;
        artefact.save(&path)?;
        Ok(path)
    });
    match kept {
        Ok(path) => path.display().to_string(),
        Err(error) => {
            tracing::warn!(
                "{error:#}; the calibration is used for this run alone (`{} --out FILE` writes it elsewhere)",
                command(scheme, pretrained)
            );
            "in memory".to_owned()
        }
    }
}
