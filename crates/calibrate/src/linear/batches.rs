//! Which sequences a step sees, and which of their rows.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Streams of random numbers of one seed; those of bases lie below, and those of starts above.
const ORDER_STREAM: u64 = 1 << 48;
const ROW_STREAM: u64 = 1 << 49;

/// Lays documents one after the other and cuts them into sequences of `context` ids. Each document and each sequence
/// begins with `bos`, if the model has one; what does not fill a sequence is left out (as LoLCATs packs its samples).
pub(crate) fn pack(documents: &[Vec<u32>], bos: Option<u32>, context: usize) -> Vec<Vec<u32>> {
    let mut sequences = Vec::new();
    let mut sequence: Vec<u32> = Vec::with_capacity(context);
    for document in documents {
        // What the tokenizer or the text put there is not doubled.
        let own = document.strip_prefix(bos.as_slice()).unwrap_or(document);
        let start = bos.filter(|_| !own.is_empty());
        for id in start.iter().chain(own) {
            if sequence.is_empty() {
                sequence.extend(bos.filter(|bos| bos != id));
            }
            sequence.push(*id);
            if sequence.len() >= context {
                sequences.push(std::mem::replace(&mut sequence, Vec::with_capacity(context)));
            }
        }
    }
    sequences
}

/// A uniform number below `below`.
fn index(random: &mut ChaCha8Rng, below: usize) -> usize {
    ((u128::from(random.next_u64()) * below as u128) >> 64) as usize
}

/// The order in which sequences are seen: all of them before any comes again, each time in another order.
pub(crate) struct Order {
    seed: u64,
    count: usize,
    /// The round that `order` is of.
    round: usize,
    order: Vec<usize>,
}

impl Order {
    pub(crate) fn new(count: usize, seed: u64) -> Self {
        Order { seed, count, round: usize::MAX, order: Vec::new() }
    }

    /// The sequence that is seen at place `at`.
    pub(crate) fn sequence(&mut self, at: usize) -> usize {
        let round = at / self.count;
        if round != self.round {
            let mut random = ChaCha8Rng::seed_from_u64(self.seed);
            random.set_stream(ORDER_STREAM + round as u64);
            self.order = (0..self.count).collect();
            for place in (1..self.count).rev() {
                self.order.swap(place, index(&mut random, place + 1));
            }
            self.round = round;
        }
        self.order[at % self.count]
    }
}

/// A share of some rows: of as many neighbours as make one, one by chance. `stream` tells choices of one seed apart.
pub(crate) fn sample_rows(rows: &[u32], share: f32, seed: u64, stream: u64) -> Vec<u32> {
    let count = ((rows.len() as f64 * f64::from(share)).round() as usize).clamp(1, rows.len());
    if count == rows.len() {
        return rows.to_vec();
    }
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(ROW_STREAM + stream);
    let border = |place: usize| place * rows.len() / count;
    (0..count).map(|place| rows[border(place) + index(&mut random, border(place + 1) - border(place))]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_and_sequences_begin_with_bos() {
        let documents = [vec![5, 6, 7], vec![], vec![1, 8], vec![9, 10, 11, 12]];
        let packed = pack(&documents, Some(1), 4);
        assert_eq!(packed, [[1, 5, 6, 7], [1, 8, 1, 9], [1, 10, 11, 12]]);
        assert_eq!(pack(&documents, None, 4), [[5, 6, 7, 1], [8, 9, 10, 11]]);
        assert!(pack(&documents, Some(1), 20).is_empty());
        let one: Vec<u32> = (10..20).collect();
        assert_eq!(pack(std::slice::from_ref(&one), Some(1), 4), dibit_model::windows(&one, Some(1), 4, None));
    }

    #[test]
    fn every_sequence_is_seen_before_any_comes_again() {
        let mut order = Order::new(7, 3);
        let seen: Vec<usize> = (0..21).map(|at| order.sequence(at)).collect();
        for round in seen.chunks(7) {
            let mut sorted = round.to_vec();
            sorted.sort_unstable();
            assert!(sorted.into_iter().eq(0..7));
        }
        assert_ne!(seen[..7], seen[7..14]);
        assert_eq!(Order::new(7, 3).sequence(15), seen[15]);
        assert_ne!((0..7).map(|at| Order::new(7, 4).sequence(at)).collect::<Vec<_>>(), seen[..7]);
    }

    #[test]
    fn rows_are_spread_evenly() {
        let rows: Vec<u32> = (100..200).collect();
        let sample = sample_rows(&rows, 0.25, 1, 2);
        assert_eq!(sample.len(), 25);
        for (place, row) in sample.iter().enumerate() {
            assert!((100 + 4 * place as u32..104 + 4 * place as u32).contains(row));
        }
        assert_ne!(sample, sample_rows(&rows, 0.25, 1, 3));
        assert_eq!(sample_rows(&rows, 1.0, 1, 2), rows);
        assert_eq!(sample_rows(&rows, 1e-9, 1, 2).len(), 1);
    }
}
