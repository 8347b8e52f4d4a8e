//! Honest bits: what cached tokens take, counted from real bytes.

use crate::{CachePlan, ClassTokens, LayerLayout, PAGE_TOKENS, PageLayout, Sequence};

/// Bytes taken by the tokens of one or more sequences.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Cached tokens.
    pub tokens: usize,
    /// Cached key and value scalars.
    pub scalars: usize,
    /// Bytes that hold them: codes, scales, minimums and 16-bit rows of the window.
    pub used_bytes: usize,
    /// Bytes allocated for them: whole blocks, whole rings and block tables.
    pub allocated_bytes: usize,
    /// Bytes that the same tokens take in 16 bit.
    pub fp16_bytes: usize,
}

impl Usage {
    /// Average bits in use for a cached scalar; 0 before the first token.
    pub fn bits(&self) -> f64 {
        per_scalar(self.used_bytes, self.scalars)
    }

    /// Average bits allocated for a cached scalar; 0 before the first token.
    pub fn allocated_bits(&self) -> f64 {
        per_scalar(self.allocated_bytes, self.scalars)
    }
}

fn per_scalar(bytes: usize, scalars: usize) -> f64 {
    if scalars == 0 { 0.0 } else { bytes as f64 * 8.0 / scalars as f64 }
}

impl std::ops::Add for Usage {
    type Output = Usage;

    fn add(self, other: Usage) -> Usage {
        Usage {
            tokens: self.tokens + other.tokens,
            scalars: self.scalars + other.scalars,
            used_bytes: self.used_bytes + other.used_bytes,
            allocated_bytes: self.allocated_bytes + other.allocated_bytes,
            fp16_bytes: self.fp16_bytes + other.fp16_bytes,
        }
    }
}

/// What a sequence holds beside pages and window. It depends on the tokens and on how they came in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Extras {
    /// Tokens kept as sinks, summed over the layers.
    pub sinks: usize,
    /// Chunks of pages that share factors.
    pub chunks: usize,
}

impl CachePlan {
    /// What a sequence of `len` tokens may hold beside pages and window, where its tokens came in by passes that end at the
    /// multiples of `pass` tokens.
    fn planned_extras(&self, len: usize, pass: usize) -> Extras {
        let fills = |start: &usize| !self.window.filled_pages(*start..len.min(start + pass)).is_empty();
        let chunks = if self.chunk_bytes() > 0 { (0..len).step_by(pass).filter(fills).count() } else { 0 };
        Extras { sinks: self.shape.num_layers * self.sinks.capacity().min(self.window.packed_keys(len)), chunks }
    }

    /// What `len` tokens of one sequence take while it holds `blocks` blocks.
    pub fn usage(&self, len: usize, blocks: usize, extras: Extras) -> Usage {
        let keys = self.window.packed_keys(len);
        let values = self.window.packed_values(len);
        let packed = self.layers.iter().map(|layer| {
            // What is no longer seen is another page's, or was never written.
            let gone = layer.span.map_or(0, |span| len.saturating_sub(span) / PAGE_TOKENS * PAGE_TOKENS);
            packed_bytes([layer], keys.saturating_sub(gone), values.saturating_sub(gone))
        });
        let packed = packed.sum();
        self.usage_of(len, blocks, extras, packed)
    }

    /// Figures of a sequence whose pages hold `packed` bytes.
    fn usage_of(&self, len: usize, blocks: usize, extras: Extras, packed: usize) -> Usage {
        let heads = self.shape.num_key_value_heads;
        let row = 2 * self.shape.head_dim;
        let (keys, values) = (self.window.packed_keys(len), self.window.packed_values(len));
        let window = self.shape.num_layers * ((len - keys) * row + (len - values) * row);
        let sinks = extras.sinks * (heads * 2 * row + size_of::<u32>());
        let scalars = len * self.shape.scalars_per_token();
        let states = if keys > 0 { self.state_bytes() } else { 0 };
        Usage {
            tokens: len,
            scalars,
            used_bytes: packed + heads * window + sinks + extras.chunks * self.chunk_bytes() + states,
            allocated_bytes: self.allocated_bytes(blocks),
            fp16_bytes: scalars * 2,
        }
    }

    /// What a sequence takes that holds this beside pages and window.
    pub fn sequence_usage(&self, sequence: &Sequence, extras: Extras) -> Usage {
        let classes = sequence.class_tokens(self.window.packed_keys(sequence.len()));
        if classes.is_empty() {
            return self.usage(sequence.len(), sequence.num_blocks(), extras);
        }
        let own = |(class, own): (usize, &ClassTokens)| {
            let layers = (0..self.layers.len()).map(|layer| self.layer(class, layer));
            packed_bytes(layers, own.tokens.len(), own.tokens.len())
        };
        let packed = classes.iter().enumerate().map(own).sum();
        self.usage_of(sequence.len(), sequence.num_blocks(), extras, packed)
    }

    /// What a prompt of `len` tokens will take that is read by passes that end at the multiples of `pass` tokens, as far as its
    /// length tells.
    ///
    /// # Panics
    /// If `pass` is 0.
    pub fn planned_usage(&self, len: usize, pass: usize) -> Usage {
        self.usage(len, self.blocks(len), self.planned_extras(len, pass))
    }
}

/// Bytes of so many packed keys and values in every layer and KV head.
fn packed_bytes<'a>(layers: impl IntoIterator<Item = &'a LayerLayout>, keys: usize, values: usize) -> usize {
    // Whole pages divide exactly; of single tokens less than a byte is lost.
    let own = |page: &PageLayout| {
        let sinks = page.sinks.map_or(0, |sinks| sinks.bytes() * (values / PAGE_TOKENS));
        keys * page.key_bytes / PAGE_TOKENS + values * page.value_bytes / PAGE_TOKENS + sinks
    };
    layers.into_iter().flat_map(|layer| &layer.pages).map(own).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CacheManager, CacheModel, CacheShape, Scheme};

    const MODEL: fn(usize) -> CacheModel =
        |head_dim| CacheModel::of_shape(CacheShape { num_layers: 16, num_key_value_heads: 2, head_dim });

    fn layout(scheme: &str, head_dim: usize) -> CachePlan {
        Scheme::load(scheme).unwrap().plan(&MODEL(head_dim)).unwrap()
    }

    fn used(scheme: &str, len: usize) -> Usage {
        let mut manager = CacheManager::new(layout(scheme, 128), 256, 1);
        let mut sequence = manager.open().unwrap();
        manager.reserve(&mut sequence, len).unwrap();
        manager.advance(&mut sequence, len);
        let layout = manager.plan();
        layout.sequence_usage(&sequence, layout.planned_extras(len, len))
    }

    #[test]
    fn kivi_takes_2_46_bits_at_8192_tokens() {
        for scheme in ["kivi", "kvlinc"] {
            let usage = used(scheme, 8192);
            // 2.25 * 63/64 + 16 / 64.
            assert!((usage.bits() - 2.46484375).abs() < 1e-9, "{}", usage.bits());
            // The ring has 256 slots for 128 tokens.
            assert!((usage.allocated_bits() - (2.46484375 + 0.25)).abs() < 1e-3, "{}", usage.allocated_bits());
        }
        // Values alone keep a window under KIVI's schedule at a multiple of 128.
        assert!((used("kivi-paper", 8192).bits() - (2.25 + (16.0 - 2.25) / 128.0)).abs() < 1e-9);
    }

    #[test]
    fn sixteen_bit_takes_sixteen_bits() {
        let usage = used("fp16", 8192);
        assert_eq!(usage.bits(), 16.0);
        assert_eq!(usage.used_bytes, usage.fp16_bytes);
    }

    #[test]
    fn a_long_context_takes_less_than_a_sixth() {
        let packed = layout("kvlinc", 128).planned_bytes(32768);
        let half = layout("fp16", 128).planned_bytes(32768);
        assert!(packed * 6 < half, "{packed} of {half}");
    }

    #[test]
    fn before_the_first_token_there_are_no_bits() {
        assert_eq!(layout("kivi", 64).planned_usage(0, 256).bits(), 0.0);
    }

    #[test]
    fn every_pass_that_fills_pages_takes_a_chunk() {
        let chunks = |scheme: &str, len, pass| layout(scheme, 128).planned_extras(len, pass).chunks;
        // Of 2048 tokens 15 pages leave the window: one by one, by passes of two pages, and all at once.
        assert_eq!([128, 256, 2048].map(|pass| chunks("gear-l", 2048, pass)), [15, 8, 1]);
        assert_eq!([0, 255, 256].map(|len| chunks("gear-l", len, 256)), [0, 0, 1]);
        assert_eq!(chunks("kivi", 2048, 256), 0);
    }

    #[test]
    fn bits_at_8192_tokens_are_those_of_the_papers() {
        let bits = |scheme: &str| used(scheme, 8192).bits();
        let base = 2.25 * 63.0 / 64.0 + 0.25;
        // n being the packed tokens of the prompt: QuaRot, ResQ and GEAR-L with groups of 128 and of 64.
        let factors = |n: f64| 16.0 * 2.0 * (1.0 / 128.0 + 1.0 / n) * 63.0 / 64.0;
        assert!((bits("quarot") - base).abs() < 1e-9);
        assert!((bits("resq") - (2.6875 * 63.0 / 64.0 + 0.25)).abs() < 1e-9);
        assert!((bits("gear-l") - (base + factors(8064.0))).abs() < 1e-9, "{}", bits("gear-l"));
        assert!((bits("gear-l") - 2.72).abs() < 0.01 && (bits("gear-l-paper") - 2.96).abs() < 0.01);
        // Every packed token has a slot in its page, and sinks have 16 bit besides.
        assert!((bits("rotatekv") - (2.25 + (16.0 * 20.0 + 32.0 * 20.0 / 512.0) / 8192.0)).abs() < 1e-6);
    }
}
