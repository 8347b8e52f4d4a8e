//! Who holds which block: the pool, its sequences and their block tables.

use crate::sequence::{Classes, Sequence, tables};
use crate::{BlockPool, CacheError, CachePlan, SequenceState, Usage};

/// Hands out blocks and sequence slots of one cache.
#[derive(Debug)]
pub struct CacheManager {
    plan: CachePlan,
    blocks: BlockPool,
    free_slots: Vec<u32>,
    /// What is known of the sequence of each slot.
    states: Vec<SequenceState>,
}

impl CacheManager {
    /// A manager of `num_blocks` blocks for up to `num_sequences` sequences at once.
    pub fn new(plan: CachePlan, num_blocks: usize, num_sequences: usize) -> Self {
        CacheManager {
            blocks: BlockPool::new(num_blocks),
            free_slots: (0..num_sequences as u32).rev().collect(),
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
        self.blocks.capacity()
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

    /// What a sequence takes.
    pub fn usage(&self, sequence: &Sequence) -> Usage {
        let extras = self.states[sequence.slot as usize].extras(&self.plan, sequence.len);
        self.plan.sequence_usage(sequence, extras)
    }

    /// Blocks that nobody holds.
    pub fn free_blocks(&self) -> usize {
        self.blocks.free()
    }

    /// Begins an empty sequence.
    ///
    /// # Errors
    /// [`CacheError::TooManySequences`].
    pub fn open(&mut self) -> Result<Sequence, CacheError> {
        let slot = self.free_slots.pop().ok_or(CacheError::TooManySequences { capacity: self.states.len() })?;
        let none = Classes { of_tokens: Vec::new(), blocks: vec![Vec::new(); self.plan.classes.len() + 1] };
        let classes = (!self.plan.classes.is_empty()).then_some(none);
        Ok(Sequence { slot, len: 0, blocks: vec![Vec::new(); self.plan.groups.len()], classes })
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
        let (needed, free) = (missing.iter().sum(), self.blocks.free());
        if needed > free {
            return Err(CacheError::PoolExhausted { needed, free, capacity: self.blocks.capacity() });
        }
        for (table, missing) in tables(sequence).zip(missing) {
            table.extend(self.blocks.take(missing));
        }
        Ok(())
    }

    /// Blocks that each table of a sequence of `len` tokens needs.
    fn wanted(&self, sequence: &Sequence, len: usize) -> Vec<usize> {
        match &sequence.classes {
            Some(classes) => {
                let none = self.plan.groups.iter().map(|_| 0);
                none.chain(classes.blocks(self.plan.window.packed_keys(len))).collect()
            }
            None => self.plan.group_blocks(len).collect(),
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
            self.blocks.release(table.drain(..).rev());
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Batch, CacheModel, CacheShape, CalibratedScheme, Mode, Phase};
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
        assert_eq!((b.blocks(0).len(), manager.free_blocks()), (0, 1));
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
        assert_eq!(sequence.blocks(0).len(), 0);
        manager.reserve(&mut sequence, 256).unwrap();
        assert_eq!(sequence.blocks(0), [0]);
    }

    /// A pass of so many tokens.
    fn pass(manager: &mut CacheManager, sequence: &mut Sequence, mode: Mode, tokens: usize) -> Batch {
        manager.reserve(sequence, sequence.len() + tokens).unwrap();
        let mut batch = Batch::new(mode);
        batch.push(manager, sequence, tokens);
        manager.note(&batch);
        manager.advance(sequence, sequence.len() + tokens);
        batch
    }

    #[test]
    fn pages_of_a_pass_are_a_chunk_and_rows_that_come_one_by_one_are_not() {
        let mut manager = manager("gear-l", 20, 1);
        let mut sequence = manager.open().unwrap();
        let before = manager.usage(&sequence);
        pass(&mut manager, &mut sequence, Mode::Chunk, 600);
        assert_eq!(manager.chunks(&sequence), [0, 0, 0]);
        pass(&mut manager, &mut sequence, Mode::Streaming, 300);
        assert_eq!(manager.chunks(&sequence), [0, 0, 0, 3, 4, 5]);
        let used = manager.usage(&sequence).used_bytes;
        // What a pass sees are the chunks of those before it.
        assert_eq!(pass(&mut manager, &mut sequence, Mode::Chunk, 1).spans[0].chunks, [0, 0, 0, 3, 4, 5]);
        manager.clear(&mut sequence);
        assert_eq!(manager.chunks(&sequence), [0u32; 0]);
        assert_eq!(manager.usage(&sequence).used_bytes, before.used_bytes);
        pass(&mut manager, &mut sequence, Mode::Chunk, 900);
        assert_eq!(manager.chunks(&sequence), [0; 6]);
        let chunk = manager.plan().chunk_bytes();
        assert_eq!(used - manager.usage(&sequence).used_bytes, 3 * chunk);
    }

    #[test]
    fn what_a_pass_is_follows_from_its_rows_and_its_scheme() {
        let of = |scheme: &str, mode: Mode, passes: &[usize]| {
            let mut manager = manager(scheme, 20, 1);
            let mut sequence = manager.open().unwrap();
            let mut own = |tokens: &usize| pass(&mut manager, &mut sequence, mode, *tokens);
            let batch = passes.iter().map(&mut own).last().unwrap();
            (batch.phase(), batch.is_stepwise(manager.plan()), batch.repeats(manager.plan()))
        };
        let (prefill, decode) = (Phase::Prefill, Phase::Decode);
        assert_eq!(of("kivi", Mode::Chunk, &[5]), (prefill, false, false));
        assert_eq!(of("kivi", Mode::Chunk, &[5, 1]), (decode, false, true));
        assert_eq!(of("kivi", Mode::Streaming, &[5]), (decode, true, false));
        assert_eq!(of("kivi", Mode::Streaming, &[5, 1]), (decode, true, false));
        // Stored before it attends, but read as a prompt.
        assert_eq!(of("quarot-official", Mode::Chunk, &[5]), (prefill, true, false));
        // The first token is looked at for its activations.
        assert_eq!(of("akvq-vl", Mode::Chunk, &[1]), (decode, false, false));
        assert_eq!(of("akvq-vl", Mode::Chunk, &[1, 1]), (decode, false, true));
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
                let held: Vec<u32> = open.iter().flat_map(|s| s.blocks(0).iter().copied()).collect();
                let distinct: HashSet<u32> = held.iter().copied().collect();
                prop_assert_eq!(distinct.len(), held.len());
                prop_assert_eq!(held.len() + manager.free_blocks(), 12);
            }
        }
    }
}
