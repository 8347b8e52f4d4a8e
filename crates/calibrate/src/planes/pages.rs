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
    /// Adds rows of `width` numbers from position `first` on, and shows each full page, without its first `skipped` tokens
    /// of the sequence. What no page was full of when a sequence began is forgotten.
    pub(crate) fn add(
        &mut self,
        first: usize,
        rows: &[f32],
        width: usize,
        skipped: usize,
        mut page: impl FnMut(&[f32]),
    ) {
        if first == 0 {
            self.rows.clear();
            self.first = 0;
        }
        self.rows.extend_from_slice(rows);
        let mut whole = self.rows.chunks_exact(PAGE_TOKENS * width);
        for rows in &mut whole {
            let kept = skipped.saturating_sub(self.first).min(PAGE_TOKENS);
            if kept < PAGE_TOKENS {
                page(&rows[kept * width..]);
            }
            self.first += PAGE_TOKENS;
        }
        let rest = whole.remainder().len();
        self.rows.drain(..self.rows.len() - rest);
    }
}

/// The squared range of each of `width` channels over the rows of a page.
pub(crate) fn squared_ranges(page: &[f32], width: usize) -> impl Iterator<Item = f64> {
    let mut ends = vec![(f32::INFINITY, f32::NEG_INFINITY); width];
    for row in page.chunks_exact(width) {
        for ((min, max), value) in ends.iter_mut().zip(row) {
            (*min, *max) = (min.min(*value), max.max(*value));
        }
    }
    ends.into_iter().map(|(min, max)| f64::from(max - min).powi(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_full_and_begin_anew_with_a_sequence() {
        let mut pages = Pages::default();
        let mut seen = Vec::new();
        let rows: Vec<f32> = (0..300).map(|i| i as f32).collect();
        pages.add(0, &rows[..100], 1, 2, |page| seen.push((page[0], page.len())));
        pages.add(100, &rows[100..], 1, 2, |page| seen.push((page[0], page.len())));
        pages.add(0, &rows[..128], 1, 0, |page| seen.push((page[0], page.len())));
        assert_eq!(seen, [(2.0, 126), (128.0, 128), (0.0, 128)]);
        let ranges: Vec<f64> = squared_ranges(&[1.0, 0.0, -2.0, 0.5], 2).collect();
        assert_eq!(ranges, [9.0, 0.25]);
    }
}
