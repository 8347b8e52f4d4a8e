use thiserror::Error;

/// Why a model cannot be loaded or run.
#[derive(Debug, Error)]
pub enum ModelError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: String,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// The model is not where it was looked for.
    #[error("no model at {path}: {reason}")]
    NotFound {
        /// Directory or hub id.
        path: String,
        /// What is missing and what to do.
        reason: String,
    },
    /// A file is not what its name says.
    #[error("{path} is malformed: {reason}")]
    Malformed {
        /// The file.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// Something else lies in place of a file.
    #[error("{path} is {found}: {next}")]
    Impostor {
        /// The file.
        path: String,
        /// What it is.
        found: String,
        /// What to do.
        next: String,
    },
    /// The model asks for something that dibit does not do.
    #[error("{what} is not supported; supported: {supported}")]
    Unsupported {
        /// The feature, with its value.
        what: String,
        /// What is supported.
        supported: String,
    },
    /// A tensor is missing.
    #[error(
        "the checkpoint has no tensor '{name}', which {architecture} needs: it is incomplete or of another architecture"
    )]
    MissingTensor {
        /// Its name.
        name: String,
        /// The architecture of the configuration.
        architecture: &'static str,
    },
    /// A tensor is missing, and others tell why.
    #[error("the checkpoint has no tensor '{name}' but has '{found}': {hint}")]
    OtherNames {
        /// The tensor that is missing.
        name: String,
        /// One that is there.
        found: String,
        /// What the checkpoint probably is, and what to do.
        hint: String,
    },
    /// Tensors that change what a model says would not be read.
    #[error("the checkpoint has tensors that {architecture} does not read: {names}; {hint}")]
    UnreadTensors {
        /// The architecture of the configuration.
        architecture: &'static str,
        /// Some of them, and how many there are.
        names: String,
        /// What the checkpoint probably is, and what to do.
        hint: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error(
        "tensor '{name}' has shape {found:?} but the configuration implies {expected:?}: checkpoint and configuration do not belong together"
    )]
    Shape {
        /// Its name.
        name: String,
        /// Shape in the checkpoint.
        found: Vec<usize>,
        /// Shape by the configuration.
        expected: Vec<usize>,
    },
    /// A text takes a token that the tokenizer has and the model has not.
    #[error(
        "the text takes the token '{token}' of id {id}, and the model has embeddings for {vocab_size} ids only; leave it out, or use \
         the tokenizer that the model was trained with"
    )]
    NoEmbedding {
        /// The token.
        token: String,
        /// Its id.
        id: u32,
        /// Size of the model's vocabulary.
        vocab_size: usize,
    },
    /// The sampling defaults of a model cannot be understood.
    #[error("{0}")]
    Generation(String),
    /// The tokenizer failed.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template failed.
    #[error("chat template: {0}")]
    Template(String),
    /// A token id is outside the vocabulary.
    #[error("token id {id} is outside the model's vocabulary of {vocab_size}")]
    TokenId {
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// More rows than the workspace was planned for.
    #[error("a forward pass of {rows} rows exceeds the {max_rows} that the workspace was planned for")]
    TooManyRows {
        /// Rows asked for.
        rows: usize,
        /// Rows planned.
        max_rows: usize,
    },
    /// A transform of values that was fused into the projections changed the model.
    #[error(
        "the transform of values fused into layer {layer} failed its self-test: {part} differ by {difference:.2e}, more than \
         {tolerance:.0e}; take another scheme, or calibrate this one again"
    )]
    FusionTest {
        /// Decoder layer.
        layer: usize,
        /// "values" or "outputs".
        part: &'static str,
        /// Largest difference, relative to the largest number.
        difference: f32,
        /// The limit.
        tolerance: f32,
    },
    /// A transform of values was to be fused into quantised projections.
    #[error(
        "the value and output projections of layer {layer} are quantised, and no transform of values is fused into them; take \
         the cache's layout from the weights, or load them in 16 bit"
    )]
    QuantisedValues {
        /// Decoder layer.
        layer: usize,
    },
    /// A cache takes values in another frame than the model computes them in.
    #[error(
        "the cache of scheme {scheme} takes values in another frame than this model computes them in; make the model for the \
         cache's layout"
    )]
    OtherValues {
        /// The scheme of the cache.
        scheme: String,
    },
    /// A cache computes attention in another arithmetic than the model.
    #[error("the cache computes in another arithmetic than this model; make it with the model's (Model::arithmetic)")]
    OtherArithmetic,
    /// A cache, or a workspace, was used with another model before.
    #[error("the cache belongs to another model or workspace; make one for each")]
    OtherModel,
    /// A download failed.
    #[error("cannot get {model} from the hub: {reason}")]
    Hub {
        /// The model's id.
        model: String,
        /// Cause and next step.
        reason: String,
    },
    /// The scheme does not suit the model.
    #[error(transparent)]
    Scheme(#[from] dibit_cache::SchemeError),
    /// The cache cannot hold the request.
    #[error(transparent)]
    Cache(#[from] dibit_cache::CacheError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] dibit_device::DeviceError),
}

impl ModelError {
    /// Whether the sequences of the pass must be run again, and can then be stored.
    pub fn wants_replay(&self) -> bool {
        matches!(self, ModelError::Device(error) if error.wants_replay())
    }
}
