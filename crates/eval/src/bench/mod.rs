//! How fast schemes are: attention of one layer, and whole models.
//!
//! Whatever is compared takes turns in one run ([`dibit_timing::rounds`]). In every round a
//! [`dibit_device::Sweep`] of the device's memory is read too, so that caches and weights come from memory, and so that
//! the speed at which memory can be read is known.

mod attention;
mod decode;
mod throughput;

pub use attention::{AttentionBench, AttentionFigures, AttentionOptions, AttentionPoint, Heads, HeadsError, attention};
pub use decode::{DecodeBench, DecodeFigures, DecodeOptions, DecodePoint, PrefillFigures, decode};
pub use throughput::{
    BatchSize, OutOfMemory, ThroughputBench, ThroughputOptions, ThroughputPoint, ThroughputScheme, throughput,
};
