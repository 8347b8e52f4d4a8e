//! Numbers only: packing codes into bytes, fitting affine quantisers and rotating by Hadamard matrices.
//!
//! Nothing here knows tokens, heads or caches. Every function is a scalar reference that faster
//! implementations elsewhere are tested against.
#![forbid(unsafe_code)]

mod affine;
mod clip;
mod error;
mod hadamard;
mod low_rank;
mod pack;
mod quantizer;
mod rope;
mod splitmix;

pub use affine::Affine;
pub use clip::Clip;
pub use error::QuantError;
pub use hadamard::Hadamard;
pub use low_rank::{LowRank, low_rank};
pub use pack::{Bits, Plane, pack, packed_len, put, unpack};
pub use quantizer::{Parameters, Quantizer};
pub use rope::turn_back;
pub use splitmix::splitmix;
