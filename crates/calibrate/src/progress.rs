//! What a calibration has gathered so far, so that it can go on after it was stopped.

use crate::file::{Array, Contents};
use crate::run::Gathered;
use crate::{CalibrationError, Fingerprint};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::Path;

const STATE: &str = "dibit.state";

/// What a calibration is made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Hash of the tokens.
    pub text: String,
    /// Tokens of a sequence.
    pub context: usize,
    /// Number of sequences.
    pub sequences: usize,
    /// Seed of random rotations.
    pub seed: u64,
}

impl Source {
    pub(crate) fn new(windows: &[Vec<u32>], context: usize, seed: u64) -> Self {
        let mut hash = Sha256::new();
        for id in windows.iter().flatten() {
            hash.update(id.to_le_bytes());
        }
        let text = hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        Source { text, context, sequences: windows.len(), seed }
    }

    /// The first part in which this source differs from another: its name, and both values.
    fn difference(&self, other: &Source) -> Option<(&'static str, String, String)> {
        let parts = |source: &Source| {
            [
                ("number of tokens of a sequence", source.context.to_string()),
                ("number of sequences", source.sequences.to_string()),
                ("text", source.text.clone()),
                ("seed", source.seed.to_string()),
            ]
        };
        let pairs = parts(self).into_iter().zip(parts(other));
        pairs.map(|((what, own), (_, other))| (what, own, other)).find(|(_, own, other)| own != other)
    }
}

#[derive(Serialize, Deserialize)]
struct State {
    fingerprint: Fingerprint,
    source: Source,
    done: usize,
}

/// Writes what was gathered from the first `done` sequences.
pub(crate) fn save(
    path: &Path,
    fingerprint: &Fingerprint,
    source: &Source,
    done: usize,
    gathered: &Gathered,
) -> Result<(), CalibrationError> {
    let state = State { fingerprint: fingerprint.clone(), source: source.clone(), done };
    let mut contents = Contents::default();
    contents.metadata.insert(STATE.to_owned(), serde_json::to_string(&state).expect("strings and numbers"));
    for (name, sums) in gathered.sums() {
        contents.doubles.push((name, Array { shape: vec![sums.len()], values: sums.to_vec() }));
    }
    contents.write(path)
}

/// Reads what was gathered, if there is a state of just this calibration; returns the number of sequences in it.
///
/// # Errors
/// [`CalibrationError::Read`], and [`CalibrationError::State`] for a damaged file or that of another run.
pub(crate) fn resume(
    path: &Path,
    fingerprint: &Fingerprint,
    source: &Source,
    gathered: &mut Gathered,
) -> Result<usize, CalibrationError> {
    if !path.exists() {
        return Ok(0);
    }
    let unusable = |problem: String| CalibrationError::State { path: path.to_owned(), problem };
    let contents = Contents::read(path).map_err(|error| match error {
        CalibrationError::Malformed { problem, .. } => unusable(problem),
        other => other,
    })?;
    let state = contents.metadata.get(STATE).and_then(|text| serde_json::from_str::<State>(text).ok());
    let state = state.ok_or_else(|| unusable("it is not the state of a calibration".into()))?;
    let fingerprints = state.fingerprint.difference(fingerprint);
    let fingerprints = fingerprints.map(|(what, found, expected)| (what, found.to_owned(), expected.to_owned()));
    if let Some((what, found, expected)) = fingerprints.or_else(|| state.source.difference(source)) {
        return Err(unusable(format!("it is of another {what}: {found}, and this run has {expected}")));
    }
    for (name, sums) in gathered.sums_mut() {
        let saved = contents.doubles.iter().find(|(other, _)| *other == name);
        let saved = saved.filter(|(_, array)| array.values.len() == sums.len());
        let (_, array) = saved.ok_or_else(|| unusable(format!("{name} is missing")))?;
        sums.copy_from_slice(&array.values);
    }
    if state.done > source.sequences {
        return Err(unusable("it has more sequences than the text".into()));
    }
    Ok(state.done)
}
