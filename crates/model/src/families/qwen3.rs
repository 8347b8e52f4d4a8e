//! Qwen3 (Alibaba): Llama with a norm of each head of queries and keys.

use super::Source;
use crate::{DecoderSpec, QkNorm};

pub(super) fn spec(source: &Source) -> DecoderSpec {
    DecoderSpec { qk_norm: QkNorm::Head, ..source.llama() }
}
