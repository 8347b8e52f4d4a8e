//! Timing things against each other.
//!
//! A time alone says little on a machine that others use too. So whatever is compared is timed in the same
//! [`rounds`], in turns, and is quoted as the ratio of numbers of the same round with the spread of these ratios. A
//! [`Sweep`] takes part: it says how fast memory can be read, and what lies in caches is evicted by it.
#![forbid(unsafe_code)]

mod kernels;
mod rounds;
mod samples;
mod sweep;

pub use kernels::Kernels;
pub use rounds::rounds;
pub use samples::{Samples, Spread};
pub use sweep::Sweep;
