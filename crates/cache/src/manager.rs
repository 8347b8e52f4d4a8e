//! Who holds which block: the pool, its sequences and their block tables.

use crate::{CacheError, CacheLayout};

/// One sequence of tokens in the cache.
///
/// It must be given back to its manager by [`CacheManager::close`]; dropped, its blocks stay taken.
#[derive(Debug)]
pub struct Sequence {
    slot: u32,
    len: usize,
    blocks: Vec<u32>,
}

impl Sequence {
    /// Number of the sequence's window rings.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Cached tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The block table: block `i` holds tokens `128 i .. 128 (i + 1)`.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }
}

/// Hands out blocks and sequence slots of one cache.
#[derive(Debug)]
pub struct CacheManager {
    layout: CacheLayout,
    free_blocks: Vec<u32>,
    num_blocks: usize,
    free_slots: Vec<u32>,
    num_sequences: usize,
}

impl CacheManager {
    /// A manager of `num_blocks` blocks for up to `num_sequences` sequences at once.
    pub fn new(layout: CacheLayout, num_blocks: usize, num_sequences: usize) -> Self {
        let descending = |n: usize| (0..n as u32).rev().collect();
        CacheManager {
            layout,
            free_blocks: descending(num_blocks),
            num_blocks,
            free_slots: descending(num_sequences),
            num_sequences,
        }
    }

    /// The cache's layout.
    pub fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    /// Blocks of the pool.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Blocks that nobody holds.
    pub fn free_blocks(&self) -> usize {
        self.free_blocks.len()
    }

    /// Begins an empty sequence.
    ///
    /// # Errors
    /// [`CacheError::TooManySequences`].
    pub fn open(&mut self) -> Result<Sequence, CacheError> {
        let slot = self.free_slots.pop().ok_or(CacheError::TooManySequences { capacity: self.num_sequences })?;
        Ok(Sequence { slot, len: 0, blocks: Vec::new() })
    }

    /// Makes sure that `sequence` has the blocks that `len` tokens need. On an error it keeps what it had.
    ///
    /// # Errors
    /// [`CacheError::PoolExhausted`].
    pub fn reserve(&mut self, sequence: &mut Sequence, len: usize) -> Result<(), CacheError> {
        let needed = self.layout.window.blocks(len).saturating_sub(sequence.blocks.len());
        let free = self.free_blocks.len();
        if needed > free {
            return Err(CacheError::PoolExhausted { needed, free, capacity: self.num_blocks });
        }
        sequence.blocks.extend(self.free_blocks.drain(free - needed..).rev());
        Ok(())
    }

    /// Records that the sequence now holds `len` tokens, which a device has stored.
    ///
    /// # Panics
    /// If the blocks for so many tokens were not reserved, or `len` is shorter than before.
    pub fn advance(&mut self, sequence: &mut Sequence, len: usize) {
        assert!(len >= sequence.len && self.layout.window.blocks(len) <= sequence.blocks.len());
        sequence.len = len;
    }

    /// Empties a sequence, which stays open, and takes its blocks back.
    pub fn clear(&mut self, sequence: &mut Sequence) {
        self.free_blocks.extend(sequence.blocks.drain(..).rev());
        sequence.len = 0;
    }

    /// Ends a sequence and takes its blocks and its slot back.
    pub fn close(&mut self, mut sequence: Sequence) {
        self.clear(&mut sequence);
        self.free_slots.push(sequence.slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CacheShape, Scheme};
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn manager(scheme: &str, blocks: usize, sequences: usize) -> CacheManager {
        let shape = CacheShape { num_layers: 1, num_key_value_heads: 1, head_dim: 64 };
        CacheManager::new(CacheLayout::new(&Scheme::load(scheme).unwrap(), shape).unwrap(), blocks, sequences)
    }

    #[test]
    fn running_out_is_an_error_that_loses_nothing() {
        let mut manager = manager("fp16", 3, 2);
        let mut a = manager.open().unwrap();
        let mut b = manager.open().unwrap();
        assert_eq!(manager.open().unwrap_err(), CacheError::TooManySequences { capacity: 2 });
        manager.reserve(&mut a, 200).unwrap();
        manager.advance(&mut a, 200);
        assert_eq!(manager.reserve(&mut b, 129), Err(CacheError::PoolExhausted { needed: 2, free: 1, capacity: 3 }));
        assert_eq!((b.blocks().len(), manager.free_blocks()), (0, 1));
        manager.reserve(&mut b, 128).unwrap();
        manager.close(a);
        manager.reserve(&mut b, 384).unwrap();
        assert_eq!(manager.free_blocks(), 0);
        manager.clear(&mut b);
        assert_eq!((b.len(), manager.free_blocks()), (0, 3));
    }

    #[test]
    fn a_window_delays_the_first_block() {
        let mut manager = manager("kvlinc", 1, 1);
        let mut sequence = manager.open().unwrap();
        manager.reserve(&mut sequence, 255).unwrap();
        assert_eq!(sequence.blocks().len(), 0);
        manager.reserve(&mut sequence, 256).unwrap();
        assert_eq!(sequence.blocks(), [0]);
    }

    proptest! {
        #[test]
        fn no_block_has_two_owners(steps in prop::collection::vec((0usize..4, 0usize..900), 1..60)) {
            let mut manager = manager("fp16", 12, 4);
            let mut open: Vec<Sequence> = (0..4).map(|_| manager.open().unwrap()).collect();
            for (who, len) in steps {
                if len < open[who].len() {
                    manager.clear(&mut open[who]);
                } else if manager.reserve(&mut open[who], len).is_ok() {
                    manager.advance(&mut open[who], len);
                }
                let held: Vec<u32> = open.iter().flat_map(|s| s.blocks().iter().copied()).collect();
                let distinct: HashSet<u32> = held.iter().copied().collect();
                prop_assert_eq!(distinct.len(), held.len());
                prop_assert_eq!(held.len() + manager.free_blocks(), 12);
            }
        }
    }
}
