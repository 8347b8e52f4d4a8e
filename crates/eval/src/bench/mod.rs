//! How fast schemes are: attention of one layer, and whole models.
//!
//! Whatever is compared takes turns in one run ([`dibit_timing::rounds`]). In every round a [`dibit_timing::Sweep`]
//! is read too, so that caches and weights come from memory, and so that the speed at which memory can be read is known.

mod attention;
mod decode;

pub use attention::{AttentionBench, AttentionFigures, AttentionOptions, AttentionPoint, Heads, HeadsError, attention};
pub use decode::{DecodeBench, DecodeFigures, DecodeOptions, DecodePoint, PrefillFigures, decode};

use crate::EvalError;
use dibit_timing::Sweep;

fn sweep(bytes: usize) -> Result<Sweep, EvalError> {
    Sweep::new(bytes).map_err(|_| dibit_device::DeviceError::OutOfMemory { what: "the sweep", bytes }.into())
}
