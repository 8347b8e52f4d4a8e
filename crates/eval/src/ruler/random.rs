//! Random numbers that a seed repeats on every machine.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::collections::HashSet;

pub(super) struct Random(ChaCha8Rng);

impl Random {
    /// Streams of one seed have nothing in common.
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        generator.set_stream(stream);
        Random(generator)
    }

    /// A number below `end`, which is not 0.
    pub(super) fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.0.next_u64()) * end as u128) >> 64) as usize
    }

    pub(super) fn bits(&mut self) -> u128 {
        u128::from(self.0.next_u64()) << 64 | u128::from(self.0.next_u64())
    }

    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for end in (2..=items.len()).rev() {
            items.swap(end - 1, self.below(end));
        }
    }

    /// `count` different numbers below `end`, in rising order.
    pub(super) fn positions(&mut self, end: usize, count: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..end).collect();
        self.shuffle(&mut all);
        all.truncate(count);
        all.sort_unstable();
        all
    }

    /// `count` different texts. There must be far more than that.
    pub(super) fn distinct(&mut self, count: usize, mut draw: impl FnMut(&mut Self) -> String) -> Vec<String> {
        let (mut seen, mut texts) = (HashSet::new(), Vec::with_capacity(count));
        while texts.len() < count {
            let text = draw(self);
            if seen.insert(text.clone()) {
                texts.push(text);
            }
        }
        texts
    }

    /// So many letters, drawn with `first` and the 25 after it.
    pub(super) fn letters(&mut self, first: u8, count: usize) -> String {
        (0..count).map(|_| char::from(first + self.below(26) as u8)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_stay_in_range_and_streams_differ() {
        let mut random = Random::new(3, 0);
        let mut seen = [0; 5];
        for _ in 0..1000 {
            seen[random.below(5)] += 1;
        }
        assert!(seen.iter().all(|&count| count > 150), "{seen:?}");
        assert_eq!(random.positions(6, 6), [0, 1, 2, 3, 4, 5]);
        assert!(random.letters(b'A', 100).bytes().all(|byte| byte.is_ascii_uppercase()));
        assert_eq!(Random::new(3, 1).bits(), Random::new(3, 1).bits());
        assert_ne!(Random::new(3, 1).bits(), Random::new(3, 2).bits());
        assert_ne!(Random::new(3, 1).bits(), Random::new(4, 1).bits());
    }
}
