use std::path::PathBuf;
use thiserror::Error;

/// Why a calibration cannot be made or used.
#[derive(Debug, Error)]
pub enum CalibrationError {
    /// The scheme has nothing to calibrate.
    #[error("scheme {0} needs no calibration; use it as it is")]
    NotNeeded(String),
    /// The text does not fill one sequence.
    #[error(
        "the calibration text has {tokens} tokens and {needed} are needed; give a longer text, fewer --tokens or a shorter --context"
    )]
    TextTooShort {
        /// Tokens of the text.
        tokens: usize,
        /// Tokens that are needed.
        needed: usize,
    },
    /// A sequence of this length cannot be run.
    #[error(
        "calibration sequences of {context} tokens cannot be run; --context must be between 2 and the model's {limit}"
    )]
    Context {
        /// Tokens asked for.
        context: usize,
        /// The model's `max_position_embeddings`.
        limit: usize,
    },
    /// Sequences are so short that nothing is ever packed.
    #[error(
        "sequences of {context} tokens leave no packed keys to correct; --context must be at least {needed} for this scheme"
    )]
    NothingPacked {
        /// Tokens asked for.
        context: usize,
        /// The fewest that are of use.
        needed: usize,
    },
    /// Training left the numbers.
    #[error("training left the finite numbers at step {step}; choose a smaller --learning-rate")]
    Diverged {
        /// Steps done before.
        step: usize,
    },
    /// The model computed something that is no number.
    #[error("layer {layer} computes numbers that are not finite; the weights are damaged, or need --dtype f32")]
    NotFinite {
        /// The layer.
        layer: usize,
    },
    /// The file cannot be read.
    #[error("cannot read the calibration {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write the calibration {path}", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// The file is no calibration, or a damaged one.
    #[error("{path} is not a usable calibration: {problem}; make it again with `dibit calibrate`", path = path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The file is of another version of the format.
    #[error("{path} is of version {found} of calibrations, and this program reads version {version}; make a new one with `dibit calibrate`", path = path.display(), version = crate::fingerprint::VERSION)]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: String,
        /// The scheme that it was made for, as [`Fingerprint::scheme`](crate::Fingerprint::scheme) says it.
        scheme: String,
    },
    /// The file belongs to something else.
    #[error("{path} was made for another {what}: {difference}; make one with `dibit calibrate`", path = path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// In what, in words.
        difference: String,
    },
    /// What a stopped calibration gathered belongs to another one, or is damaged.
    #[error("cannot go on from {path}: {problem}; delete it to begin again", path = path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The scheme does not suit the model.
    #[error(transparent)]
    Scheme(#[from] dibit_cache::SchemeError),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] dibit_model::ModelError),
    /// The cache failed.
    #[error(transparent)]
    Cache(#[from] dibit_cache::CacheError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] dibit_device::DeviceError),
}
