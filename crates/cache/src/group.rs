//! Layers that share block tables.
//!
//! A sequence has one table for each group. Where queries of a layer see no more than the last W tokens, the pages of its
//! group are used in turn: page `p` lies in block `p % n` of `n` blocks, which is another page's once no query sees it. Blocks
//! of all groups have one size, and come from one pool.

use crate::{LayerLayout, PAGE_TOKENS, Schedule, Window};

/// Layers that share block tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// The layers.
    pub layers: Vec<usize>,
    /// How many tokens their queries see; `None` for all before them.
    pub span: Option<usize>,
}

/// What of the tokens that leave a window enters the pages of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaving {
    /// The window.
    pub window: Window,
    /// The layer's group.
    pub group: usize,
    /// The first token that will be seen again: pages of those before it are not written.
    pub kept: usize,
}

impl Group {
    /// Blocks that a sequence of `len` tokens needs.
    pub(crate) fn blocks(&self, window: Window, len: usize) -> usize {
        window.blocks(len).min(self.most_blocks(window))
    }

    /// Blocks that a sequence needs at most, however long it is.
    pub(crate) fn most_blocks(&self, window: Window) -> usize {
        let Some(span) = self.span else { return usize::MAX };
        // Packed tokens that are seen at once.
        let packed = match window.schedule {
            Schedule::Guaranteed => span.saturating_sub(window.tokens),
            Schedule::None | Schedule::Kivi => span,
        };
        match packed {
            0 => 0,
            packed => (packed + PAGE_TOKENS - 2) / PAGE_TOKENS + 1,
        }
    }
}

/// Groups of layers, such that their blocks differ as little in size as they may.
pub(crate) fn groups(layers: &[LayerLayout]) -> Vec<Group> {
    let mut spans: Vec<Option<usize>> = Vec::new();
    for layer in layers {
        if !spans.contains(&layer.span) {
            spans.push(layer.span);
        }
    }
    let of_span = |span: &Option<usize>| -> Vec<usize> {
        (0..layers.len()).filter(|layer| layers[*layer].span == *span).collect()
    };
    let all: Vec<Vec<usize>> = spans.iter().map(of_span).collect();
    let bytes = |own: &[usize]| own.iter().map(|layer| layers[*layer].bytes()).sum::<usize>();
    let cut = |unit: usize| -> Vec<Group> {
        let mut groups = Vec::new();
        for (own, span) in all.iter().zip(&spans) {
            let mut rest: Vec<usize> = Vec::new();
            for layer in own {
                if !rest.is_empty() && bytes(&rest) + layers[*layer].bytes() > unit {
                    groups.push(Group { layers: std::mem::take(&mut rest), span: *span });
                }
                rest.push(*layer);
            }
            groups.push(Group { layers: rest, span: *span });
        }
        groups
    };
    let Some(smallest) = all.iter().min_by_key(|own| bytes(own)).filter(|_| all.len() > 1) else {
        return vec![Group { layers: (0..layers.len()).collect(), span: spans.first().copied().flatten() }];
    };
    // The whole of the fewest layers, or a part of them, is a block.
    let (whole, count) = (bytes(smallest), smallest.len());
    let candidates = (1..=count).map(|parts| cut(whole.div_ceil(parts)));
    let cost = |groups: &Vec<Group>| {
        let block = groups.iter().map(|own| bytes(&own.layers)).max().unwrap_or(0);
        (block * groups.len(), groups.len())
    };
    candidates.min_by_key(cost).expect("one candidate at least")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CacheManager, CacheModel, CachePlan, CacheShape, Scheme, Sequence, Span};
    use proptest::prelude::*;
    use std::collections::{HashMap, HashSet};

    /// Layers that see so many tokens, 0 for all.
    fn plan(scheme: &str, spans: &[usize]) -> CachePlan {
        let shape = CacheShape { num_layers: spans.len(), num_key_value_heads: 2, head_dim: 64 };
        let spans = spans.iter().map(|span| Some(*span).filter(|span| *span > 0)).collect();
        let model = CacheModel { spans, ..CacheModel::of_shape(shape) };
        Scheme::load(scheme).unwrap().plan(&model).unwrap()
    }

    fn layers(plan: &CachePlan) -> Vec<Vec<usize>> {
        plan.groups.iter().map(|group| group.layers.clone()).collect()
    }

    #[test]
    fn layers_are_cut_into_groups_of_one_size() {
        assert_eq!(layers(&plan("kivi", &[0, 0, 0])), [[0, 1, 2]]);
        assert_eq!(layers(&plan("kivi", &[64, 64])), [[0, 1]]);
        // Gemma 3 270M: three of 18 layers see all.
        let spans: Vec<usize> = (1..=18).map(|layer| if layer % 6 == 0 { 0 } else { 512 }).collect();
        let own = plan("kivi", &spans);
        assert_eq!(own.groups.iter().map(|group| group.layers.len()).collect::<Vec<_>>(), [3; 6]);
        assert_eq!(own.groups.iter().filter(|group| group.span.is_none()).count(), 1);
        let all: HashSet<usize> = own.groups.iter().flat_map(|group| group.layers.clone()).collect();
        assert_eq!(all.len(), 18);
        assert_eq!(own.block_bytes(), 3 * own.layers[0].bytes());
        for (number, group) in own.groups.iter().enumerate() {
            for (place, layer) in group.layers.iter().enumerate() {
                let layer = &own.layers[*layer];
                assert_eq!((layer.group, layer.offset), (number, place * layer.bytes()));
            }
        }
        // 32,768 tokens: 255 blocks of the layers that see all, and four of each of the others.
        assert_eq!(own.group_blocks(32_768).sum::<usize>(), 255 + 5 * 4);
    }

    #[test]
    fn what_a_window_in_16_bit_holds_takes_no_block() {
        assert_eq!(plan("kivi", &[128, 0]).group_blocks(10_000).collect::<Vec<_>>(), [0, 77]);
        assert_eq!(plan("kivi", &[129]).group_blocks(10_000).collect::<Vec<_>>(), [1]);
        assert_eq!(plan("fp16", &[128]).group_blocks(10_000).collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn what_does_not_go_with_windows_says_so() {
        let error = |scheme: &str, spans: Vec<Option<usize>>, turns_alike: bool| {
            let shape = CacheShape { num_layers: 2, num_key_value_heads: 2, head_dim: 64 };
            let model = CacheModel { spans, turns_alike, ..CacheModel::of_shape(shape) };
            Scheme::load(scheme).unwrap().plan(&model).map(drop).map_err(|error| error.to_string())
        };
        let window = || vec![None, Some(512)];
        assert!(error("gear", window(), true).unwrap_err().contains("low-rank factors"));
        let classes = "name = \"c\"\n[keys]\nbits = 2\naxis = \"token\"\n[values]\nbits = 2\n[classes.text.layers.1]\nkeys = { bits = 4 }\n";
        let shape = CacheShape { num_layers: 2, num_key_value_heads: 2, head_dim: 64 };
        let model = CacheModel { spans: window(), ..CacheModel::of_shape(shape) };
        let message = Scheme::parse(classes, "c").unwrap().plan(&model).unwrap_err().to_string();
        assert!(message.contains("tokens by classes"), "{message}");
        assert!(error("rotatekv", Vec::new(), false).unwrap_err().contains("keys before RoPE"));
        assert!(error("kvlinc", window(), true).is_ok());
        let plan = plan("kvlinc", &[0, 512]);
        assert!(plan.layers[0].linear.is_some() && plan.layers[1].linear.is_none());
    }

    proptest! {
        /// Whatever passes a sequence comes in by, a page that is seen holds the tokens that it should.
        #[test]
        fn pages_that_are_seen_hold_their_tokens(
            schedule in 0usize..3, recent in 1usize..300, span in 1usize..700, passes in prop::collection::vec(1usize..900, 1..12),
        ) {
            let window = match schedule {
                0 => Window { tokens: 0, schedule: Schedule::None },
                1 => Window { tokens: recent, schedule: Schedule::Guaranteed },
                _ => Window { tokens: 128, schedule: Schedule::Kivi },
            };
            let group = Group { layers: vec![0], span: Some(span) };
            let most = (span + 128 + window.tokens).div_ceil(128) + 1;
            let (mut len, mut held) = (0, HashMap::new());
            for rows in passes {
                let end = len + rows;
                let blocks = group.blocks(window, end);
                prop_assert!(blocks <= most);
                let own = Span {
                    slot: 0, blocks: vec![(0..blocks as u32).collect()], chunks: Vec::new(), classes: Vec::new(),
                    cached: len, rows: 0..rows,
                };
                let leaving = Leaving { window, group: 0, kept: end.saturating_sub(span) };
                for run in own.runs(leaving, len..end) {
                    for (i, token) in run.tokens.enumerate() {
                        held.insert((run.keys, run.block, run.slot + i), token);
                    }
                }
                len = end;
                // The next token sees those before it.
                let first = (len + 1).saturating_sub(span);
                for (keys, packed) in [(true, window.packed_keys(len)), (false, window.packed_values(len))] {
                    for token in first..packed {
                        let place = (keys, own.block(0, token / PAGE_TOKENS), token % PAGE_TOKENS);
                        prop_assert_eq!(held.get(&place), Some(&token));
                    }
                }
            }
        }

        #[test]
        fn tables_of_groups_share_a_pool_and_nothing_else(steps in prop::collection::vec((0usize..3, 0usize..2000), 1..40)) {
            let own = plan("kivi", &[0, 300, 300, 40]);
            let (most, pool) = (own.blocks(2000), 40);
            let mut manager = CacheManager::new(own, pool, 3);
            let mut open: Vec<Sequence> = (0..3).map(|_| manager.open().unwrap()).collect();
            for (who, len) in steps {
                if len < open[who].len() {
                    manager.clear(&mut open[who]);
                } else if manager.reserve(&mut open[who], len).is_ok() {
                    manager.advance(&mut open[who], len);
                }
                let groups = manager.plan().groups.len();
                let held: Vec<u32> = open.iter().flat_map(|own| (0..groups).flat_map(|group| own.blocks(group).to_vec())).collect();
                let distinct: HashSet<u32> = held.iter().copied().collect();
                prop_assert_eq!(distinct.len(), held.len());
                prop_assert_eq!(held.len() + manager.free_blocks(), pool);
                prop_assert!(open.iter().all(|own| own.num_blocks() <= most));
            }
        }
    }
}
