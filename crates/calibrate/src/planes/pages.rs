//! Rows of a sequence by pages, as a cache packs them.

use dibit_cache::PAGE_TOKENS;

/// Gathers the rows of a sequence until they fill a page.
#[derive(Default)]
pub(crate) struct Pages {
    rows: Vec<f32>,
    /// Position of the first row that is held.
    first: usize,
}

impl Pages {
    /// Adds rows of `width` numbers from position `first` on, and shows each full page with the position of its first token.
    /// What no page was full of when a sequence began is forgotten.
    pub(crate) fn add(&mut self, first: usize, rows: &[f32], width: usize, mut page: impl FnMut(usize, &[f32])) {
        if first == 0 {
            self.rows.clear();
            self.first = 0;
        }
        self.rows.extend_from_slice(rows);
        let mut whole = self.rows.chunks_exact(PAGE_TOKENS * width);
        for rows in &mut whole {
            page(self.first, rows);
            self.first += PAGE_TOKENS;
        }
        let rest = whole.remainder().len();
        self.rows.drain(..self.rows.len() - rest);
    }
}

/// The squared range of numbers of tokens, without those that are kept apart.
pub(crate) fn squared_range(numbers: impl Iterator<Item = f32>, apart: &[bool]) -> f64 {
    let own = numbers.zip(apart).filter(|(_, apart)| !**apart).map(|(x, _)| x);
    let (min, max) = own.fold((f32::INFINITY, f32::NEG_INFINITY), |(min, max), x| (min.min(x), max.max(x)));
    if min > max { 0.0 } else { f64::from(max - min).powi(2) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_full_and_begin_anew_with_a_sequence() {
        let mut pages = Pages::default();
        let mut seen = Vec::new();
        let rows: Vec<f32> = (0..300).map(|i| i as f32).collect();
        let mut add = |first, rows: &[f32]| pages.add(first, rows, 1, |at, page| seen.push((at, page[0], page.len())));
        add(0, &rows[..100]);
        add(100, &rows[100..]);
        add(0, &rows[..128]);
        assert_eq!(seen, [(0, 0.0, 128), (128, 128.0, 128), (0, 0.0, 128)]);
    }

    #[test]
    fn tokens_apart_are_no_part_of_a_range() {
        let page = [1.0, 9.0, -2.0, 0.5];
        assert_eq!(squared_range(page.into_iter(), &[false; 4]), 121.0);
        assert_eq!(squared_range(page.into_iter(), &[false, true, false, false]), 9.0);
        assert_eq!(squared_range(page.into_iter(), &[true; 4]), 0.0);
    }
}
