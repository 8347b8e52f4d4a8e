//! OLMo 2 (Ai2): norms behind attention and the gated layers, and of all heads of a query or key together.

use super::Source;
use crate::{DecoderSpec, NormPlaces, QkNorm};

pub(super) fn spec(source: &Source) -> DecoderSpec {
    DecoderSpec { norms: NormPlaces::Behind, qk_norm: QkNorm::Row, ..source.llama() }
}
