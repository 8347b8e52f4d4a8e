use thiserror::Error;

/// Why a scheme cannot be used.
#[derive(Debug, Error)]
pub enum SchemeError {
    /// No built-in scheme has this name.
    #[error(
        "unknown scheme '{name}'{suggestion}; built in: {known}. A file of your own is given as its path, ending in .toml"
    )]
    Unknown {
        /// The name that was asked for.
        name: String,
        /// ` (did you mean '...'?)`, or empty.
        suggestion: String,
        /// The built-in names, separated by commas.
        known: String,
    },
    /// The scheme file cannot be read.
    #[error("cannot read the scheme file {path}")]
    Read {
        /// The file.
        path: String,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// The text is not a scheme.
    #[error("scheme {name} is malformed: {message}")]
    Parse {
        /// Name or path of the scheme.
        name: String,
        /// What is wrong, and where.
        message: String,
    },
    /// The choices are known but do not go together, or not yet.
    #[error("scheme {name}: {problem}; supported: {supported}")]
    Unsupported {
        /// Name of the scheme.
        name: String,
        /// The choice that is not supported.
        problem: String,
        /// What could be chosen instead.
        supported: String,
    },
    /// The scheme needs a calibration and none was given.
    #[error(
        "scheme {0} needs a calibration of this model; make one with \
         `dibit calibrate --kv {0} --model MODEL --text FILE --out FILE.safetensors` and pass it with --calibration"
    )]
    Uncalibrated(String),
    /// A calibration does not suit the model.
    #[error(
        "the calibration of scheme {name} does not suit the model: {problem}; make it again with `dibit calibrate`"
    )]
    Calibration {
        /// Name of the scheme.
        name: String,
        /// What does not fit.
        problem: String,
    },
}

/// Why a sequence cannot be held in the cache.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum CacheError {
    /// The pool has too few free blocks.
    #[error(
        "the cache is full: {needed} more blocks of 128 tokens are needed and {free} of {capacity} are free; \
         plan a longer context, run fewer sequences at once or shorten the prompt"
    )]
    PoolExhausted {
        /// Blocks that the request needs beyond those it has.
        needed: usize,
        /// Free blocks.
        free: usize,
        /// Blocks of the whole pool.
        capacity: usize,
    },
    /// The scheme has no such class of tokens.
    #[error("class {class} of tokens is unknown: the scheme has {count} classes besides 0")]
    Class {
        /// The class.
        class: u8,
        /// Classes of the scheme.
        count: usize,
    },
    /// Every sequence slot is taken.
    #[error("the cache was planned for {capacity} sequences at once and all are in use")]
    TooManySequences {
        /// Number of slots.
        capacity: usize,
    },
}
