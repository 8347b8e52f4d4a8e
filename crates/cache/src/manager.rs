//! Who holds which block: the pool, its sequences and their block tables.

use crate::{Batch, CacheError, CachePlan, SequenceState, Usage};

/// One sequence of tokens in the cache.
///
/// It must be given back to its manager by [`CacheManager::close`]; dropped, its blocks stay taken.
#[derive(Debug)]
pub struct Sequence {
    slot: u32,
    len: usize,
    blocks: Vec<u32>,
    classes: Option<Classes>,
}

/// The tokens of a sequence by their classes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Classes {
    /// Class of each token from the first on; the others have class 0.
    of_tokens: Vec<u8>,
    /// Block table of each class.
    blocks: Vec<Vec<u32>>,
}

/// The tokens of one class in a sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassTokens {
    /// Positions of the tokens; the `i`-th packed one lies in slot `i % 128` of block `i / 128`.
    pub tokens: Vec<u32>,
    /// Its block table.
    pub blocks: Vec<u32>,
}

impl ClassTokens {
    /// How many of them are among the first `packed` tokens of the sequence.
    pub fn packed(&self, packed: usize) -> usize {
        self.tokens.partition_point(|token| (*token as usize) < packed)
    }
}

impl Classes {
    /// Class of a token.
    fn of(&self, token: usize) -> usize {
        self.of_tokens.get(token).map_or(0, |class| usize::from(*class))
    }

    /// Blocks that each class needs where the first `packed` tokens lie in pages.
    fn blocks(&self, packed: usize) -> Vec<usize> {
        let mut counts = vec![0usize; self.blocks.len()];
        (0..packed).for_each(|token| counts[self.of(token)] += 1);
        counts.into_iter().map(|count| count.div_ceil(crate::PAGE_TOKENS)).collect()
    }
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

    /// The block table: block `i` holds tokens `128 i .. 128 (i + 1)`. Empty where the scheme has classes.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// The first `len` tokens by their classes; empty where the scheme has none.
    pub fn class_tokens(&self, len: usize) -> Vec<ClassTokens> {
        let Some(classes) = &self.classes else { return Vec::new() };
        let empty = |blocks: &Vec<u32>| ClassTokens { tokens: Vec::new(), blocks: blocks.clone() };
        let mut all: Vec<ClassTokens> = classes.blocks.iter().map(empty).collect();
        (0..len).for_each(|token| all[classes.of(token)].tokens.push(token as u32));
        all
    }

    /// Blocks that the sequence holds, of all classes.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len() + self.classes.iter().flat_map(|classes| &classes.blocks).map(Vec::len).sum::<usize>()
    }
}

/// Hands out blocks and sequence slots of one cache.
#[derive(Debug)]
pub struct CacheManager {
    plan: CachePlan,
    free_blocks: Vec<u32>,
    num_blocks: usize,
    free_slots: Vec<u32>,
    /// What is known of the sequence of each slot.
    states: Vec<SequenceState>,
}

impl CacheManager {
    /// A manager of `num_blocks` blocks for up to `num_sequences` sequences at once.
    pub fn new(plan: CachePlan, num_blocks: usize, num_sequences: usize) -> Self {
        let descending = |n: usize| (0..n as u32).rev().collect();
        CacheManager {
            free_blocks: descending(num_blocks),
            num_blocks,
            free_slots: descending(num_sequences),
            states: vec![SequenceState::new(&plan); num_sequences],
            plan,
        }
    }

    /// Where the bytes of the cache lie.
    pub fn plan(&self) -> &CachePlan {
        &self.plan
    }

    /// Blocks of the pool.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Sequences at once.
    pub fn num_sequences(&self) -> usize {
        self.states.len()
    }

    /// The plan, and what is known of the sequence of each slot: a pass chooses sinks.
    pub fn split_states(&mut self) -> (&CachePlan, &mut [SequenceState]) {
        (&self.plan, &mut self.states)
    }

    /// For each block of a sequence the first one of its chunk, by their places in the block table.
    pub(crate) fn chunks(&self, sequence: &Sequence) -> Vec<u32> {
        self.states[sequence.slot as usize].chunks().to_vec()
    }

    /// Notes what a pass has stored, before the sequences advance.
    pub fn note(&mut self, batch: &Batch) {
        let stepwise = batch.is_stepwise(&self.plan);
        for span in &batch.spans {
            self.states[span.slot as usize].fill(&self.plan, span.cached..span.len(), stepwise);
        }
    }

    /// What a sequence takes.
    pub fn usage(&self, sequence: &Sequence) -> Usage {
        let extras = self.states[sequence.slot as usize].extras(&self.plan, sequence.len);
        self.plan.sequence_usage(sequence, extras)
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
        let slot = self.free_slots.pop().ok_or(CacheError::TooManySequences { capacity: self.states.len() })?;
        let none = Classes { of_tokens: Vec::new(), blocks: vec![Vec::new(); self.plan.classes.len() + 1] };
        let classes = (!self.plan.classes.is_empty()).then_some(none);
        Ok(Sequence { slot, len: 0, blocks: Vec::new(), classes })
    }

    /// Says of which classes the tokens are that come next: 0 for none, 1 and on in the scheme's order. Tokens of which
    /// nothing is said have none.
    ///
    /// # Errors
    /// [`CacheError::Class`] for a class that the scheme does not have; the sequence is then as it was.
    pub fn classify(&self, sequence: &mut Sequence, classes: &[u8]) -> Result<(), CacheError> {
        let count = self.plan.classes.len();
        if let Some(&class) = classes.iter().find(|class| usize::from(**class) > count) {
            return Err(CacheError::Class { class, count });
        }
        if let Some(own) = &mut sequence.classes {
            own.of_tokens.resize(sequence.len, 0);
            own.of_tokens.extend_from_slice(classes);
        }
        Ok(())
    }

    /// Makes sure that `sequence` has the blocks that `len` tokens need. On an error it keeps what it had.
    ///
    /// # Errors
    /// [`CacheError::PoolExhausted`].
    pub fn reserve(&mut self, sequence: &mut Sequence, len: usize) -> Result<(), CacheError> {
        let wanted = self.wanted(sequence, len);
        let missing: Vec<usize> =
            wanted.iter().zip(tables(sequence)).map(|(wanted, table)| wanted.saturating_sub(table.len())).collect();
        let (needed, free) = (missing.iter().sum(), self.free_blocks.len());
        if needed > free {
            return Err(CacheError::PoolExhausted { needed, free, capacity: self.num_blocks });
        }
        for (table, missing) in tables(sequence).zip(missing) {
            let free = self.free_blocks.len();
            table.extend(self.free_blocks.drain(free - missing..).rev());
        }
        Ok(())
    }

    /// Blocks that each table of a sequence of `len` tokens needs.
    fn wanted(&self, sequence: &Sequence, len: usize) -> Vec<usize> {
        match &sequence.classes {
            Some(classes) => std::iter::once(0).chain(classes.blocks(self.plan.window.packed_keys(len))).collect(),
            None => vec![self.plan.window.blocks(len)],
        }
    }

    /// Records that the sequence now holds `len` tokens, which a device has stored.
    ///
    /// # Panics
    /// If the blocks for so many tokens were not reserved, or `len` is shorter than before.
    pub fn advance(&mut self, sequence: &mut Sequence, len: usize) {
        let wanted = self.wanted(sequence, len);
        let reserved = tables(sequence).zip(wanted).all(|(table, wanted)| wanted <= table.len());
        assert!(len >= sequence.len && reserved);
        sequence.len = len;
    }

    /// Empties a sequence, which stays open, and takes its blocks back.
    pub fn clear(&mut self, sequence: &mut Sequence) {
        for table in tables(sequence) {
            self.free_blocks.extend(table.drain(..).rev());
        }
        if let Some(classes) = &mut sequence.classes {
            classes.of_tokens.clear();
        }
        sequence.len = 0;
        self.states[sequence.slot as usize] = SequenceState::new(&self.plan);
    }

    /// Ends a sequence and takes its blocks and its slot back.
    pub fn close(&mut self, mut sequence: Sequence) {
        self.clear(&mut sequence);
        self.free_slots.push(sequence.slot);
    }
}

/// The block tables of a sequence: that of tokens without classes, and one for each class.
fn tables(sequence: &mut Sequence) -> impl Iterator<Item = &mut Vec<u32>> {
    std::iter::once(&mut sequence.blocks).chain(sequence.classes.iter_mut().flat_map(|classes| &mut classes.blocks))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CacheModel, CacheShape, CalibratedScheme};
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn manager(scheme: &str, blocks: usize, sequences: usize) -> CacheManager {
        let shape = CacheShape { num_layers: 1, num_key_value_heads: 1, head_dim: 64 };
        let scheme = CalibratedScheme::load(scheme).unwrap();
        CacheManager::new(scheme.plan(&CacheModel::of_shape(shape)).unwrap(), blocks, sequences)
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
