use thiserror::Error;

/// Why a group cannot be quantised or a rotation cannot be built.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum QuantError {
    /// A value of the group is NaN or infinite.
    #[error("value {index} of a quantisation group is {value}; only finite values can be quantised")]
    NonFinite {
        /// Position of the value in its group.
        index: usize,
        /// The offending value.
        value: f32,
    },
    /// The group's minimum or step does not fit fp16.
    #[error("a quantisation group spans {min} to {max}, which fp16 scale and minimum cannot represent")]
    Range {
        /// Smallest value of the group.
        min: f32,
        /// Largest value of the group.
        max: f32,
    },
    /// The group is empty.
    #[error("a quantisation group must hold at least one value")]
    Empty,
    /// No code width of this many bits exists.
    #[error("{0} bits per code is not supported; supported: 2, 3, 4, 5, 6, 8")]
    Bits(u32),
    /// No Hadamard matrix of this order is available.
    #[error("no Hadamard matrix of order {0} is available; supported orders: 2^k, 12*2^k, 20*2^k, and multiples of 8")]
    HadamardOrder(usize),
}
