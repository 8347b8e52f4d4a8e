//! Numbers only: packing codes into bytes, fitting affine quantisers and rotating by Hadamard matrices.
//!
//! Nothing here knows tokens, heads or caches. Every function is a scalar reference that faster
//! implementations elsewhere are tested against.
#![forbid(unsafe_code)]

mod affine;
mod error;
mod hadamard;
mod pack;

pub use affine::Affine;
pub use error::QuantError;
pub use hadamard::Hadamard;
pub use pack::{Bits, pack, packed_len, unpack};
