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
/// [`CalibrationError::Malformed`] for a damaged file, [`CalibrationError::Mismatch`] for that of another run.
pub(crate) fn resume(
    path: &Path,
    fingerprint: &Fingerprint,
    source: &Source,
    gathered: &mut Gathered,
) -> Result<usize, CalibrationError> {
    if !path.exists() {
        return Ok(0);
    }
    let malformed = |problem: &str| CalibrationError::Malformed {
        path: path.to_owned(),
        problem: format!("{problem}; delete it to begin again"),
    };
    let contents = Contents::read(path)?;
    let state = contents.metadata.get(STATE).and_then(|text| serde_json::from_str::<State>(text).ok());
    let state = state.ok_or_else(|| malformed("it is not the state of a calibration"))?;
    let mismatch = |what: &'static str, found: String, expected: String| CalibrationError::Mismatch {
        path: path.to_owned(),
        what,
        found,
        expected: format!("{expected} (delete the file to begin again)"),
    };
    if let Some((what, found, expected)) = state.fingerprint.difference(fingerprint) {
        return Err(mismatch(what, found.to_owned(), expected.to_owned()));
    }
    if state.source != *source {
        return Err(mismatch("text, number of tokens or seed", format!("{:?}", state.source), format!("{source:?}")));
    }
    for (name, sums) in gathered.sums_mut() {
        let saved = contents.doubles.iter().find(|(other, _)| *other == name);
        let saved = saved.filter(|(_, array)| array.values.len() == sums.len());
        let (_, array) = saved.ok_or_else(|| malformed(&format!("{name} is missing")))?;
        sums.copy_from_slice(&array.values);
    }
    if state.done > source.sequences { Err(malformed("it has more sequences than the text")) } else { Ok(state.done) }
}
