//! Phi-3 and Phi-4 (Microsoft): Llama with joint projections, whose heads may turn in part, with frequencies of their own
//! for long contexts.

use super::Source;
use crate::DecoderSpec;

pub(super) fn spec(source: &Source) -> DecoderSpec {
    DecoderSpec { joint_projections: true, ..source.llama() }
}
