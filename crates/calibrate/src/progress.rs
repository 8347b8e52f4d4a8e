//! What a calibration has gathered so far, so that it can go on after it was stopped.

use crate::file::{Array, Contents};
use crate::gathered::Gathered;
use crate::{CalibrationError, Fingerprint, Options, Recipe};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::PathBuf;

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
    /// Sequences that are held out of training, the last ones.
    pub held_out: usize,
    /// Seed of random rotations, starts and orders.
    pub seed: u64,
    /// How adapters are trained, in words; empty where there are none.
    pub recipe: String,
}

impl Source {
    /// The source of a calibration from these sequences; those from `held_out` on are held out of training.
    pub(crate) fn new(sequences: &[Vec<u32>], held_out: usize, options: &Options, recipe: Option<&Recipe>) -> Self {
        let mut hash = Sha256::new();
        for id in sequences.iter().flatten() {
            hash.update(id.to_le_bytes());
        }
        let text = hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        Source {
            text,
            context: options.context,
            sequences: sequences.len(),
            held_out: sequences.len() - held_out,
            seed: options.seed,
            recipe: recipe.map(ToString::to_string).unwrap_or_default(),
        }
    }

    /// The source in words.
    pub(crate) fn words(&self) -> String {
        let Source { text, context, sequences, held_out, seed, recipe } = self;
        let tokens = sequences * context;
        let trained = if recipe.is_empty() { String::new() } else { format!(", {held_out} held out, {recipe}") };
        format!("{tokens} tokens in sequences of {context}{trained}, text {text}, seed {seed}")
    }

    /// The first part in which this source differs from that of a run: its name, and how.
    fn difference(&self, run: &Source) -> Option<(&'static str, String)> {
        let parts = |source: &Source| {
            [
                ("number of tokens of a sequence", source.context.to_string()),
                ("number of sequences", source.sequences.to_string()),
                ("number of held-out sequences", source.held_out.to_string()),
                ("recipe", source.recipe.clone()),
                ("text", source.text.clone()),
                ("seed", source.seed.to_string()),
            ]
        };
        let mut pairs = parts(self).into_iter().zip(parts(run));
        let ((what, own), (_, run)) = pairs.find(|((_, own), (_, run))| own != run)?;
        Some((what, format!("{own}, and this run has {run}")))
    }
}

#[derive(Serialize, Deserialize)]
struct State {
    fingerprint: Fingerprint,
    source: Source,
    done: usize,
}

/// What a calibration is of, and where it keeps its state.
pub(crate) struct Kept {
    /// The file, if there is to be one.
    pub path: Option<PathBuf>,
    pub fingerprint: Fingerprint,
    pub source: Source,
}

impl Kept {
    /// Writes what was gathered from the first `done` sequences, and what `further` adds.
    pub(crate) fn save(
        &self,
        done: usize,
        gathered: &Gathered,
        further: impl FnOnce(&mut Contents) -> Result<(), CalibrationError>,
    ) -> Result<(), CalibrationError> {
        let Some(path) = &self.path else { return Ok(()) };
        let state = State { fingerprint: self.fingerprint.clone(), source: self.source.clone(), done };
        let mut contents = Contents::default();
        contents.metadata.insert(STATE.to_owned(), serde_json::to_string(&state).expect("strings and numbers"));
        for (name, sums) in gathered.sums() {
            contents.doubles.push((name, Array { shape: vec![sums.len()], values: sums.to_vec() }));
        }
        further(&mut contents)?;
        contents.write(path)
    }

    /// Reads what was gathered, if there is a state of just this calibration; returns the number of sequences in it and
    /// the whole file.
    ///
    /// # Errors
    /// [`CalibrationError::Read`], and [`CalibrationError::State`] for a damaged file or that of another run.
    pub(crate) fn load(&self, gathered: &mut Gathered) -> Result<(usize, Option<Contents>), CalibrationError> {
        let Some(path) = self.path.as_deref().filter(|path| path.exists()) else { return Ok((0, None)) };
        let contents = Contents::read(path).map_err(|error| match error {
            CalibrationError::Malformed { problem, .. } => self.unusable(problem),
            other => other,
        })?;
        let state = contents.metadata.get(STATE).and_then(|text| serde_json::from_str::<State>(text).ok());
        let state = state.ok_or_else(|| self.unusable("it is not the state of a calibration".into()))?;
        let difference = state.fingerprint.difference(&self.fingerprint);
        if let Some((what, difference)) = difference.or_else(|| state.source.difference(&self.source)) {
            return Err(self.unusable(format!("it is of another {what}: {difference}")));
        }
        for (name, sums) in gathered.sums_mut() {
            let saved = contents.doubles.iter().find(|(other, _)| *other == name);
            let saved = saved.filter(|(_, array)| array.values.len() == sums.len());
            let (_, array) = saved.ok_or_else(|| self.unusable(format!("{name} is missing")))?;
            sums.copy_from_slice(&array.values);
        }
        if state.done > self.source.sequences {
            return Err(self.unusable("it has more sequences than the text".into()));
        }
        Ok((state.done, Some(contents)))
    }

    /// What is said where the state cannot be used.
    pub(crate) fn unusable(&self, problem: String) -> CalibrationError {
        CalibrationError::State { path: self.path.clone().unwrap_or_default(), problem }
    }
}
