//! Rings of recent tokens.

use half::f16;
use std::ops::Range;

/// A side of a cache.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    Keys,
    Values,
}

/// Rows of consecutive tokens in the ring of a head, token `t` in slot `t % slots`, as up to two runs.
pub(super) fn runs(ring: &[f16], head_dim: usize, tokens: Range<usize>) -> [&[f16]; 2] {
    let count = ring.len() / head_dim;
    debug_assert!(tokens.len() <= count);
    let first = tokens.start % count;
    let until_wrap = tokens.len().min(count - first);
    [&ring[first * head_dim..(first + until_wrap) * head_dim], &ring[..(tokens.len() - until_wrap) * head_dim]]
}
