use thiserror::Error;

/// Why a device cannot do what was asked.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// Memory could not be had.
    #[error("cannot allocate {bytes} bytes for {what}; plan a shorter context or fewer sequences")]
    OutOfMemory {
        /// What the memory was for.
        what: &'static str,
        /// How much was asked for.
        bytes: usize,
    },
    /// Memory of a GPU could not be had.
    #[error(
        "cannot allocate {bytes} bytes for {what}: of the GPU's {total} bytes {free} are free; plan a shorter context, fewer sequences, or a scheme of fewer bits"
    )]
    GpuMemory {
        /// What the memory was for.
        what: &'static str,
        /// How much was asked for.
        bytes: usize,
        /// How much would fit.
        free: usize,
        /// How much there is.
        total: usize,
    },
    /// The device failed; what it was asked for cannot be relied on.
    #[error("the device failed: {0}")]
    Failed(String),
    /// The device lacks an operation that was asked for.
    #[error("{0}")]
    Unsupported(String),
    /// A thread pool could not be started.
    #[error("cannot start {threads} threads: {message}")]
    Threads {
        /// Number of threads asked for.
        threads: usize,
        /// The reason.
        message: String,
    },
    /// This machine lacks an instruction set.
    #[error("no instruction set {name} on this machine; it has: {available}")]
    Isa {
        /// What was asked for.
        name: String,
        /// What there is.
        available: String,
    },
    /// A key or value cannot be stored in 16 bit.
    #[error(
        "{side} of layer {layer}, token {token} holds {value}, which fp16 cannot store: the model's weights or its dtype are not usable"
    )]
    NotFinite {
        /// "key" or "value".
        side: &'static str,
        /// Decoder layer.
        layer: usize,
        /// The KV head.
        kv_head: usize,
        /// Position of the token in its sequence.
        token: usize,
        /// The value.
        value: f32,
    },
    /// A key or value was beyond what fp16 stores, and the cache divides those of its head from now on.
    #[error(
        "{side} of layer {layer}, KV head {kv_head}, token {token} holds {value}, beyond what fp16 stores; this head is stored divided by 2^{exponent} from now on, and sequences that were stored before must be run again"
    )]
    Overflow {
        /// "key" or "value".
        side: &'static str,
        /// Decoder layer.
        layer: usize,
        /// The KV head.
        kv_head: usize,
        /// Position of the token in its sequence.
        token: usize,
        /// The value.
        value: f32,
        /// What the head is divided by, as a power of two.
        exponent: u8,
    },
    /// A key was beyond what fp16 stores, in a layer whose keys cannot be divided.
    #[error(
        "key of layer {layer}, KV head {kv_head}, token {token} holds {value}, beyond what fp16 stores, and adapters of a linear correction take keys as they are; take a scheme without one, such as --kv dibit"
    )]
    Corrected {
        /// Decoder layer.
        layer: usize,
        /// The KV head.
        kv_head: usize,
        /// Position of the token in its sequence.
        token: usize,
        /// The value.
        value: f32,
    },
    /// A sequence was stored before the cache changed what its heads are divided by.
    #[error(
        "a sequence was stored before a head of this cache was divided by another power of two; clear it and run it again"
    )]
    Stale,
    /// A group of keys or values cannot be quantised.
    #[error("layer {layer}: {source}; its keys or values are too large for this scheme, try --kv fp16 or --dtype f32")]
    Quantize {
        /// Decoder layer.
        layer: usize,
        /// The reason.
        source: dibit_quant::QuantError,
    },
}

impl DeviceError {
    /// Whether the sequences of the pass must be run again, and can then be stored.
    pub fn wants_replay(&self) -> bool {
        matches!(self, DeviceError::Overflow { .. } | DeviceError::Stale)
    }

    /// Whether memory could not be had, so that less of it may be asked for.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, DeviceError::OutOfMemory { .. } | DeviceError::GpuMemory { .. })
    }
}
